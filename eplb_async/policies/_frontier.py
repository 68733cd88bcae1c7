"""The search of the `frontier` policy, compiled by numba: from a placement, the steps that relieve the busiest ranks most per move.

Loads are in mean rank loads of their window, so a rank's load is its part of the PAR. What steps lower is the potential: over
ranks and windows, with over = max(0, load - waterline),

    potential = sum of over * (STEEP + over) + EVEN * (load - 1)^2

The first part is what stands above the waterline: zero means PAR <= waterline, and with many windows it follows the peaks of
each. The second is a small preference for even ranks, which decides between steps that clear a rank equally well. A step is

    swap       two experts on different ranks change places                      (2 slots filled anew)
    replace    a slot of an expert with other replicas goes to another expert    (1 slot)

and of the steps between the rank with the greatest potential and some cool ones the one with the greatest fall per slot filled anew is
taken (against the live placement: going back costs nothing). When there is none, the rank with the next greatest is tried.
The fall of a replace counts for more, up to twice, if it splits a hotter expert than it merges, by spread * load^2 / replicas
over experts, and for less if a colder: the next window differs from this one in proportion to an expert's load, and
a rank that holds a great part of a hot expert takes most of that.

Each step is written to a journal with the PAR after it: a journal is a frontier, moves against PAR, and each of its
points can be had by taking so many steps.

Shape suffixes: T windows, E experts, K most replicas, P slots, R ranks, S slots per rank, J steps of a journal.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._frontier_state import EVEN, STEEP, LayerState, above, mean_peak, refresh_relief, take_step
from eplb_async.policies._kernels import CACHE

__all__ = ["replace_gain", "search"]

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

ENOUGH = 1.02
"""A step that cannot be so many times better than the best so far is not looked at."""
COOL_RANKS = 4
"""Ranks that take part in a step beside the busy one: those with least load in the windows in which it is busy. Twice as many take
half as long again, and move a twentieth less."""
MOST_FAVOUR, LEAST_FAVOUR = 2.0, 0.5
"""How much more, and less, the fall of a replace counts for splitting hotter, or colder, experts than it merges."""
LEAST_GAIN = 1e-9
"""Falls of the potential below this are rounding."""
CLEARS = 0.45
"""Part of a rank's potential, per slot filled anew, that ends the look for a step where moves are free: a swap is two."""
LEAST_COST = 0.25
"""What a step that fills no slot anew is charged."""


@numba.njit(error_model="numpy", cache=CACHE)
def search(  # size: where to write, and when to stop
    state: LayerState, price: float, floor: float, patience: int, journal_J5: IntArray, par_J: FloatArray
) -> int:
    """Take steps until none is left that pays, and write them down.

    Args:
        state: where to start; ends where the last step led.
        price: PAR that one slot filled anew is worth. The search ends when one more move, even to perfect balance, could
            not make PAR + price * moves smaller than the best so far, or when `patience` steps in a row brought no better.
        floor: PAR that no placement can beat.
        patience: see price.
        journal_J5: gets the steps: slot, its new expert, second slot or -1, its new expert, slots filled anew so far.
        par_J: gets the PAR after each step.

    Returns:
        Number of steps.
    """
    load_RT, above_R = state.load_RT, state.above_R
    num_ranks = load_RT.shape[0]
    stuck_R = np.zeros(num_ranks, dtype=np.bool_)
    steps, moved, since = 0, 0, 0
    best = mean_peak(load_RT)
    while steps < par_J.shape[0] and since < patience and best > floor + price * (moved + 1):
        busiest, over = _busiest(above_R, stuck_R), 0.0
        if busiest < 0:
            break
        for window in range(load_RT.shape[1]):
            over = max(over, load_RT[busiest, window] - state.waterline)
        if over <= 0.0:
            break
        first, expert, second, other, cost = _best_step(state, busiest, price == 0.0)
        if first < 0:
            stuck_R[busiest] = True
            continue
        take_step(state, first, expert, second)
        stuck_R[:] = False
        moved += cost
        par = mean_peak(load_RT)
        journal_J5[steps, 0], journal_J5[steps, 1] = first, expert
        journal_J5[steps, 2], journal_J5[steps, 3], journal_J5[steps, 4] = second, other, moved
        par_J[steps] = par
        steps += 1
        since += 1
        if par + price * moved < best:
            best, since = par + price * moved, 0
    return steps


@numba.njit(error_model="numpy", cache=CACHE)
def _busiest(above_R: FloatArray, stuck_R: BoolArray) -> int:
    """The rank with the greatest potential that is not stuck; -1 if all are.

    A function of its own, because numba would compile the search twice for a variable that starts as the literal -1.
    """
    busiest = -1
    for rank in range(above_R.shape[0]):
        if not stuck_R[rank] and (busiest < 0 or above_R[rank] > above_R[busiest]):
            busiest = rank
    return busiest


@numba.njit(error_model="numpy", cache=CACHE)
def _best_step(state: LayerState, busiest: int, free: bool) -> tuple[int, int, int, int, int]:
    """The step with the greatest fall per slot filled anew that relieves a rank.

    Args:
        state: of the layer.
        busiest: the rank.
        free: moves cost nothing: a swap that clears the rank will do, and nothing else is looked for.

    Returns:
        Slot (-1: there is no such step), its new expert, second slot (-1: a replace), its new expert, and the slots
        filled anew.
    """
    row_P, live_ER = state.row_P, state.live_ER
    width = row_P.shape[0] // state.node_R.shape[0]
    slope_T, cool_C = _coolest(state, busiest)
    first, second, slot, expert, rate = -1, -1, -1, -1, 0.0
    if free:
        first, second, rate = _best_swap(state, busiest, 0.0, slope_T, cool_C)
    if rate < CLEARS * state.above_R[busiest]:
        slot, expert, rate = _best_replace(state, busiest, rate, cool_C)
    if not free:
        first, second, rate = _best_swap(state, busiest, rate, slope_T, cool_C)
    if first >= 0 and (slot < 0 or not free):
        one, two, other = row_P[first], row_P[second], second // width
        cost = int(live_ER[one, busiest]) + int(live_ER[two, other])
        cost -= int(live_ER[two, busiest]) + int(live_ER[one, other])
        return first, two, second, one, cost
    if slot >= 0:
        rank = slot // width
        return slot, expert, -1, -1, int(live_ER[row_P[slot], rank]) - int(live_ER[expert, rank])
    return -1, -1, -1, -1, 0


@numba.njit(error_model="numpy", cache=CACHE)
def _coolest(state: LayerState, busiest: int) -> tuple[FloatArray, LongArray]:
    """Slope of a rank's potential in each window, and the ranks with least load where it is steep, coolest first."""
    load_RT, waterline = state.load_RT, state.waterline
    num_ranks, num_windows = load_RT.shape
    slope_T, cool_R = np.empty(num_windows), np.zeros(num_ranks)
    for window in range(num_windows):
        over = max(load_RT[busiest, window] - waterline, 0.0)
        slope_T[window] = 2.0 * EVEN * (load_RT[busiest, window] - 1.0) + (STEEP + 2.0 * over if over > 0.0 else 0.0)
    for rank in range(num_ranks):
        for window in range(num_windows):
            cool_R[rank] += slope_T[window] * load_RT[rank, window]
    cool_R[busiest] = np.inf
    cool_C = np.empty(min(COOL_RANKS, num_ranks - 1), dtype=np.int64)
    for place in range(cool_C.shape[0]):
        cool_C[place] = np.argmin(cool_R)
        cool_R[cool_C[place]] = np.inf
    return slope_T, cool_C


@numba.njit(error_model="numpy", cache=CACHE)
def _best_replace(  # size: one loop, see the module
    state: LayerState, busiest: int, least: float, cool_C: LongArray
) -> tuple[int, int, float]:
    """The best slot to give to another expert: one on a cool rank to an expert of the rank, or one of the rank to any.

    The fall is what the ranks above the waterline of the new expert lose (`relief`), less what those of the old one gain (`harm`), and what
    changes on the slot's own rank; only where both have another rank in common it is summed anew.

    Args:
        state: of the layer.
        busiest: the rank to relieve.
        least: fall per slot that must be beaten.
        cool_C: ranks whose slots may go to experts of the rank.

    Returns:
        The slot (-1 if none), its new expert, and the fall per slot filled anew (`least` if none).
    """
    load_RT, load_ET, waterline, row_P = state.load_RT, state.load_ET, state.waterline, state.row_P
    count_E, host_EK, on_ER, live_ER = state.count_E, state.host_EK, state.on_ER, state.live_ER
    above_R, node_E, node_R, split_E = state.above_R, state.node_E, state.node_R, state.split_E
    num_experts, most = host_EK.shape
    width = row_P.shape[0] // node_R.shape[0]
    refresh_relief(state)
    relief_E, splits_E = state.relief_E, state.splits_E
    meets_E = np.full(num_experts, -1, dtype=np.int64)
    most_here, most_elsewhere = 0.0, 0.0
    for expert in range(num_experts):
        if on_ER[expert, busiest]:
            most_here = max(most_here, relief_E[expert])
        else:
            most_elsewhere = max(most_elsewhere, relief_E[expert])
    best_slot, best_expert, best = -1, -1, least
    for index in range((cool_C.shape[0] + 1) * width):
        rank = cool_C[index // width - 1] if index >= width else busiest
        slot = rank * width + index % width
        held = row_P[slot]
        count = count_E[held]
        if count < 2:
            continue
        drop = int(not live_ER[held, rank])
        reach = above_R[rank] + (most_elsewhere if rank == busiest else most_here)
        least = max(ENOUGH * best * max(1.0 - drop, LEAST_COST) / MOST_FAVOUR, LEAST_GAIN)
        if reach <= least:
            continue
        more, harm = 1.0 / (count - 1) - 1.0 / count, 0.0
        for copy in range(count):
            host = host_EK[held, copy]
            if host != rank:
                harm += above(load_RT, load_ET, waterline, host, held, more, held, 0.0) - above_R[host]
        if reach - harm <= least:
            continue
        for copy in range(count):
            host = host_EK[held, copy]
            for place in range(host * width, host * width + (width if host != rank else 0)):
                meets_E[row_P[place]] = slot
        # what stays on the slot's rank whichever expert comes: no load is negative
        stays = 0.0
        for window in range(load_RT.shape[1]):
            over = max(load_RT[rank, window] - load_ET[held, window] / count - waterline, 0.0)
            stays += over * (STEEP + over)
        merges, gives = more * split_E[held], -1.0 / count
        for place in range(num_experts if rank == busiest else width):
            expert = place if rank == busiest else row_P[busiest * width + place]
            gain = relief_E[expert] + above_R[rank] - harm
            if gain <= LEAST_GAIN or gain * MOST_FAVOUR <= ENOUGH * best * LEAST_COST:
                continue
            if on_ER[expert, rank] or count_E[expert] >= most or node_E[expert] != node_R[rank]:
                continue
            cost = max(1.0 * (int(live_ER[held, rank]) - int(live_ER[expert, rank])), LEAST_COST)
            if gain * MOST_FAVOUR <= ENOUGH * best * cost:
                continue
            fewer = splits_E[expert] - merges
            if min(max(gain + fewer, LEAST_FAVOUR * gain), MOST_FAVOUR * gain) <= ENOUGH * best * cost:
                continue
            if meets_E[expert] == slot:
                gain = replace_gain(state, slot, expert)
            else:
                most_gain = gain - stays
                if min(max(most_gain + fewer, LEAST_FAVOUR * most_gain), MOST_FAVOUR * most_gain) <= best * cost:
                    continue
                part = 1.0 / (count_E[expert] + 1)
                left = 0.0
                for window in range(load_RT.shape[1]):
                    load = load_RT[rank, window] + part * load_ET[expert, window] + gives * load_ET[held, window]
                    over = max(load - waterline, 0.0)
                    left += over * (STEEP + over) + EVEN * (load - 1.0) * (load - 1.0)
                gain -= left
            if gain <= LEAST_GAIN:
                continue
            gain = min(max(gain + fewer, LEAST_FAVOUR * gain), MOST_FAVOUR * gain)
            if gain > best * cost:
                best_slot, best_expert, best = slot, expert, gain / cost
    return best_slot, best_expert, best


@numba.njit(error_model="numpy", cache=CACHE)
def replace_gain(state: LayerState, slot: int, expert: int) -> float:
    """Fall of the potential if a slot goes to an expert: its ranks get less, those of the expert in the slot get more.

    Loads [[1.6], [0.2], [0.2]] in slots [0, 1 | 2, 1], waterline 1: rank 0 has 1.7, rank 1 0.3. With expert 0 in slot 3
    both have 1: the fall is all of the potential, 0.7 * (0.5 + 0.7) + 2 * 0.01 * 0.49 = 0.8498.
    """
    load_RT, load_ET, waterline, row_P = state.load_RT, state.load_ET, state.waterline, state.row_P
    count_E, host_EK, on_ER, above_R = state.count_E, state.host_EK, state.on_ER, state.above_R
    held, rank = row_P[slot], slot // (row_P.shape[0] // load_RT.shape[0])
    count, held_count = count_E[expert], count_E[held]
    less, more = 1.0 / (count + 1) - 1.0 / count, 1.0 / (held_count - 1) - 1.0 / held_count
    gain = above_R[rank]
    gain -= above(load_RT, load_ET, waterline, rank, expert, 1.0 / (count + 1), held, -1.0 / held_count)
    for copy in range(count):
        host = host_EK[expert, copy]
        also = more if on_ER[held, host] else 0.0
        gain += above_R[host] - above(load_RT, load_ET, waterline, host, expert, less, held, also)
    for copy in range(held_count):
        host = host_EK[held, copy]
        if host != rank and not on_ER[expert, host]:
            gain += above_R[host] - above(load_RT, load_ET, waterline, host, held, more, held, 0.0)
    return float(gain)


@numba.njit(error_model="numpy", cache=CACHE)
def _best_swap(  # size: one loop, see the module
    state: LayerState, busiest: int, least: float, slope_T: FloatArray, cool_C: LongArray
) -> tuple[int, int, float]:
    """The best swap of an expert of a rank with one of a cool rank, if it beats a fall per slot; else (-1, -1, that).

    A swap lowers the rank's potential by at most slope * (load that leaves), because the potential is convex, and both
    ranks' by at most all of it: most swaps are out before the exact sums over the windows.
    """
    load_RT, load_ET, waterline, row_P = state.load_RT, state.load_ET, state.waterline, state.row_P
    count_E, on_ER, live_ER = state.count_E, state.on_ER, state.live_ER
    above_R, node_E, node_R = state.above_R, state.node_E, state.node_R
    width = row_P.shape[0] // load_RT.shape[0]
    ours_S = _slopes(slope_T, load_ET, row_P[busiest * width : (busiest + 1) * width], count_E)
    best_first, best_second, best = -1, -1, least
    for rank in cool_C:
        both = above_R[busiest] + above_R[rank]
        theirs_S = _slopes(slope_T, load_ET, row_P[rank * width : (rank + 1) * width], count_E)
        coldest = np.inf
        for place in range(width):
            expert = row_P[rank * width + place]
            if on_ER[expert, busiest] or node_E[expert] != node_R[busiest]:
                theirs_S[place] = np.inf
            coldest = min(coldest, theirs_S[place])
        for first in range(width):
            one = row_P[busiest * width + first]
            if ours_S[first] - coldest <= max(ENOUGH * best * LEAST_COST, LEAST_GAIN):
                continue
            if on_ER[one, rank] or node_E[one] != node_R[rank]:
                continue
            part, away = 1.0 / count_E[one], int(live_ER[one, busiest]) - int(live_ER[one, rank])
            for second in range(width):
                leaves = min(ours_S[first] - theirs_S[second], both)
                if leaves <= ENOUGH * best * LEAST_COST or leaves <= LEAST_GAIN:
                    continue
                two = row_P[rank * width + second]
                cost = max(1.0 * (away + int(live_ER[two, rank]) - int(live_ER[two, busiest])), LEAST_COST)
                if leaves <= ENOUGH * best * cost:
                    continue
                other = 1.0 / count_E[two]
                here, there = 0.0, 0.0
                for window in range(load_RT.shape[1]):
                    out, back = part * load_ET[one, window], other * load_ET[two, window]
                    load = load_RT[busiest, window] - out + back
                    over = max(load - waterline, 0.0)
                    here += over * (STEEP + over) + EVEN * (load - 1.0) * (load - 1.0)
                    load = load_RT[rank, window] + out - back
                    over = max(load - waterline, 0.0)
                    there += over * (STEEP + over) + EVEN * (load - 1.0) * (load - 1.0)
                gain = both - here - there
                if gain > LEAST_GAIN and gain > best * cost:
                    best_first, best_second, best = busiest * width + first, rank * width + second, gain / cost
    return best_first, best_second, best


@numba.njit(error_model="numpy", cache=CACHE, inline="always")
def _slopes(slope_T: FloatArray, load_ET: FloatArray, row_S: IntArray, count_E: LongArray) -> FloatArray:
    """What taking each expert's load from a rank would bring at most: its load times the slope, over the windows."""
    slopes_S = np.zeros(row_S.shape[0])
    for place in range(row_S.shape[0]):
        expert = row_S[place]
        for window in range(slope_T.shape[0]):
            slopes_S[place] += slope_T[window] * load_ET[expert, window]
        slopes_S[place] /= count_E[expert]
    return slopes_S

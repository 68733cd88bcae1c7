"""The two kinds of steps of the `frontier` policy, compiled by numba: the best replace and the best swap for a rank (see `_frontier`).

Shape suffixes: T windows, E experts, K most replicas, P slots, R ranks, S slots per rank, C cool ranks.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._frontier_state import EVEN, STEEP, LayerState, above, refresh_relief
from eplb_async.policies._kernels import CACHE

__all__ = [
    "ENOUGH",
    "LEAST_COST",
    "LEAST_FAVOUR",
    "LEAST_GAIN",
    "MOST_FAVOUR",
    "best_replace",
    "best_swap",
    "replace_gain",
]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

ENOUGH = 1.02
"""A step that cannot be so many times better than the best so far is not looked at."""
MOST_FAVOUR, LEAST_FAVOUR = 2.0, 0.5
"""How much more, and less, the fall of a replace counts for splitting hotter, or colder, experts than it merges."""
LEAST_GAIN = 1e-9
"""Falls of the potential below this are rounding."""
LEAST_COST = 0.25
"""What a step that fills no slot anew is charged."""


@numba.njit(error_model="numpy", cache=CACHE)
def best_replace(state: LayerState, busiest: int, least: float) -> tuple[int, int, float]:
    """The best slot to give to another expert: one on a cool rank to an expert of the rank, or one of the rank to any.

    Args:
        state: of the layer.
        busiest: the rank to relieve.
        least: fall per slot that must be beaten.

    Returns:
        The slot (-1 if none), its new expert, and the fall per slot filled anew (`least` if none).
    """
    load_RT, load_ET, waterline, row_P = state.load_RT, state.load_ET, state.waterline, state.row_P
    count_E, host_EK, live_RE, above_R, cool_C = (
        state.count_E,
        state.host_EK,
        state.live_RE,
        state.above_R,
        state.cool_C,
    )
    width = row_P.shape[0] // load_RT.shape[0]
    refresh_relief(state)
    most_here = 0.0
    for slot in range(busiest * width, (busiest + 1) * width):
        most_here = max(most_here, state.relief_E[row_P[slot]])
    most_elsewhere = max(0.0, _most_but(state.relief_E, state.on_RE[busiest]))
    best_slot, best_expert, best = -1, -1, least
    for index in range((cool_C.shape[0] + 1) * width):
        rank = cool_C[index // width - 1] if index >= width else busiest
        slot = rank * width + index % width
        held = row_P[slot]
        count = count_E[held]
        if count < 2:
            continue
        reach = above_R[rank] + (most_elsewhere if rank == busiest else most_here)
        bar = max(ENOUGH * best * (1.0 if live_RE[rank, held] else LEAST_COST) / MOST_FAVOUR, LEAST_GAIN)
        if reach <= bar:
            continue
        more, harm = 1.0 / (count - 1) - 1.0 / count, 0.0
        for copy in range(count):
            host = host_EK[held, copy]
            if host != rank:
                harm += above(load_RT, load_ET, waterline, host, held, more, held, 0.0) - above_R[host]
        if reach - harm <= bar:
            continue
        expert, rate = _best_comer(state, busiest, slot, harm, best)
        if expert >= 0:
            best_slot, best_expert, best = slot, expert, rate
    return best_slot, best_expert, best


@numba.njit(error_model="numpy", cache=CACHE, fastmath={"nnan", "nsz"})
def _most_but(relief_E: FloatArray, on_E: BoolArray) -> float:
    """The greatest of these reliefs but for the experts of a rank: in a function of its own LLVM makes vector instructions of it."""
    most = -np.inf
    for expert in range(relief_E.shape[0]):
        most = max(most, -np.inf if on_E[expert] else relief_E[expert])
    return most


@numba.njit(error_model="numpy", cache=CACHE)
def _best_comer(  # size: one loop, see the module
    state: LayerState, busiest: int, slot: int, harm: float, least: float
) -> tuple[int, float]:
    """The best expert for a slot, if it beats a fall per slot: one of the busiest rank, or any if the slot is there; else (-1, that).

    The fall is what the ranks above the waterline of the new expert lose (`relief_E`), less what those of the old one
    gain (`harm`), and what changes on the slot's own rank; only where both have another rank in common it is summed anew.
    """
    load_RT, load_ET, waterline, row_P = state.load_RT, state.load_ET, state.waterline, state.row_P
    count_E, on_RE, live_RE, relief_E, splits_E = (
        state.count_E,
        state.on_RE,
        state.live_RE,
        state.relief_E,
        state.splits_E,
    )
    node_E, node_R, ceiling_E = state.node_E, state.node_R, state.ceiling_E
    width, held = row_P.shape[0] // load_RT.shape[0], row_P[slot]
    rank, count = slot // width, count_E[held]
    # what stays on the slot's rank whichever expert comes: no load is negative
    gives, stays = -1.0 / count, 0.0
    for window in range(load_RT.shape[1]):
        over = max(load_RT[rank, window] + gives * load_ET[held, window] - waterline, 0.0)
        stays += over * (STEEP + over)
    base, merges = state.above_R[rank] - harm, state.split_E[held] / (count * (count - 1))
    weight = 1.0 if live_RE[rank, held] else 1.0 / LEAST_COST
    if rank == busiest and _work_out_ceilings(state, slot, (base, merges, weight, stays)) <= least:
        return -1, least
    best_expert, best = -1, least
    for place in range(relief_E.shape[0] if rank == busiest else width):
        if rank == busiest and ceiling_E[place] <= best:
            continue
        expert = place if rank == busiest else row_P[busiest * width + place]
        gain, fewer = relief_E[expert] + base, splits_E[expert] - merges
        worth = 1.0 / LEAST_COST if live_RE[rank, expert] else weight
        if min(max(gain + fewer, LEAST_FAVOUR * gain), MOST_FAVOUR * gain) * worth <= ENOUGH * best:
            continue
        if gain <= LEAST_GAIN or on_RE[rank, expert] or node_E[expert] != node_R[rank]:
            continue
        if _meet(state, held, expert, rank):
            gain = replace_gain(state, slot, expert)
        else:
            most = gain - stays
            if min(max(most + fewer, LEAST_FAVOUR * most), MOST_FAVOUR * most) * worth <= best:
                continue
            gain -= above(load_RT, load_ET, waterline, rank, expert, 1.0 / (count_E[expert] + 1), held, gives)
        rate = min(max(gain + fewer, LEAST_FAVOUR * gain), MOST_FAVOUR * gain) * worth
        if gain > LEAST_GAIN and rate > best:
            best_expert, best = expert, rate
    return best_expert, best


@numba.njit(error_model="numpy", cache=CACHE)
def _work_out_ceilings(state: LayerState, slot: int, values: tuple[float, float, float, float]) -> float:
    """Work out `ceiling_E`, what each expert can bring at most in a slot, per slot filled anew, and the highest of these.

    What is left on the rank over the windows is at least so many times what a window with their mean load would have, since
    that is convex; with one window it is just that.
    """
    load_RT, row_P, count_E = state.load_RT, state.row_P, state.count_E
    on_RE, host_EK, relief_E, splits_E = state.on_RE, state.host_EK, state.relief_E, state.splits_E
    base, merges, weight, stays = values
    width, held, num_windows = row_P.shape[0] // load_RT.shape[0], row_P[slot], load_RT.shape[1]
    rank, mean, each = slot // width, -state.mean_E[held] / count_E[held], 1.0 / num_windows
    for window in range(num_windows):
        mean += load_RT[rank, window] * each
    bound = (base, merges, weight, stays, mean, state.waterline, float(num_windows))
    on_E, live_E = on_RE[rank], state.live_RE[rank]
    highest = _ceilings(relief_E, splits_E, state.share_E, live_E, on_E, bound, state.ceiling_E)
    # where both have another rank in common the fall is more than relief less harm: no ceiling but these alone
    for copy in range(count_E[held]):
        host = host_EK[held, copy]
        for place in range(host * width, host * width + (width if host != rank else 0)):
            expert = row_P[place]
            if on_E[expert]:
                continue
            gain = relief_E[expert] + base
            rate = min(max(gain + (splits_E[expert] - merges), LEAST_FAVOUR * gain), MOST_FAVOUR * gain)
            state.ceiling_E[expert] = rate * (1.0 / LEAST_COST if live_E[expert] else weight)
            highest = max(highest, state.ceiling_E[expert])
    return highest


@numba.njit(error_model="numpy", cache=CACHE, fastmath={"nnan", "nsz"})
def _ceilings(  # size: plain arrays, of which LLVM makes vector instructions
    relief_E: FloatArray,
    splits_E: FloatArray,
    share_E: FloatArray,
    live_E: BoolArray,
    on_E: BoolArray,
    values: tuple[float, float, float, float, float, float, float],
    ceiling_E: FloatArray,
) -> float:
    """See `_work_out_ceilings`."""
    base, merges, weight, stays, mean, waterline, windows = values
    highest = -np.inf
    for expert in range(relief_E.shape[0]):
        load = mean + share_E[expert]
        over = max(load - waterline, 0.0)
        gain = relief_E[expert] + base
        gain -= max(stays, windows * (over * (STEEP + over) + EVEN * (load - 1.0) * (load - 1.0)))
        rate = min(max(gain + (splits_E[expert] - merges), LEAST_FAVOUR * gain), MOST_FAVOUR * gain)
        rate *= 1.0 / LEAST_COST if live_E[expert] else weight
        rate = -1.0 if on_E[expert] else rate
        ceiling_E[expert] = rate
        highest = max(highest, rate)
    return highest


@numba.njit(error_model="numpy", cache=CACHE, inline="always")
def _meet(state: LayerState, one: int, other: int, but: int) -> bool:
    """Whether two experts are together on a rank, but that one."""
    for copy in range(state.count_E[one]):
        host = state.host_EK[one, copy]
        if host != but and state.on_RE[host, other]:
            return True
    return False


@numba.njit(error_model="numpy", cache=CACHE)
def replace_gain(state: LayerState, slot: int, expert: int) -> float:
    """Fall of the potential if a slot goes to an expert: its ranks get less, those of the expert in the slot get more.

    Loads [[1.6], [0.2], [0.2]] in slots [0, 1 | 2, 1], waterline 1: rank 0 has 1.7, rank 1 0.3. With expert 0 in slot 3
    both have 1: the fall is all of the potential, 0.7 * (0.5 + 0.7) + 2 * 0.01 * 0.49 = 0.8498.
    """
    load_RT, load_ET, waterline, row_P = state.load_RT, state.load_ET, state.waterline, state.row_P
    count_E, host_EK, on_RE, above_R = state.count_E, state.host_EK, state.on_RE, state.above_R
    held, rank = row_P[slot], slot // (row_P.shape[0] // load_RT.shape[0])
    count, held_count = count_E[expert], count_E[held]
    less, more = 1.0 / (count + 1) - 1.0 / count, 1.0 / (held_count - 1) - 1.0 / held_count
    gain = above_R[rank]
    gain -= above(load_RT, load_ET, waterline, rank, expert, 1.0 / (count + 1), held, -1.0 / held_count)
    for copy in range(count):
        host = host_EK[expert, copy]
        also = more if on_RE[host, held] else 0.0
        gain += above_R[host] - above(load_RT, load_ET, waterline, host, expert, less, held, also)
    for copy in range(held_count):
        host = host_EK[held, copy]
        if host != rank and not on_RE[host, expert]:
            gain += above_R[host] - above(load_RT, load_ET, waterline, host, held, more, held, 0.0)
    return float(gain)


@numba.njit(error_model="numpy", cache=CACHE)
def best_swap(state: LayerState, busiest: int, least: float) -> tuple[int, int, float]:
    """The best swap of an expert of a rank with one of a cool rank, if it beats a fall per slot; else (-1, -1, that).

    A swap lowers the rank's potential by at most slope * (load that leaves), because the potential is convex, and both
    ranks' by at most all of it: most swaps are out before the exact sums over the windows.
    """
    load_RT, load_ET, waterline, row_P = state.load_RT, state.load_ET, state.waterline, state.row_P
    count_E, on_RE, live_RE, slopes_2S = state.count_E, state.on_RE, state.live_RE, state.slopes_2S
    above_R, node_E, node_R, costs_S = state.above_R, state.node_E, state.node_R, state.costs_S
    width = row_P.shape[0] // load_RT.shape[0]
    _slopes(state, busiest, slopes_2S[0])
    best_first, best_second, best = -1, -1, least
    for rank in state.cool_C:
        both = above_R[busiest] + above_R[rank]
        _slopes(state, rank, slopes_2S[1])
        coldest, cheapest = np.inf, 1
        for place in range(width):
            expert = row_P[rank * width + place]
            costs_S[place] = int(live_RE[rank, expert]) - int(live_RE[busiest, expert])
            if on_RE[busiest, expert] or node_E[expert] != node_R[busiest]:
                slopes_2S[1, place] = np.inf
                continue
            cheapest = min(cheapest, costs_S[place])
            coldest = min(coldest, slopes_2S[1, place])
        for first in range(width):
            one = row_P[busiest * width + first]
            away = int(live_RE[busiest, one]) - int(live_RE[rank, one])
            bar = ENOUGH * best * max(1.0 * (away + cheapest), LEAST_COST)
            if slopes_2S[0, first] - coldest <= max(bar, LEAST_GAIN) or both <= bar:
                continue
            if on_RE[rank, one] or node_E[one] != node_R[rank]:
                continue
            part = 1.0 / count_E[one]
            for second in range(width):
                leaves = min(slopes_2S[0, first] - slopes_2S[1, second], both)
                cost = max(1.0 * (away + costs_S[second]), LEAST_COST)
                if leaves <= ENOUGH * best * cost or leaves <= LEAST_GAIN:
                    continue
                two = row_P[rank * width + second]
                other = 1.0 / count_E[two]
                here, there = 0.0, 0.0
                for window in range(load_RT.shape[1]):
                    change = other * load_ET[two, window] - part * load_ET[one, window]
                    load = load_RT[busiest, window] + change
                    over = max(load - waterline, 0.0)
                    here += over * (STEEP + over) + EVEN * (load - 1.0) * (load - 1.0)
                    load = load_RT[rank, window] - change
                    over = max(load - waterline, 0.0)
                    there += over * (STEEP + over) + EVEN * (load - 1.0) * (load - 1.0)
                gain = both - here - there
                if gain > LEAST_GAIN and gain > best * cost:
                    best_first, best_second, best = busiest * width + first, rank * width + second, gain / cost
    return best_first, best_second, best


@numba.njit(error_model="numpy", cache=CACHE, inline="always")
def _slopes(state: LayerState, rank: int, slopes_S: FloatArray) -> None:
    """What taking each expert's load from a rank would bring the busiest at most: its load times the slope, over the windows."""
    load_ET, slope_T, row_P, count_E = state.load_ET, state.slope_T, state.row_P, state.count_E
    width = slopes_S.shape[0]
    for place in range(width):
        expert, slope = row_P[rank * width + place], 0.0
        for window in range(slope_T.shape[0]):
            slope += slope_T[window] * load_ET[expert, window]
        slopes_S[place] = slope / count_E[expert]

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

from eplb_async.policies._frontier_state import EVEN, STEEP, LayerState, mean_peak, take_step
from eplb_async.policies._frontier_steps import best_replace
from eplb_async.policies._frontier_swaps import best_swap
from eplb_async.policies._kernels import CACHE

__all__ = ["search"]

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

CLEARS = 0.45
"""Part of a rank's potential, per slot filled anew, that ends the look for a step where moves are free: a swap is two."""


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
    row_P, live_RE = state.row_P, state.live_RE
    width = row_P.shape[0] // state.node_R.shape[0]
    _coolest(state, busiest)
    first, second, slot, expert, rate = -1, -1, -1, -1, 0.0
    if free:
        first, second, rate = best_swap(state, busiest, 0.0)
    if rate < CLEARS * state.above_R[busiest]:
        slot, expert, rate = best_replace(state, busiest, rate)
    if not free:
        first, second, rate = best_swap(state, busiest, rate)
    if first >= 0 and (slot < 0 or not free):
        one, two, other = row_P[first], row_P[second], second // width
        cost = int(live_RE[busiest, one]) + int(live_RE[other, two])
        cost -= int(live_RE[busiest, two]) + int(live_RE[other, one])
        return first, two, second, one, cost
    if slot >= 0:
        rank = slot // width
        return slot, expert, -1, -1, int(live_RE[rank, row_P[slot]]) - int(live_RE[rank, expert])
    return -1, -1, -1, -1, 0


@numba.njit(error_model="numpy", cache=CACHE)
def _coolest(state: LayerState, busiest: int) -> None:
    """Work out `slope_T`, a rank's potential's slope in each window, and `cool_C`, ranks with least load where it is steep, coolest first."""
    load_RT, waterline, slope_T, cool_C, heat_C = (
        state.load_RT,
        state.waterline,
        state.slope_T,
        state.cool_C,
        state.heat_C,
    )
    for window in range(slope_T.shape[0]):
        over = max(load_RT[busiest, window] - waterline, 0.0)
        slope_T[window] = 2.0 * EVEN * (load_RT[busiest, window] - 1.0) + (STEEP + 2.0 * over if over > 0.0 else 0.0)
    heat_C[:] = np.inf
    for rank in range(load_RT.shape[0]):
        heat, place = 0.0, cool_C.shape[0]
        for window in range(slope_T.shape[0]):
            heat += slope_T[window] * load_RT[rank, window]
        if rank == busiest or place == 0 or heat >= heat_C[place - 1]:
            continue
        while place > 0 and heat < heat_C[place - 1]:
            place -= 1
            if place + 1 < cool_C.shape[0]:
                cool_C[place + 1], heat_C[place + 1] = cool_C[place], heat_C[place]
        cool_C[place], heat_C[place] = rank, heat

"""What each expert could bring to a slot at most, in the search of the `frontier` policy, compiled by numba (see `_frontier`).

One pass over all experts for a slot, of which LLVM makes vector instructions: arithmetic on plain arrays of doubles, without looking
at arrays of bools, and the greatest of doubles taken by their bits. What that leaves out is put right for the few experts that it concerns.

Shape suffixes: T windows, E experts, P slots, S slots per rank.
"""

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._frontier_state import EVEN, LEAST_COST, LEAST_FAVOUR, MOST_FAVOUR, STEEP, LayerState
from eplb_async.policies._kernels import CACHE

__all__ = ["Leaving", "expert_with", "favoured", "highest_of", "leaving_slot", "others_than", "work_out_ceilings"]

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]


class Leaving(NamedTuple):
    """A slot whose expert is to go, whoever comes.

    Fields:
        slot, rank, held: the slot, its rank, and the expert in it.
        base: potential of the rank, less what the other ranks of the expert get more (`harm`).
        harm: see base.
        merges: what one replica fewer adds to the expert's `split_E` / replicas.
        gives: -1 / its replicas.
        stays: of the rank's potential, what is left above the waterline when the expert is gone: no load is negative.
        weight: what a fall counts for, per slot filled anew, if a new expert comes to the rank.
    """

    slot: int
    rank: int
    held: int
    base: float
    harm: float
    merges: float
    gives: float
    stays: float
    weight: float


@numba.njit(error_model="numpy", cache=CACHE, inline="always")
def leaving_slot(state: LayerState, slot: int, rank: int, harm: float) -> Leaving:
    """What is the same for all experts that may come to a slot, whose own would do so much harm elsewhere.

    Loads [[1.6], [0.2], [0.2]] in slots [0, 1 | 2, 1], waterline 1: expert 1 leaves rank 1 (load 0.3) with 0.2, nothing of it above the
    waterline, and costs rank 0 0.8 * 1.3 - 0.7 * 1.2 + 0.01 * (0.64 - 0.49) = 0.2015: base is 0.01 * 0.49 - 0.2015 = -0.1966.
    """
    load_RT, load_ET, held = state.load_RT, state.load_ET, state.row_P[slot]
    count = state.count_E[held]
    gives, stays = -1.0 / count, 0.0
    for window in range(load_RT.shape[1]):
        over = max(load_RT[rank, window] + gives * load_ET[held, window] - state.waterline, 0.0)
        stays += over * (STEEP + over)
    base, merges = state.above_R[rank] - harm, state.split_E[held] / (count * (count - 1))
    weight = 1.0 if state.live_RE[rank, held] else 1.0 / LEAST_COST
    return Leaving(slot, rank, held, base, harm, merges, gives, stays, weight)


@numba.njit(error_model="numpy", cache=CACHE, inline="always")
def favoured(gain: float, fewer: float) -> float:
    """A fall that counts for more, or less, for splitting hotter, or colder, experts than are merged: by `fewer`, within bounds."""
    return min(max(gain + fewer, LEAST_FAVOUR * gain), MOST_FAVOUR * gain)


@numba.njit(error_model="numpy", cache=CACHE)
def others_than(row_S: IntArray, relief_E: FloatArray, others_E: FloatArray) -> float:
    """Copy reliefs without those of a rank's experts, and return the greatest, or 0.

    Reliefs [0.5, 0.2, 0.3] on a rank with expert 0: [-inf, 0.2, 0.3] and 0.3.
    """
    for expert in range(relief_E.shape[0]):
        others_E[expert] = relief_E[expert]
    for place in range(row_S.shape[0]):
        others_E[row_S[place]] = -np.inf
    return highest_of(others_E)


@numba.njit(error_model="numpy", cache=CACHE)
def highest_of(value_E: FloatArray) -> float:
    """The greatest of these values, or 0 if none is greater. [-3, 0.5, -inf]: 0.5.

    Doubles above 0 are in the order of their bits as integers, and those below 0 are negative as integers, too. For integers
    LLVM makes vector instructions of the loop, for doubles it does not.
    """
    bits_E, highest = value_E.view(np.int64), np.int64(0)
    for expert in range(bits_E.shape[0]):
        highest = max(highest, bits_E[expert])
    return float(np.int64(highest).view(np.float64))


@numba.njit(error_model="numpy", cache=CACHE)
def expert_with(value_E: FloatArray, value: float) -> int:
    """The first expert with this value, which there is."""
    expert = 0
    while value_E[expert] != value:
        expert += 1
    return expert


@numba.njit(error_model="numpy", cache=CACHE, inline="always")
def work_out_ceilings(state: LayerState, leaving: Leaving) -> float:
    """Work out `ceiling_E`, what each expert can bring at most in a slot of the rank that is to be relieved, and return the highest.

    Per slot filled anew. What is left on the rank over the windows is at least so many times what a window with their mean load would
    have, since that is convex; with one window it is just that. `others_E` is up to date.
    """
    load_RT, row_P, live_P, count_E = state.load_RT, state.row_P, state.live_P, state.count_E
    on_RE, live_RE, host_EK, others_E = state.on_RE, state.live_RE, state.host_EK, state.others_E
    splits_E, share_E, ceiling_E = state.splits_E, state.share_E, state.ceiling_E
    width, num_windows = row_P.shape[0] // load_RT.shape[0], load_RT.shape[1]
    rank, held = leaving.rank, leaving.held
    mean, each = leaving.gives * state.mean_E[held], 1.0 / num_windows
    for window in range(num_windows):
        mean += load_RT[rank, window] * each
    bound = (leaving.base, leaving.merges, leaving.stays, leaving.weight, mean, state.waterline, float(num_windows))
    _ceilings(others_E, splits_E, share_E, bound, ceiling_E)
    if leaving.weight < 1.0 / LEAST_COST:
        for place in range(rank * width, rank * width + width):
            expert = live_P[place]
            if expert >= 0 and not on_RE[rank, expert]:
                ceiling_E[expert] = _ceiling(others_E[expert], splits_E[expert], share_E[expert], bound) / LEAST_COST
    # where both have other ranks in common the fall is more than relief less harm: by the harm at most, and what even ranks are worth
    also = leaving.harm + (count_E[held] - 1) * num_windows * EVEN
    for copy in range(count_E[held]):
        host = host_EK[held, copy]
        for place in range(host * width, host * width + (width if host != rank else 0)):
            expert = row_P[place]
            ceiling = _ceiling(others_E[expert] + also, splits_E[expert], share_E[expert], bound)
            ceiling_E[expert] = ceiling / (leaving.weight * LEAST_COST) if live_RE[rank, expert] else ceiling
    return highest_of(ceiling_E)


@numba.njit(error_model="numpy", cache=CACHE, inline="always")
def _ceiling(
    relief: float, splits: float, share: float, bound: tuple[float, float, float, float, float, float, float]
) -> float:
    """See `work_out_ceilings`. Minus infinity for an expert that may get no slot."""
    base, merges, stays, weight, mean, waterline, windows = bound
    load = mean + share
    over = max(load - waterline, 0.0)
    left = max(stays, windows * (over * (STEEP + over) + EVEN * (load - 1.0) * (load - 1.0)))
    return favoured(relief + base - left, splits - merges) * weight


@numba.njit(error_model="numpy", cache=CACHE, fastmath={"nnan", "nsz"})
def _ceilings(
    relief_E: FloatArray,
    splits_E: FloatArray,
    share_E: FloatArray,
    bound: tuple[float, float, float, float, float, float, float],
    ceiling_E: FloatArray,
) -> None:
    """`_ceiling` of all experts."""
    for expert in range(relief_E.shape[0]):
        ceiling_E[expert] = _ceiling(relief_E[expert], splits_E[expert], share_E[expert], bound)

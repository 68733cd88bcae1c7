"""The placement of one layer while the `frontier` policy searches (see `_frontier`): its state, its potential, and a step.

Arrays are unpacked from the state at the start of a function, and loops over them are written out: numba passes a state by
value, and taking an array from it inside a loop costs more than the arithmetic. A search gets a state whose references are not counted
(`_borrowed`), and what stands inside of loops is compiled into its callers.

Shape suffixes: T windows, E experts, K most replicas, P slots, R ranks.
"""

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._kernels import CACHE

__all__ = [
    "COOL_RANKS",
    "ENOUGH",
    "EVEN",
    "LEAST_COST",
    "LEAST_FAVOUR",
    "LEAST_GAIN",
    "MOST_FAVOUR",
    "STEEP",
    "LayerState",
    "above",
    "holds",
    "layer_state",
    "mean_peak",
    "refresh_relief",
    "take_step",
]

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

COOL_RANKS = 4
"""Ranks that take part in a step beside the busy one: those with least load in the windows in which it is busy. Twice as many take
half as long again, and move a twentieth less."""
STEEP = 0.5
"""Weight of load above the waterline against its square: either alone costs moves or balance."""
EVEN = 0.01
"""Weight of the preference for even ranks: it saves a tenth of the moves, and decides nothing else."""
ENOUGH = 1.02
"""A step that cannot be so many times better than the best so far is not looked at."""
MOST_FAVOUR, LEAST_FAVOUR = 2.0, 0.5
"""How much more, and less, the fall of a replace counts for splitting hotter, or colder, experts than it merges."""
LEAST_GAIN = 1e-9
"""Falls of the potential below this are rounding."""
LEAST_COST = 0.25
"""What a step that fills no slot anew is charged."""


class LayerState(NamedTuple):
    """One layer's placement and what follows from it. Steps change the arrays in place.

    Fields:
        load_ET: load of each expert in each window.
        row_P: expert of each slot: no slot empty, no expert twice on a rank.
        count_E: replicas of each expert.
        host_EK: ranks that hold each expert; the first count_E of each row.
        live_P: expert of each slot in the live placement; -1 is an empty one.
        on_RE, live_RE: which rank holds which expert, now and in the live placement.
        load_RT: load of each rank in each window.
        above_R: potential of each rank.
        node_E, node_R: an expert may only be on ranks of its node.
        split_E: spread times the square of each expert's load, summed over windows.
        over_R: which ranks are above the waterline in some window.
        relief_E: what one more replica of each expert would take off the potential of those of its ranks; minus infinity where it may get none.
        splits_E: what one more replica takes off each expert's `split_E` / replicas.
        mean_E: mean load of each expert over windows.
        share_E: the part of it that one more replica would get.
        stale_R: ranks whose load changed since `relief_E`, `splits_E` and `share_E` were worked out.
        slope_T, cool_C, heat_C: scratch: of the rank that is to be relieved, see `_frontier._coolest`.
        others_E: scratch: `relief_E`, minus infinity for the experts of the rank that is to be relieved.
        ceiling_E, slopes_2S, costs_S: scratch: bounds for the experts of a slot, and of two ranks.
        waterline: see `_frontier`.
    """

    load_ET: FloatArray
    row_P: IntArray
    live_P: IntArray
    count_E: LongArray
    host_EK: LongArray
    on_RE: BoolArray
    live_RE: BoolArray
    load_RT: FloatArray
    above_R: FloatArray
    node_E: LongArray
    node_R: LongArray
    split_E: FloatArray
    over_R: BoolArray
    relief_E: FloatArray
    splits_E: FloatArray
    mean_E: FloatArray
    share_E: FloatArray
    stale_R: BoolArray
    slope_T: FloatArray
    cool_C: LongArray
    heat_C: FloatArray
    others_E: FloatArray
    ceiling_E: FloatArray
    slopes_2S: FloatArray
    costs_S: LongArray
    waterline: float


@numba.njit(error_model="numpy", cache=CACHE, inline="always")
def above(  # size: inlined into loops
    load_RT: FloatArray,
    load_ET: FloatArray,
    waterline: float,
    rank: int,
    first: int,
    gets: float,
    second: int,
    gives: float,
) -> float:
    """Potential of a rank if it had `gets` times the load of one expert and `gives` times that of a second one more.

    Load 1.5, waterline 1.25, expert loads 2 and 4, which it has -0.5 and 0.25 times more of: load 1.5, over 0.25,
    potential 0.25 * (0.5 + 0.25) + 0.01 * 0.25 = 0.19.
    """
    total = 0.0
    for window in range(load_RT.shape[1]):
        load = load_RT[rank, window] + gets * load_ET[first, window] + gives * load_ET[second, window]
        over = max(load - waterline, 0.0)
        total += over * (STEEP + over) + EVEN * (load - 1.0) * (load - 1.0)
    return total


@numba.njit(error_model="numpy", cache=CACHE)
def layer_state(  # size: what a layer's state is made of
    load_ET: FloatArray,
    row_P: IntArray,
    live_P: IntArray,
    node_E: LongArray,
    node_R: LongArray,
    most_replicas: int,
    waterline: float,
    spread: float,
) -> LayerState:
    """The state of a placement without empty slots and without an expert twice on a rank; steps change `row_P`.

    Loads [[1.5], [0.5]] in slots [0, 1 | 0, 1] on 2 ranks: both ranks have 1.
    """
    num_experts, num_windows = load_ET.shape
    num_ranks = node_R.shape[0]
    width = row_P.shape[0] // num_ranks
    count_E = np.zeros(num_experts, dtype=np.int64)
    host_EK = np.full((num_experts, most_replicas), -1, dtype=np.int64)
    for slot in range(row_P.shape[0]):
        expert = row_P[slot]
        host_EK[expert, count_E[expert]] = slot // width
        count_E[expert] += 1
    load_RT = np.zeros((num_ranks, num_windows))
    for slot in range(row_P.shape[0]):
        expert, rank = row_P[slot], slot // width
        for window in range(num_windows):
            load_RT[rank, window] += load_ET[expert, window] / count_E[expert]
    above_R, over_R = np.empty(num_ranks), np.zeros(num_ranks, dtype=np.bool_)
    for rank in range(num_ranks):
        above_R[rank] = above(load_RT, load_ET, waterline, rank, 0, 0.0, 0, 0.0)
        for window in range(num_windows):
            over_R[rank] |= load_RT[rank, window] > waterline
    split_E, mean_E = np.zeros(num_experts), np.zeros(num_experts)
    for expert in range(num_experts):
        for window in range(num_windows):
            split_E[expert] += spread * load_ET[expert, window] * load_ET[expert, window]
            mean_E[expert] += load_ET[expert, window]
        mean_E[expert] /= num_windows
    return LayerState(
        load_ET,
        row_P,
        live_P,
        count_E,
        host_EK,
        holds(row_P, num_experts, num_ranks),
        holds(live_P, num_experts, num_ranks),
        load_RT,
        above_R,
        node_E,
        node_R,
        split_E,
        over_R,
        np.zeros(num_experts),
        np.zeros(num_experts),
        mean_E,
        np.zeros(num_experts),
        np.ones(num_ranks, dtype=np.bool_),
        np.zeros(num_windows),
        np.zeros(min(COOL_RANKS, num_ranks - 1), dtype=np.int64),
        np.zeros(min(COOL_RANKS, num_ranks - 1)),
        np.zeros(num_experts),
        np.zeros(num_experts),
        np.zeros((2, width)),
        np.zeros(width, dtype=np.int64),
        waterline,
    )


@numba.njit(error_model="numpy", cache=CACHE)
def holds(row_P: IntArray, num_experts: int, num_ranks: int) -> BoolArray:
    """Which rank holds which expert; slots with -1 are empty. bool [R, E]."""
    holds_RE = np.zeros((num_ranks, num_experts), dtype=np.bool_)
    width = row_P.shape[0] // num_ranks
    for slot in range(row_P.shape[0]):
        if row_P[slot] >= 0:
            holds_RE[slot // width, row_P[slot]] = True
    return holds_RE


@numba.njit(error_model="numpy", cache=CACHE)
def refresh_relief(state: LayerState) -> None:
    """Bring `relief_E`, `splits_E` and `share_E` up to date: for the experts of ranks whose load changed, which all that steps moved are on.

    Loads [[1.5], [0.5]] in slots [0 | 1] on 2 ranks, waterline 1: half of expert 0 leaves rank 0 with 0.75, which is
    0.5 * (0.5 + 0.5) + 0.01 * 0.25 = 0.5025 before and 0.01 * 0.0625 = 0.000625 after: [0.501875, 0].
    """
    load_RT, load_ET, waterline, row_P = state.load_RT, state.load_ET, state.waterline, state.row_P
    count_E, host_EK, above_R = state.count_E, state.host_EK, state.above_R
    over_R, relief_E, stale_R = state.over_R, state.relief_E, state.stale_R
    split_E, splits_E, mean_E, share_E = state.split_E, state.splits_E, state.mean_E, state.share_E
    most, num_ranks = host_EK.shape[1], load_RT.shape[0]
    width = row_P.shape[0] // num_ranks
    for rank in range(num_ranks):
        if not stale_R[rank]:
            continue
        stale_R[rank] = False
        for slot in range(rank * width, (rank + 1) * width):
            expert, relief = row_P[slot], 0.0
            count = count_E[expert]
            for copy in range(count if count < most else 0):
                host = host_EK[expert, copy]
                if over_R[host]:
                    less = 1.0 / (count + 1) - 1.0 / count
                    relief += above_R[host] - above(load_RT, load_ET, waterline, host, expert, less, expert, 0.0)
            relief_E[expert] = relief if count < most else -np.inf
            share_E[expert] = mean_E[expert] / (count + 1)
            splits_E[expert] = split_E[expert] / (count * (count + 1))


@numba.njit(error_model="numpy", cache=CACHE)
def mean_peak(load_RT: FloatArray) -> float:
    """Mean over windows of the busiest rank's load: the PAR. Loads [[1.5, 1], [0.5, 1]]: 1.25."""
    total = 0.0
    for window in range(load_RT.shape[1]):
        peak = 0.0
        for rank in range(load_RT.shape[0]):
            peak = max(peak, load_RT[rank, window])
        total += peak
    return float(total / load_RT.shape[1])


@numba.njit(error_model="numpy", cache=CACHE)
def take_step(state: LayerState, first: int, expert: int, second: int) -> None:
    """Put an expert into a slot, and what was there into the second slot (-1: nowhere), and change the state accordingly.

    Slots [0, 1 | 2, 3]: take_step(state, 0, 3, 3) gives [3, 1 | 2, 0].
    """
    row_P, count_E, host_EK, on_RE = state.row_P, state.count_E, state.host_EK, state.on_RE
    width = row_P.shape[0] // state.node_R.shape[0]
    held, rank = row_P[first], first // width
    count, held_count = count_E[expert], count_E[held]
    if second >= 0:
        other = second // width
        _shift(state, rank, held, -1.0 / held_count, expert, 1.0 / count)
        _shift(state, other, held, 1.0 / held_count, expert, -1.0 / count)
        host_EK[held, _copy_on(host_EK[held], rank)] = other
        host_EK[expert, _copy_on(host_EK[expert], other)] = rank
        on_RE[rank, held], on_RE[other, held] = False, True
        on_RE[other, expert], on_RE[rank, expert] = False, True
        row_P[second] = held
    else:
        for copy in range(count):
            _shift(state, host_EK[expert, copy], expert, 1.0 / (count + 1) - 1.0 / count, expert, 0.0)
        for copy in range(held_count):
            if host_EK[held, copy] != rank:
                _shift(state, host_EK[held, copy], held, 1.0 / (held_count - 1) - 1.0 / held_count, held, 0.0)
        _shift(state, rank, held, -1.0 / held_count, expert, 1.0 / (count + 1))
        host_EK[held, _copy_on(host_EK[held], rank)] = host_EK[held, held_count - 1]
        host_EK[held, held_count - 1] = -1
        host_EK[expert, count] = rank
        on_RE[rank, held], on_RE[rank, expert] = False, True
        count_E[held] -= 1
        count_E[expert] += 1
    row_P[first] = expert


@numba.njit(error_model="numpy", cache=CACHE)
def _shift(state: LayerState, rank: int, first: int, gets: float, second: int, gives: float) -> None:
    """Add parts of two experts' loads to a rank."""
    load_RT, load_ET, waterline = state.load_RT, state.load_ET, state.waterline
    over = False
    for window in range(load_RT.shape[1]):
        load_RT[rank, window] += gets * load_ET[first, window] + gives * load_ET[second, window]
        over |= load_RT[rank, window] > waterline
    state.above_R[rank] = above(load_RT, load_ET, waterline, rank, first, 0.0, second, 0.0)
    state.over_R[rank], state.stale_R[rank] = over, True


@numba.njit(error_model="numpy", cache=CACHE)
def _copy_on(host_K: LongArray, rank: int) -> int:
    """Index of a rank among an expert's hosts, which it is one of."""
    copy = 0
    while host_K[copy] != rank:
        copy += 1
    return copy

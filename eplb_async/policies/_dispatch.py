"""The loops that fit dispatch tables to a placement and to windows of load, compiled by numba: one layer at a time, one thread.

A place is a rank on which an expert has slots; a split expert has at least two of them, and a choice: its share at a place
goes from c / K (each of its c slots there stands once in a dispatch row of K entries) to what the other places leave. All
other experts are spread evenly. Suffixes besides those of the project: X split experts, Q places of all of them, in the
order of the experts, Z their slots in the same order; J places or slots of one.

    _dispatch_descent.py    shares of least peak
    _dispatch_rounding.py   dispatch rows for shares

Every function has a plain twin in tests/policies/dispatch_twins.py, or is checked against its definition in the tests.
Importing this module imports numba.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._dispatch_descent import GAP, even_out, flatten_peaks, mean_peak, peak_bound
from eplb_async.policies._dispatch_rounding import round_shares
from eplb_async.policies._kernels import CACHE

__all__ = ["fit_layers", "split_experts"]

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

ROUNDING_SWEEPS = 2
"""More bring hardly anything."""


@numba.njit(error_model="numpy", cache=CACHE)
def fit_layers(  # size: a kernel takes scalars
    windows_TLE: FloatArray,
    slot_to_expert_LP: IntArray,
    num_ranks: int,
    table_length: int,
    strength: float,
    rounded: bool,
) -> tuple[FloatArray, IntArray, FloatArray]:
    """Shares and dispatch entries of all layers.

    One window of load [8, 4] on slots [0, 1, 0, -1] of 2 ranks, K = 4: even shares give the ranks 8 and 4. The fit sends a
    quarter of expert 0 to slot 0 and the rest to slot 2: 6 and 6, entries [1, 1, 3, 0].

    Args:
        windows_TLE: tokens, finite and >= 0.
        slot_to_expert_LP: a valid placement.
        num_ranks: R.
        table_length: K, at least the slots of any expert.
        strength: 0 keeps the even split, 1 takes the fitted one; between them a mixture.
        rounded: False leaves the shares as fitted, which tests look at; the entries are 1 then.

    Returns:
        The share of its expert's tokens that each slot gets, [L, P], 0 for an empty slot; how often each slot stands in its
        expert's dispatch row, int32 [L, P]; a lower bound, for any shares, on the busiest rank's tokens, mean over windows, [L].
        A layer whose shares do not lower the mean peak of the windows is spread evenly, with entries of 1.
    """
    num_windows, num_layers, num_experts = windows_TLE.shape
    num_slots = slot_to_expert_LP.shape[1]
    share_LP = np.zeros((num_layers, num_slots), dtype=np.float64)
    entries_LP = np.zeros((num_layers, num_slots), dtype=np.int32)
    bound_L = np.zeros(num_layers, dtype=np.float64)
    load_ET = np.empty((num_experts, num_windows), dtype=np.float64)
    for layer in range(num_layers):
        row_P, share_P, entries_P = slot_to_expert_LP[layer], share_LP[layer], entries_LP[layer]
        count_E = _even_shares(row_P, num_experts, share_P, entries_P)
        mean = 0.0
        for window in range(num_windows):
            for expert in range(num_experts):
                mean += windows_TLE[window, layer, expert]
        mean /= num_windows * num_ranks
        if mean == 0.0:
            continue
        # in units of the mean rank load, so that neither squares nor 8th powers overflow
        for expert in range(num_experts):
            for window in range(num_windows):
                load_ET[expert, window] = windows_TLE[window, layer, expert] / mean
        load_RT = _rank_loads(row_P, share_P, load_ET, num_ranks)
        even_peak = mean_peak(load_RT)
        expert_X, first_X, rank_Q, copies_Q = split_experts(row_P, num_experts, num_ranks, table_length)
        bound_L[layer] = even_peak * mean
        if expert_X.shape[0] == 0:
            continue
        load_XT = np.empty((expert_X.shape[0], num_windows), dtype=np.float64)
        low_Q, even_Q = np.empty(rank_Q.shape[0], dtype=np.float64), np.empty(rank_Q.shape[0], dtype=np.float64)
        share_Q = np.empty(rank_Q.shape[0], dtype=np.float64)
        for index in range(expert_X.shape[0]):
            for window in range(num_windows):
                load_XT[index, window] = load_ET[expert_X[index], window]
            for place in range(first_X[index], first_X[index + 1]):
                low_Q[place] = copies_Q[place] / table_length
                share_Q[place] = even_Q[place] = copies_Q[place] / count_E[expert_X[index]]
        even_out(load_XT, first_X, rank_Q, low_Q, share_Q, load_RT)
        if num_windows > 1:
            flatten_peaks(load_XT, first_X, rank_Q, low_Q, share_Q, load_RT)
        bound_L[layer] = peak_bound(load_XT, first_X, rank_Q, low_Q, share_Q, load_RT) * mean
        _blend(load_XT, first_X, (rank_Q, even_Q, share_Q), strength, load_RT)
        if rounded:
            weight_Z = _rounded(load_XT, first_X, (rank_Q, copies_Q, low_Q, share_Q), table_length, load_RT)
        else:
            weight_Z = _slot_shares(copies_Q, share_Q)
        if mean_peak(load_RT) < even_peak * (1.0 - GAP):
            _write_out(row_P, expert_X, weight_Z, share_P, entries_P, rounded)
    return share_LP, entries_LP, bound_L


@numba.njit(error_model="numpy", cache=CACHE)
def split_experts(
    row_P: IntArray, num_experts: int, num_ranks: int, table_length: int
) -> tuple[LongArray, LongArray, LongArray, LongArray]:
    """Experts with slots on several ranks whose dispatch row has room for more than one entry of each slot.

    Row [0, 1, 0, 0, 2, 1] on 3 ranks, K = 4: expert 0 has places on rank 0 (1 slot) and rank 1 (2 slots), expert 1 on ranks
    0 and 2: experts [0, 1], first [0, 2, 4], ranks [0, 1, 0, 2], copies [1, 2, 1, 1]. With K = 3 expert 0 has no choice.

    Returns:
        Their indices int64 [X], ascending; where the places of each begin, int64 [X + 1]; and rank and number of slots of
        each place, ranks ascending, int64 [Q] both.
    """
    num_slots = row_P.shape[0]
    slots_per_rank = num_slots // num_ranks
    slots_E = np.zeros(num_experts, dtype=np.int64)
    places_E = np.zeros(num_experts, dtype=np.int64)
    last_E = np.empty(num_experts, dtype=np.int64)
    for expert in range(num_experts):
        last_E[expert] = -1
    for slot in range(num_slots):
        expert = row_P[slot]
        if expert >= 0:
            slots_E[expert] += 1
            if last_E[expert] != slot // slots_per_rank:
                last_E[expert] = slot // slots_per_rank
                places_E[expert] += 1
    num_split, num_places = 0, 0
    for expert in range(num_experts):
        if places_E[expert] > 1 and slots_E[expert] < table_length:
            num_split += 1
            num_places += places_E[expert]
    expert_X = np.empty(num_split, dtype=np.int64)
    first_X = np.zeros(num_split + 1, dtype=np.int64)
    # where the next place of an expert goes; -1 for one that is not split
    next_E = np.empty(num_experts, dtype=np.int64)
    index = 0
    for expert in range(num_experts):
        next_E[expert] = last_E[expert] = -1
        if places_E[expert] > 1 and slots_E[expert] < table_length:
            expert_X[index] = expert
            next_E[expert] = first_X[index]
            first_X[index + 1] = first_X[index] + places_E[expert]
            index += 1
    rank_Q = np.empty(num_places, dtype=np.int64)
    copies_Q = np.zeros(num_places, dtype=np.int64)
    for slot in range(num_slots):
        expert = row_P[slot]
        if expert >= 0 and next_E[expert] >= 0:
            if last_E[expert] != slot // slots_per_rank:
                last_E[expert] = slot // slots_per_rank
                rank_Q[next_E[expert]] = slot // slots_per_rank
                next_E[expert] += 1
            copies_Q[next_E[expert] - 1] += 1
    return expert_X, first_X, rank_Q, copies_Q


@numba.njit(error_model="numpy", cache=CACHE)
def _even_shares(row_P: IntArray, num_experts: int, share_P: FloatArray, entries_P: IntArray) -> LongArray:
    """Write the even split; slots of each expert, int64 [E]."""
    count_E = np.zeros(num_experts, dtype=np.int64)
    for slot in range(row_P.shape[0]):
        if row_P[slot] >= 0:
            count_E[row_P[slot]] += 1
    for slot in range(row_P.shape[0]):
        if row_P[slot] >= 0:
            share_P[slot] = 1.0 / count_E[row_P[slot]]
            entries_P[slot] = 1
    return count_E


@numba.njit(error_model="numpy", cache=CACHE)
def _rank_loads(row_P: IntArray, share_P: FloatArray, load_ET: FloatArray, num_ranks: int) -> FloatArray:
    """Tokens per rank and window, [R, T]."""
    slots_per_rank = row_P.shape[0] // num_ranks
    load_RT = np.zeros((num_ranks, load_ET.shape[1]), dtype=np.float64)
    for slot in range(row_P.shape[0]):
        if row_P[slot] >= 0:
            for window in range(load_ET.shape[1]):
                load_RT[slot // slots_per_rank, window] += share_P[slot] * load_ET[row_P[slot], window]
    return load_RT


@numba.njit(error_model="numpy", cache=CACHE)
def _blend(
    load_XT: FloatArray,
    first_X: LongArray,
    places: tuple[LongArray, FloatArray, FloatArray],
    strength: float,
    load_RT: FloatArray,
) -> None:
    """Leave shares `strength` of the way from even to fitted; rank loads follow. `places`: ranks, even and fitted shares."""
    rank_Q, even_Q, share_Q = places
    for index in range(load_XT.shape[0]):
        for place in range(first_X[index], first_X[index + 1]):
            change = (1.0 - strength) * (even_Q[place] - share_Q[place])
            share_Q[place] += change
            for window in range(load_XT.shape[1]):
                load_RT[rank_Q[place], window] += change * load_XT[index, window]


@numba.njit(error_model="numpy", cache=CACHE)
def _rounded(
    load_XT: FloatArray,
    first_X: LongArray,
    places: tuple[LongArray, LongArray, FloatArray, FloatArray],
    table_length: int,
    load_RT: FloatArray,
) -> FloatArray:
    """Entries in the dispatch rows, [Z], with and without sweeps: those of lower mean peak; rank loads follow."""
    fitted_RT, rounded_RT = np.empty(load_RT.shape, dtype=np.float64), np.empty(load_RT.shape, dtype=np.float64)
    for rank in range(load_RT.shape[0]):
        for window in range(load_RT.shape[1]):
            fitted_RT[rank, window] = load_RT[rank, window]
    best_Z, best_peak = np.empty(0, dtype=np.float64), np.inf
    # two calls would be compiled twice, once for each constant
    for sweeps in range(0, ROUNDING_SWEEPS + 1, ROUNDING_SWEEPS):
        entries_Z = round_shares(load_XT, first_X, places, table_length, sweeps, (fitted_RT, rounded_RT))
        peak = mean_peak(rounded_RT)
        if peak < best_peak:
            best_Z, best_peak = entries_Z, peak
            for rank in range(load_RT.shape[0]):
                for window in range(load_RT.shape[1]):
                    load_RT[rank, window] = rounded_RT[rank, window]
    return best_Z


@numba.njit(error_model="numpy", cache=CACHE)
def _slot_shares(copies_Q: LongArray, share_Q: FloatArray) -> FloatArray:
    """Shares of the slots of split experts, [Z]: slots of one place share alike."""
    num_slots = 0
    for place in range(copies_Q.shape[0]):
        num_slots += copies_Q[place]
    share_Z, slot = np.empty(num_slots, dtype=np.float64), 0
    for place in range(copies_Q.shape[0]):
        for _ in range(copies_Q[place]):
            share_Z[slot] = share_Q[place] / copies_Q[place]
            slot += 1
    return share_Z


@numba.njit(error_model="numpy", cache=CACHE)
def _write_out(  # size: a kernel takes arrays
    row_P: IntArray, expert_X: LongArray, weight_Z: FloatArray, share_P: FloatArray, entries_P: IntArray, rounded: bool
) -> None:
    """Weights of split experts' slots to shares and, if they are entries, to entries."""
    begin = 0
    for index in range(expert_X.shape[0]):
        slot_Z, total = begin, 0.0
        for slot in range(row_P.shape[0]):
            if row_P[slot] == expert_X[index]:
                total += weight_Z[slot_Z]
                slot_Z += 1
        slot_Z = begin
        for slot in range(row_P.shape[0]):
            if row_P[slot] == expert_X[index]:
                share_P[slot] = weight_Z[slot_Z] / total
                if rounded:
                    entries_P[slot] = int(weight_Z[slot_Z])
                slot_Z += 1
        begin = slot_Z

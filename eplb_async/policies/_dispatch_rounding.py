"""The loops that turn dispatch shares into rows of at most K entries, compiled by numba. Suffixes: see _dispatch.py."""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._dispatch_descent import water_fill
from eplb_async.policies._kernels import CACHE

__all__ = ["round_row", "round_shares", "tables"]

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@numba.njit(error_model="numpy", cache=CACHE)
def round_shares(  # size: most of it is one loop and its state
    load_XT: FloatArray,
    first_X: LongArray,
    places: tuple[LongArray, LongArray, FloatArray, FloatArray],
    table_length: int,
    sweeps: int,
    loads: tuple[FloatArray, FloatArray],
) -> FloatArray:
    """Round the shares of split experts, the one with most tokens first.

    With 0 sweeps each on its own. With more, in each of them every expert is first given the shares that bring the rank
    loads closest (in squares) to the fitted ones, after what rounding the others did, and then rounded: lighter experts make
    up for heavier ones. K = 2 entries can say of two slots only "evenly"; K = 3 also [1/3, 2/3]. Experts of load 6 and 3,
    both at ranks 0 and 1 with shares [0.4, 0.6] (loads 3.6 and 5.4), K = 3: on their own both become [1/3, 2/3], 3 and 6;
    in a sweep the first does too, and then the second even: 3.5 and 5.5.

    Args:
        load_XT, first_X: see _dispatch_descent.even_out.
        places: rank, number of slots, least share, and fitted share of each place, [Q] all.
        table_length: K.
        sweeps: 0 or more.
        loads: rank loads [R, T] with the fitted shares, and those with the rounded ones, which are written.

    Returns:
        How often each slot of the split experts stands in its row, [Z], whole numbers.
    """
    rank_Q, copies_Q, low_Q, fitted_Q = places
    fitted_RT, load_RT = loads
    num_split, num_windows = load_XT.shape
    num_places = rank_Q.shape[0]
    tokens_X, done_X = np.zeros(num_split, dtype=np.float64), np.zeros(num_split, dtype=np.int64)
    for index in range(num_split):
        for window in range(num_windows):
            tokens_X[index] += load_XT[index, window]
    # where the slots of each place begin
    begin_Q, share_Q = np.zeros(num_places + 1, dtype=np.int64), np.empty(num_places, dtype=np.float64)
    for place in range(num_places):
        begin_Q[place + 1] = begin_Q[place] + copies_Q[place]
        share_Q[place] = fitted_Q[place]
    for rank in range(load_RT.shape[0]):
        for window in range(num_windows):
            load_RT[rank, window] = fitted_RT[rank, window]
    entries_Z = np.empty(begin_Q[num_places], dtype=np.float64)
    wanted_J, curvature_J = np.empty(table_length, dtype=np.float64), np.empty(table_length, dtype=np.float64)
    slope_J, slot_J = np.empty(table_length, dtype=np.float64), np.empty(table_length, dtype=np.float64)
    entries_J = np.empty(table_length, dtype=np.int64)
    for sweep in range(1, max(sweeps, 1) + 1):
        for _ in range(num_split):
            heaviest = -1
            for index in range(num_split):
                if done_X[index] < sweep and (heaviest < 0 or tokens_X[index] > tokens_X[heaviest]):
                    heaviest = index
            done_X[heaviest] = sweep
            first, last = first_X[heaviest], first_X[heaviest + 1]
            square = 0.0
            for window in range(num_windows):
                square += load_XT[heaviest, window] * load_XT[heaviest, window]
            for place in range(first, last):
                wanted_J[place - first] = fitted_Q[place]
                curvature_J[place - first] = square
                slope = -square * share_Q[place]
                for window in range(num_windows):
                    excess = load_RT[rank_Q[place], window] - fitted_RT[rank_Q[place], window]
                    slope += load_XT[heaviest, window] * excess
                slope_J[place - first] = slope
            if sweeps > 0 and square > 0.0:
                water_fill(curvature_J, slope_J, low_Q, first, last, wanted_J)
            begin, num_slots, length = begin_Q[first], begin_Q[last] - begin_Q[first], 0
            for place in range(first, last):
                for slot in range(begin_Q[place], begin_Q[place + 1]):
                    slot_J[slot - begin] = wanted_J[place - first] / copies_Q[place]
            round_row(slot_J, num_slots, table_length, entries_J)
            for slot in range(num_slots):
                entries_Z[begin + slot] = entries_J[slot]
                length += entries_J[slot]
            for place in range(first, last):
                rounded = 0
                for slot in range(begin_Q[place], begin_Q[place + 1]):
                    rounded += entries_J[slot - begin]
                change = rounded / length - share_Q[place]
                share_Q[place] = rounded / length
                for window in range(num_windows):
                    load_RT[rank_Q[place], window] += change * load_XT[heaviest, window]
    return entries_Z


@numba.njit(error_model="numpy", cache=CACHE)
def round_row(share_J: FloatArray, num_slots: int, table_length: int, entries_J: LongArray) -> None:
    """How often each slot stands in a dispatch row: core.placement.weighted_dispatch_row in compiled form.

    Shares [2/3, 1/3] and K = 4: [2, 1], exactly. Where every share is at least 1 / K, no rounded share is off by 1 / K or
    more: largest remainders in a row of K entries are not, and the row that is taken has the least largest error.

    Args:
        share_J: wanted shares, positive, with sum 1.
        num_slots: how many there are; the arrays may be longer.
        table_length: K, at least num_slots.
        entries_J: gets the result, each at least 1.
    """
    tried_J = np.empty(num_slots, dtype=np.int64)
    best_error = np.inf
    for length in range(num_slots, table_length + 1):
        total = 0
        for slot in range(num_slots):
            tried_J[slot] = max(int(share_J[slot] * length), 1)
            total += tried_J[slot]
        while total != length:
            chosen, extreme = -1, 0.0
            for slot in range(num_slots):
                gap = share_J[slot] * length - tried_J[slot]
                if total < length:
                    better = chosen < 0 or gap > extreme
                else:
                    better = tried_J[slot] > 1 and (chosen < 0 or gap < extreme)
                if better:
                    chosen, extreme = slot, gap
            step = 1 if total < length else -1
            tried_J[chosen] += step
            total += step
        error = 0.0
        for slot in range(num_slots):
            error = max(error, abs(tried_J[slot] / length - share_J[slot]))
        if error < best_error - 1e-12:
            best_error = error
            for slot in range(num_slots):
                entries_J[slot] = tried_J[slot]


@numba.njit(error_model="numpy", cache=CACHE)
def tables(
    slot_to_expert_LP: IntArray, entries_LP: IntArray, num_experts: int, table_length: int
) -> tuple[IntArray, IntArray]:
    """Dispatch tables from entries. Row [0, 1, 0, -1] with entries [1, 1, 3, 0], K = 4: [[0, 2, 2, 2], [1, -1, -1, -1]].

    Returns:
        int32 [L, E, K], slots ascending, padded with -1, and the lengths of the rows, int32 [L, E].
    """
    num_layers, num_slots = slot_to_expert_LP.shape
    table_LEK = np.empty((num_layers, num_experts, table_length), dtype=np.int32)
    count_LE = np.zeros((num_layers, num_experts), dtype=np.int32)
    for layer in range(num_layers):
        for expert in range(num_experts):
            for entry in range(table_length):
                table_LEK[layer, expert, entry] = -1
        for slot in range(num_slots):
            expert = slot_to_expert_LP[layer, slot]
            if expert >= 0:
                for _ in range(entries_LP[layer, slot]):
                    table_LEK[layer, expert, count_LE[layer, expert]] = slot
                    count_LE[layer, expert] += 1
    return table_LEK, count_LE

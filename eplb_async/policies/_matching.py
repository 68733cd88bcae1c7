"""The loops that fit planned bins to the live placement, compiled by numba (see `_kernels` for what that implies).

    match_ranks   optional: hand the bins to the ranks that hold most of them now
    keep_slots    inside a rank, leave an expert in its slot if it stays

Both keep every bin together, so neither changes the balance.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._kernels import CACHE

__all__ = ["assign", "keep_slots", "match_ranks", "shared_experts"]

IntArray = NDArray[np.int32]
IndexArray = NDArray[np.int64]
FlagArray = NDArray[np.bool_]


@numba.njit(error_model="numpy", cache=CACHE)
def match_ranks(
    planned_LP: IntArray, live_LP: IntArray, num_experts: int, slots_per_rank: int, num_nodes: int
) -> IntArray:
    """Reorder the bins of each layer so that most experts stay on their rank.

    With several nodes the bins of a node stay together: first nodes are matched by the experts they share with a live
    node, then the bins inside each.

    Planned [0, 1 | 2, 3] over live [3, 2 | 0, 5]: [2, 3 | 0, 1], which keeps three experts instead of none.

    Args:
        planned_LP: bins in any order.
        live_LP: the live placement; -1 is an empty slot.
        num_experts: E.
        slots_per_rank: S.
        num_nodes: nodes that were planned one by one (1: bins may go to any rank).

    Returns:
        int32 [L, P].
    """
    num_layers, num_slots = planned_LP.shape
    per_node = num_slots // num_nodes
    matched_LP = np.empty((num_layers, num_slots), dtype=np.int32)
    for layer in range(num_layers):
        first_N, live_M, shared_M = shared_experts(planned_LP[layer], live_LP[layer], num_experts, per_node)
        to_node = assign(first_N, live_M, shared_M)
        for node in range(num_nodes):
            first, onto = node * per_node, to_node[node] * per_node
            planned_Q = planned_LP[layer, first : first + per_node]
            live_Q = live_LP[layer, onto : onto + per_node]
            first_N, live_M, shared_M = shared_experts(planned_Q, live_Q, num_experts, slots_per_rank)
            to_rank = assign(first_N, live_M, shared_M)
            for place in range(per_node):
                rank = to_rank[place // slots_per_rank]
                matched_LP[layer, onto + rank * slots_per_rank + place % slots_per_rank] = planned_Q[place]
    return matched_LP


@numba.njit(error_model="numpy", cache=CACHE)
def shared_experts(
    planned_Q: IntArray, live_Q: IntArray, num_experts: int, width: int
) -> tuple[IndexArray, IndexArray, IndexArray]:
    """How many experts (counted with their replicas) each planned stretch of `width` slots shares with each live one.

    Only pairs that share something are listed: on many ranks these are few, a rank's experts having few replicas elsewhere.

    Planned [0, 0 | 1, 2] and live [0, 1 | 0, 0]: the first shares 1 with live stretch 0 and 2 with 1, the second 1 with 0:
    [0, 2, 3], [0, 1, 0], [1, 2, 1].

    Returns:
        int64 [N + 1], where in the others each planned stretch's pairs begin and, at n + 1, end; the live stretches; the
        numbers of shared experts.
    """
    num_bins = planned_Q.shape[0] // width
    # the live stretches of each expert, ascending, and the how-manieth of this expert there each one is
    at_E, slot_M = _slots_by_expert(live_Q, num_experts)
    nth_M = np.zeros(slot_M.shape[0], dtype=np.int64)
    for place in range(1, slot_M.shape[0]):
        before = slot_M[place - 1]
        if live_Q[before] == live_Q[slot_M[place]] and before // width == slot_M[place] // width:
            nth_M[place] = nth_M[place - 1] + 1
    most = 0
    for expert in planned_Q:
        most += at_E[expert + 1] - at_E[expert]
    first_N = np.zeros(num_bins + 1, dtype=np.int64)
    live_M = np.empty(min(most, num_bins * num_bins), dtype=np.int64)
    shared_M = np.empty(live_M.shape[0], dtype=np.int64)
    pair_N = np.full(num_bins, -1, dtype=np.int64)
    seen_E = np.zeros(num_experts, dtype=np.int64)
    end = 0
    for planned in range(num_bins):
        start = end
        for expert in planned_Q[planned * width : (planned + 1) * width]:
            # the second replica of a planned stretch stays only where a second one is live
            for place in range(at_E[expert], at_E[expert + 1]):
                live = slot_M[place] // width
                if nth_M[place] != seen_E[expert]:
                    continue
                if pair_N[live] < start:
                    pair_N[live], live_M[end], shared_M[end] = end, live, 0
                    end += 1
                shared_M[pair_N[live]] += 1
            seen_E[expert] += 1
        for expert in planned_Q[planned * width : (planned + 1) * width]:
            seen_E[expert] = 0
        first_N[planned + 1] = end
    return first_N, live_M[:end], shared_M[:end]


@numba.njit(error_model="numpy", cache=CACHE)
def _slots_by_expert(row_Q: IntArray, num_experts: int) -> tuple[IndexArray, IndexArray]:
    """The slots of the first expert, then those of the second, ...; and where each one's begin and, at e + 1, end."""
    at_E = np.zeros(num_experts + 1, dtype=np.int64)
    for expert in row_Q:
        if expert >= 0:
            at_E[expert + 1] += 1
    for expert in range(num_experts):
        at_E[expert + 1] += at_E[expert]
    next_E = at_E.copy()
    slot_M = np.empty(at_E[num_experts], dtype=np.int64)
    for slot in range(row_Q.shape[0]):
        expert = row_Q[slot]
        if expert >= 0:
            slot_M[next_E[expert]] = slot
            next_E[expert] += 1
    return at_E, slot_M


@numba.njit(error_model="numpy", cache=CACHE)
def assign(first_N: IndexArray, column_M: IndexArray, score_M: IndexArray) -> IndexArray:
    """One column for each row, all different, with the greatest sum of scores.

    The Hungarian method with row and column prices (Kuhn 1955), in the form for weighted matchings that need not match all
    (as in Galil 1986), on pairs that score alone. A pair is tight if the prices of its row and column add up to its score;
    they never add up to less. All unmatched rows have the same price, the highest score at first. In turn

        rows are matched along chains of tight pairs (Hopcroft and Karp 1973: many chains in one pass), until none is left;
        all rows that such chains reach become cheaper by 1, all columns dearer: new pairs get tight, matched ones stay so

    until the unmatched rows cost nothing. Scores being whole numbers up to S, that is S turns of a few passes over the pairs,
    where one row after the other would take n searches through n columns each. What is unmatched then scores nowhere: these
    rows get the columns that are left, in order.

    Scores [[1, 2], [1, 0]], as pairs [0, 2, 3], [0, 1, 0], [1, 2, 1]: [1, 0].

    Args:
        first_N: where in the others each row's pairs begin and, at n + 1, end.
        column_M: their columns.
        score_M: their scores, above 0.

    Returns:
        int64 [N], the column of each row.
    """
    size = first_N.shape[0] - 1
    highest, num_matched = 0, 0
    for score in score_M:
        highest = max(highest, score)
    row_price, column_price = np.full(size, highest, dtype=np.int64), np.zeros(size, dtype=np.int64)
    column_of, row_of = np.full(size, -1, dtype=np.int64), np.full(size, -1, dtype=np.int64)
    reached = np.zeros(size, dtype=np.bool_)
    next_N, chain_N, through_N = first_N.copy(), np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    turns = highest
    while turns > 0 and num_matched < size:
        reached[:] = False
        before = num_matched
        for row in range(size):
            next_N[row] = first_N[row]
        for row in range(size):
            if column_of[row] < 0:
                chain_N[0] = row
                length = _find_chain(
                    first_N, column_M, score_M, row_price, column_price, row_of, reached, next_N, chain_N, through_N
                )
                for link in range(length):
                    column_of[chain_N[link]] = through_N[link]
                    row_of[through_N[link]] = chain_N[link]
                num_matched += length > 0
        if num_matched > before:
            continue
        for other in range(size):
            if column_of[other] < 0:
                row_price[other] -= 1
            if reached[other]:
                row_price[row_of[other]] -= 1
                column_price[other] += 1
        turns -= 1
    _match_rest(column_of, row_of)
    return column_of


@numba.njit(error_model="numpy", cache=CACHE)
def _match_rest(column_of: IndexArray, row_of: IndexArray) -> None:
    """Give the rows without a column (-1) the columns that are left, in order. [1, -1, -1], [-1, 0, -1]: [1, 0, 2]."""
    column = 0
    for row in range(column_of.shape[0]):
        if column_of[row] < 0:
            while row_of[column] >= 0:
                column += 1
            column_of[row], row_of[column] = column, row


@numba.njit(error_model="numpy", cache=CACHE)
def _find_chain(  # size: the arrays of `assign`, which a tuple would make slower to read
    first_N: IndexArray,
    column_M: IndexArray,
    score_M: IndexArray,
    row_price: IndexArray,
    column_price: IndexArray,
    row_of: IndexArray,
    reached: FlagArray,
    next_N: IndexArray,
    chain_N: IndexArray,
    through_N: IndexArray,
) -> int:
    """Go from row `chain_N[0]` through tight pairs and back through matched ones, depth first, to an unmatched column.

    Columns that were `reached` in this pass are not tried again; `next_N` is how far each row has been looked through.

    Returns:
        How many rows the chain has, each to take its column in `through_N`; 0 if there is none.
    """
    last = 0
    while last >= 0:
        row = chain_N[last]
        if next_N[row] == first_N[row + 1]:
            last -= 1
            continue
        pair = next_N[row]
        next_N[row] += 1
        column = column_M[pair]
        if reached[column] or row_price[row] + column_price[column] != score_M[pair]:
            continue
        reached[column] = True
        through_N[last] = column
        last += 1
        if row_of[column] < 0:
            return last
        chain_N[last] = row_of[column]
    return 0


@numba.njit(error_model="numpy", cache=CACHE)
def keep_slots(planned_LP: IntArray, live_LP: IntArray, slots_per_rank: int) -> IntArray:
    """Order each bin so that an expert that stays on its rank keeps its slot; newcomers fill the rest in order.

    Planned [3, 1, 2] over live [1, 0, 3] on one rank: 1 and 3 stay, 2 takes the slot of 0: [1, 2, 3].

    Returns:
        int32 [L, P], with the same experts on each rank as `planned_LP`.
    """
    num_layers, num_slots = planned_LP.shape
    kept_LP = np.full((num_layers, num_slots), -1, dtype=np.int32)
    left_S = np.empty(slots_per_rank, dtype=np.int32)
    for layer in range(num_layers):
        for first in range(0, num_slots, slots_per_rank):
            for slot in range(slots_per_rank):
                left_S[slot] = planned_LP[layer, first + slot]
            for slot in range(slots_per_rank):
                expert = live_LP[layer, first + slot]
                for place in range(slots_per_rank):
                    if expert >= 0 and left_S[place] == expert:
                        kept_LP[layer, first + slot] = expert
                        left_S[place] = -1
                        break
            place = 0
            for slot in range(slots_per_rank):
                if kept_LP[layer, first + slot] < 0:
                    while left_S[place] < 0:
                        place += 1
                    kept_LP[layer, first + slot] = left_S[place]
                    place += 1
    return kept_LP

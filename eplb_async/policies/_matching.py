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
        to_node = assign(shared_experts(planned_LP[layer], live_LP[layer], num_experts, per_node))
        for node in range(num_nodes):
            first, onto = node * per_node, to_node[node] * per_node
            planned_Q = planned_LP[layer, first : first + per_node]
            live_Q = live_LP[layer, onto : onto + per_node]
            to_rank = assign(shared_experts(planned_Q, live_Q, num_experts, slots_per_rank))
            for place in range(per_node):
                rank = to_rank[place // slots_per_rank]
                matched_LP[layer, onto + rank * slots_per_rank + place % slots_per_rank] = planned_Q[place]
    return matched_LP


@numba.njit(error_model="numpy", cache=CACHE)
def shared_experts(planned_Q: IntArray, live_Q: IntArray, num_experts: int, width: int) -> NDArray[np.int64]:
    """How many experts (counted with their replicas) each planned stretch of `width` slots shares with each live one.

    Planned [0, 0 | 1, 2] and live [0, 1 | 0, 0]: [[1, 2], [1, 0]].

    Returns:
        int64 [Q / width planned, Q / width live].
    """
    num_bins = planned_Q.shape[0] // width
    shared = np.zeros((num_bins, num_bins), dtype=np.int64)
    left_E = np.zeros(num_experts, dtype=np.int64)
    for planned in range(num_bins):
        for live in range(num_bins):
            for place in range(planned * width, (planned + 1) * width):
                left_E[planned_Q[place]] = 0
            for place in range(planned * width, (planned + 1) * width):
                left_E[planned_Q[place]] += 1
            for place in range(live * width, (live + 1) * width):
                expert = live_Q[place]
                if expert >= 0 and left_E[expert] > 0:
                    left_E[expert] -= 1
                    shared[planned, live] += 1
        for place in range(planned * width, (planned + 1) * width):
            left_E[planned_Q[place]] = 0
    return shared


@numba.njit(error_model="numpy", cache=CACHE)
def assign(score: NDArray[np.int64]) -> NDArray[np.int64]:
    """One column for each row, all different, with the greatest sum of scores.

    The Hungarian method with row and column prices (Kuhn 1955; shortest augmenting paths as in Jonker and Volgenant
    1987), O(n^3): rows enter one by one, each by the cheapest chain of reassignments.

    [[1, 2], [1, 0]]: [1, 0].

    Returns:
        int64 [n], the column of each row.
    """
    size = score.shape[0]
    row_price = np.zeros(size, dtype=np.int64)
    column_price = np.zeros(size + 1, dtype=np.int64)
    # column `size` is a virtual one in which the entering row starts
    row_of = np.full(size + 1, -1, dtype=np.int64)
    came_from = np.empty(size + 1, dtype=np.int64)
    distance = np.empty(size + 1, dtype=np.int64)
    done = np.empty(size + 1, dtype=np.bool_)
    for entering in range(size):
        for column in range(size + 1):
            distance[column] = np.iinfo(np.int64).max
            done[column] = False
        current = size
        row_of[size] = entering
        while row_of[current] >= 0:
            done[current] = True
            row, nearest = row_of[current], -1
            for column in range(size):
                if done[column]:
                    continue
                step = -score[row, column] - row_price[row] - column_price[column]
                if step < distance[column]:
                    distance[column] = step
                    came_from[column] = current
                if nearest < 0 or distance[column] < distance[nearest]:
                    nearest = column
            advance = distance[nearest]
            for column in range(size + 1):
                if done[column]:
                    row_price[row_of[column]] += advance
                    column_price[column] -= advance
                elif column < size:
                    distance[column] -= advance
            current = nearest
        while current != size:
            row_of[current] = row_of[came_from[current]]
            current = came_from[current]
    column_of = np.empty(size, dtype=np.int64)
    for column in range(size):
        column_of[row_of[column]] = column
    return column_of


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

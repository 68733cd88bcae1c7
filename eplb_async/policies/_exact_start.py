"""Where the exact search of `policies._exact` starts: a cheap bound and a good placement, compiled by numba.

The placement is greedy replication and packing (see `policies._kernels`), tried with every number of spare slots kept from
the hottest experts, then swaps. It is only where the search starts: it changes how long that takes, never what it proves.

Shape suffixes: E logical experts by descending load, P slots, R ranks.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._kernels import CACHE

__all__ = ["descending", "greedy", "peak_of", "simple_bound"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]
IndexArray = NDArray[np.int64]

_WORTH = 1e-9
"""A swap lowers the busiest rank by at least this share, so that rounding cannot keep swaps going round."""


@numba.njit(error_model="numpy", cache=CACHE)
def descending(value_E: FloatArray) -> IndexArray:
    """Indices by descending value, the first of equals first. [1, 3, 1]: [1, 0, 2]. Few values, nearly in order."""
    order_E = np.arange(value_E.shape[0])
    for index in range(1, value_E.shape[0]):
        place = index
        while place and value_E[order_E[place - 1]] < value_E[index]:
            order_E[place] = order_E[place - 1]
            place -= 1
        order_E[place] = index
    return order_E


@numba.njit(error_model="numpy", cache=CACHE)
def simple_bound(load_E: FloatArray, num_slots: int, num_ranks: int, most: int) -> float:
    """The mean, or the least possible heaviest share if that is more. [8, 1, 1, 1] in 4 slots on 2 ranks: 8."""
    num_experts, hottest, total = load_E.shape[0], 0, 0.0
    count_E = np.ones(num_experts, dtype=np.int64)
    for spare in range(num_slots - num_experts + 1):
        total, hottest = 0.0, 0
        for expert in range(num_experts):
            total += load_E[expert]
            if load_E[expert] / count_E[expert] > load_E[hottest] / count_E[hottest]:
                hottest = expert
        if count_E[hottest] == most or spare == num_slots - num_experts:
            break
        count_E[hottest] += 1
    return float(max(total / num_ranks, load_E[hottest] / count_E[hottest]))


@numba.njit(error_model="numpy", cache=CACHE)
def greedy(load_E: FloatArray, num_ranks: int, slots_per_rank: int, most: int) -> tuple[IntArray, float]:
    """A first placement: n spare slots to the hottest experts and the others to the coldest, packed heaviest first, swapped.

    Loads [80, 80, 0, 0, 0, 0, 0, 0] on 8 ranks of 2 slots: n = 6 gives both four replicas, each on a rank of its own: 20.

    The best over all n; -1 and infinity where every packing met a rank with room only for an expert that it has.
    """
    num_experts, num_slots = load_E.shape[0], num_ranks * slots_per_rank
    best_P, best = np.full(num_slots, -1, dtype=np.int32), np.inf
    row_P = np.empty(num_slots, dtype=np.int32)
    hot_E, count_E = np.ones(num_experts, dtype=np.int64), np.empty(num_experts, dtype=np.int64)
    share_E = np.empty(num_experts, dtype=np.float64)
    for hot in range(num_slots - num_experts + 1):
        left, hottest = num_slots - num_experts - hot, -1
        for expert in range(num_experts - 1, -1, -1):
            more = min(left, most - hot_E[expert])
            left -= more
            count_E[expert] = hot_E[expert] + more
            share_E[expert] = load_E[expert] / count_E[expert]
            share = load_E[expert] / hot_E[expert]
            if hot_E[expert] < most and (hottest < 0 or share >= load_E[hottest] / hot_E[hottest]):
                hottest = expert
        if _lay_out(share_E, count_E, num_ranks, row_P):
            _swap(share_E, row_P, num_ranks)
            peak = peak_of(load_E, row_P, num_ranks)
            if peak < best:
                best = peak
                for slot in range(num_slots):
                    best_P[slot] = row_P[slot]
        if hottest >= 0:
            hot_E[hottest] += 1
    return best_P, best


@numba.njit(error_model="numpy", cache=CACHE)
def _lay_out(share_E: FloatArray, count_E: IndexArray, num_ranks: int, row_P: IntArray) -> bool:
    """Heaviest replica first, each on the lightest rank that has room and not this expert; whether that worked."""
    per_rank = row_P.shape[0] // num_ranks
    load_R, filled_R = np.zeros(num_ranks), np.zeros(num_ranks, dtype=np.int64)
    holder_R = np.full(num_ranks, -1, dtype=np.int64)  # the last expert put there: replicas of one come in a row
    for expert in descending(share_E):
        for _ in range(count_E[expert]):
            best = -1
            for rank in range(num_ranks):
                if filled_R[rank] < per_rank and holder_R[rank] != expert and (best < 0 or load_R[rank] < load_R[best]):
                    best = rank
            if best < 0:
                return False
            row_P[best * per_rank + filled_R[best]] = expert
            load_R[best] += share_E[expert]
            filled_R[best] += 1
            holder_R[best] = expert
    return True


@numba.njit(error_model="numpy", cache=CACHE)
def _swap(share_E: FloatArray, row_P: IntArray, num_ranks: int) -> None:
    """While it lowers the busiest rank: the swap with another rank after which the busier of the two has least."""
    num_slots = row_P.shape[0]
    per_rank, load_R = num_slots // num_ranks, np.zeros(num_ranks)
    for slot in range(num_slots):
        load_R[slot // per_rank] += share_E[row_P[slot]]
    while True:
        busiest = int(load_R.argmax())
        best, give, take = load_R[busiest] * (1 - _WORTH), -1, -1
        for own in range(busiest * per_rank, (busiest + 1) * per_rank):
            for other in range(num_slots):
                rank, change = other // per_rank, share_E[row_P[own]] - share_E[row_P[other]]
                worse = max(load_R[busiest] - change, load_R[rank] + change)
                if rank == busiest or worse >= best:
                    continue
                if _holds(row_P, rank, per_rank, row_P[own]) or _holds(row_P, busiest, per_rank, row_P[other]):
                    continue
                best, give, take = worse, own, other
        if give < 0:
            return
        change = share_E[row_P[give]] - share_E[row_P[take]]
        load_R[busiest] -= change
        load_R[take // per_rank] += change
        row_P[give], row_P[take] = row_P[take], row_P[give]


@numba.njit(error_model="numpy", cache=CACHE)
def _holds(row_P: IntArray, rank: int, per_rank: int, expert: int) -> bool:
    """Whether a rank has an expert."""
    for slot in range(rank * per_rank, (rank + 1) * per_rank):  # noqa: SIM110 - numba compiles no generator here
        if row_P[slot] == expert:
            return True
    return False


@numba.njit(error_model="numpy", cache=CACHE)
def peak_of(load_E: FloatArray, row_P: IntArray, num_ranks: int) -> float:
    """Tokens of the busiest rank of a full row. Loads [3, 2, 1] in row [0, 2, 1, 2] on 2 ranks: 3 + 0.5."""
    per_rank, count_E = row_P.shape[0] // num_ranks, np.zeros(load_E.shape[0], dtype=np.int64)
    for expert in row_P:
        count_E[expert] += 1
    peak = 0.0
    for rank in range(num_ranks):
        load = 0.0
        for slot in range(rank * per_rank, (rank + 1) * per_rank):
            load += load_E[row_P[slot]] / count_E[row_P[slot]]
        peak = max(peak, load)
    return peak

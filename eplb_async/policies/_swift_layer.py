"""What the compiled loops of `swift_balancer` work on: one layer as planned so far, and the rules of the plan.

A unit is the ranks among which experts may travel: all of them, or those of one node. The load of a rank is always the sum
of its slots' shares in slot order, so that no rounding depends on the way a placement was reached.
"""

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._kernels import CACHE

__all__ = ["Layer", "Rules", "open_layer", "start_plan", "sum_rank"]

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
FlagArray = NDArray[np.bool_]


class Rules(NamedTuple):
    """What a plan may do; numba needs each number to keep its type.

    Fields:
        slots_per_rank: S.
        ranks_per_unit: ranks among which experts may travel; divides R.
        most_replicas: K.
        most_swaps: swaps in a layer.
        most_transfers: experts that one rank may send to another in a layer.
        threshold: PAR that is good enough.
        copy_gain, swap_gain, layer_gain: what copies, swaps and whole layers must gain, in slot loads (see SwiftOptions).
    """

    slots_per_rank: int
    ranks_per_unit: int
    most_replicas: int
    most_swaps: int
    most_transfers: int
    threshold: float
    copy_gain: float
    swap_gain: float
    layer_gain: float


class Layer(NamedTuple):
    """One layer while it is planned. Loads and the live placement are given, all else is worked out.

    Fields:
        load_E: tokens per expert.
        live_P: the live placement.
        live_RE: whether an expert is live on a rank.
        row_P: the placement so far, -1 for a free slot; no rank holds an expert twice.
        held_RE: whether a rank holds an expert in `row_P`.
        count_E: replicas, those included that are chosen but not placed yet.
        share_E: tokens of one replica.
        rank_load_R: tokens per rank.
        source_P: the rank from which a slot's expert comes; -1 where it is live on this rank already.
        sent_RR: experts that come from the first rank to the second.
    """

    load_E: FloatArray
    live_P: IntArray
    live_RE: FlagArray
    row_P: IntArray
    held_RE: FlagArray
    count_E: LongArray
    share_E: FloatArray
    rank_load_R: FloatArray
    source_P: LongArray
    sent_RR: IntArray


@numba.njit(error_model="numpy", cache=CACHE)
def open_layer(layer: Layer, rules: Rules) -> bool:
    """Fill in `live_RE`, and counts, shares and rank loads as they are live.

    [0, 1, 0 | 2, 0, 1] of 3 experts: expert 0 stands twice on rank 0, which need not be.

    Returns:
        Whether a rank holds an expert twice though it could hold another one.
    """
    live_P, live_RE, count_E, per_rank = layer.live_P, layer.live_RE, layer.count_E, rules.slots_per_rank
    num_experts = layer.load_E.shape[0]
    for expert in range(num_experts):
        count_E[expert] = 0
        for rank in range(live_RE.shape[0]):
            live_RE[rank, expert] = False
    repeats, in_rank = False, 0
    for slot in range(live_P.shape[0]):
        rank, expert = slot // per_rank, live_P[slot]
        if slot % per_rank == 0:
            in_rank = 0
        if expert >= 0:
            count_E[expert] += 1
            in_rank += live_RE[rank, expert]
            repeats |= in_rank > max(per_rank - num_experts, 0)
            live_RE[rank, expert] = True
    for expert in range(num_experts):
        layer.share_E[expert] = layer.load_E[expert] / count_E[expert]
    for rank in range(live_RE.shape[0]):
        layer.rank_load_R[rank] = sum_rank(rank, per_rank, live_P, layer.share_E)
    return repeats


@numba.njit(error_model="numpy", cache=CACHE)
def start_plan(layer: Layer, rules: Rules) -> None:
    """Start from the live placement, without slots whose expert stands in an earlier slot of the same rank.

    [0, 1, 0 | 2, 0, 1] with 12 tokens for expert 0: [0, 1, - | 2, 0, 1], where it has 2 replicas of 6.
    """
    row_P, held_RE, count_E = layer.row_P, layer.held_RE, layer.count_E
    for rank in range(held_RE.shape[0]):
        for expert in range(held_RE.shape[1]):
            held_RE[rank, expert] = False
        for other in range(held_RE.shape[0]):
            layer.sent_RR[rank, other] = 0
    for expert in range(count_E.shape[0]):
        count_E[expert] = 0
    for slot in range(row_P.shape[0]):
        rank, expert = slot // rules.slots_per_rank, layer.live_P[slot]
        row_P[slot] = layer.source_P[slot] = -1
        if expert >= 0 and not held_RE[rank, expert]:
            row_P[slot] = expert
            held_RE[rank, expert] = True
            count_E[expert] += 1
    for expert in range(count_E.shape[0]):
        layer.share_E[expert] = layer.load_E[expert] / count_E[expert]


@numba.njit(error_model="numpy", cache=CACHE)
def sum_rank(rank: int, slots_per_rank: int, row_P: IntArray, share_E: FloatArray) -> float:
    """The load of a rank. Shares [3, 4] in the slots [1, -, 0]: 4 + 3 = 7."""
    total = 0.0
    for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
        if row_P[slot] >= 0:
            total += share_E[row_P[slot]]
    return total

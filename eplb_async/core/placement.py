"""Placements: which expert is in which slot, and the tables a router needs to find it.

    slot_to_expert_LP     the placement itself: the expert in every slot, -1 for an empty one
    expert_to_slots_LEK   its inverse: the slots of every expert, ascending, padded with -1
    replica_count_LE      how many slots each expert has
    dispatch table        [L, E, K] and its lengths [L, E]: token i of expert e goes to table[e, hash(i) % count[e]].
                          A slot may stand in a row several times: [3, 3, 7] sends two thirds of the tokens to slot 3.

All functions here are pure: arrays in, new arrays out.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.errors import PlacementError
from eplb_async.core.spec import MoESpec

__all__ = [
    "EMPTY",
    "expert_to_slots",
    "initial_placement",
    "replica_count",
    "validate_placement",
    "weighted_dispatch_row",
]

EMPTY = -1
"""The expert of a slot that holds none."""

IntArray = NDArray[np.int32]


def initial_placement(spec: MoESpec) -> IntArray:
    """The layout in which engines load checkpoints: all experts in order, then redundant copies of 0, 1, ... again.

    4 experts with 2 redundant: [0, 1, 2, 3, 0, 1] in every layer.

    Returns:
        int32 [L, P].
    """
    row_P = np.arange(spec.num_slots, dtype=np.int32) % np.int32(spec.num_experts)
    return np.tile(row_P, (spec.num_layers, 1))


def validate_placement(slot_to_expert_LP: NDArray[np.integer[Any]], spec: MoESpec, layers: str = "layer") -> IntArray:
    """Check a placement and return it as int32 [L, P] (a row count other than L is fine: it may be part of a plan).

    Raises:
        PlacementError: not [any, P] integers, an expert outside 0..E-1, an expert without a slot, or with more than
            `spec.max_replicas`; the message names the first layer and expert.
    """
    if slot_to_expert_LP.ndim != 2 or slot_to_expert_LP.shape[1] != spec.num_slots:
        raise PlacementError(
            f"a placement of shape {list(slot_to_expert_LP.shape)} was given; needed [L, P={spec.num_slots}]"
        )
    if slot_to_expert_LP.dtype.kind not in "iu":
        raise PlacementError(f"a placement holds integers, not {slot_to_expert_LP.dtype}")
    wrong = (slot_to_expert_LP < EMPTY) | (slot_to_expert_LP >= spec.num_experts)
    if wrong.any():
        layer, slot = np.argwhere(wrong)[0]
        raise PlacementError(
            f"{layers} {layer} slot {slot} names expert {slot_to_expert_LP[layer, slot]}; experts are 0..{spec.num_experts - 1}, "
            "and -1 is an empty slot"
        )
    placement_LP = slot_to_expert_LP.astype(np.int32)
    count_LE = replica_count(placement_LP, spec.num_experts)
    if not count_LE.all():
        layer, expert = np.argwhere(count_LE == 0)[0]
        raise PlacementError(f"{layers} {layer} has no slot for expert {expert}; every expert needs at least one")
    if count_LE.max(initial=0) > spec.max_replicas:
        layer, expert = np.argwhere(count_LE > spec.max_replicas)[0]
        raise PlacementError(
            f"{layers} {layer} gives expert {expert} {count_LE[layer, expert]} slots; dispatch rows hold {spec.max_replicas} "
            "(table_length of the spec)"
        )
    return placement_LP


def replica_count(slot_to_expert_LP: IntArray, num_experts: int) -> IntArray:
    """Slots per expert.

    [[0, 1, 0, -1]] with 2 experts: [[2, 1]].

    Returns:
        int32 [L, E].
    """
    num_layers = slot_to_expert_LP.shape[0]
    # empty slots are counted in an extra column 0, which is then cut off
    flat = slot_to_expert_LP + 1 + np.arange(num_layers, dtype=np.int64)[:, None] * (num_experts + 1)
    counts = np.bincount(flat.ravel(), minlength=num_layers * (num_experts + 1))
    return counts.reshape(num_layers, num_experts + 1)[:, 1:].astype(np.int32)


def expert_to_slots(slot_to_expert_LP: IntArray, num_experts: int, table_length: int) -> tuple[IntArray, IntArray]:
    """The inverse map, which is also the dispatch table of an even split.

    [[0, 1, 0, -1]] with 2 experts and K = 2: [[[0, 2], [1, -1]]] and [[2, 1]].

    Returns:
        int32 [L, E, K], ascending and padded with -1, and int32 [L, E].

    Raises:
        PlacementError: an expert has more than K slots.
    """
    num_layers, num_slots = slot_to_expert_LP.shape
    count_LE = replica_count(slot_to_expert_LP, num_experts)
    if count_LE.size and count_LE.max() > table_length:
        raise PlacementError(f"an expert has {count_LE.max()} slots, but dispatch rows hold {table_length}")
    table_LEK = np.full((num_layers, num_experts, table_length), EMPTY, dtype=np.int32)
    order_LP = np.argsort(slot_to_expert_LP, axis=1, kind="stable")
    sorted_LP = np.take_along_axis(slot_to_expert_LP, order_LP, axis=1)
    layer, place = np.nonzero(sorted_LP >= 0)
    expert = sorted_LP[layer, place]
    # place of the first slot of each expert in the sorted row: the empty slots stand before all
    first_LE = np.cumsum(count_LE, axis=1) - count_LE + (num_slots - count_LE.sum(axis=1))[:, None]
    table_LEK[layer, expert, place - first_LE[layer, expert]] = order_LP[layer, place]
    return table_LEK, count_LE


def weighted_dispatch_row(slots: NDArray[np.int32], weights: NDArray[np.float64], table_length: int) -> IntArray:
    """A dispatch row for one expert whose slots get shares of its tokens, as close as K entries can express.

    Slots [3, 7] with weights [2, 1] and K = 4: [3, 3, 7] (two thirds and one third, exactly).

    Args:
        slots: the expert's slots, [n] with n <= K.
        weights: wanted shares, [n], positive, of any sum.
        table_length: K.

    Returns:
        int32 [m] with n <= m <= K; every slot stands in it at least once. The shortest row of least error (the largest
        share error, by trying every length; each by largest remainders).
    """
    if not 0 < len(slots) <= table_length or len(weights) != len(slots) or not np.all(weights > 0):
        raise PlacementError(
            f"{len(slots)} slots with {len(weights)} weights do not make a dispatch row of at most {table_length}"
        )
    share = weights / weights.sum()
    best, best_error = np.ones(len(slots), dtype=np.int64), np.inf
    for length in range(len(slots), table_length + 1):
        entries = np.maximum(np.floor(share * length).astype(np.int64), 1)
        while entries.sum() != length:
            gap = share * length - entries
            if entries.sum() < length:
                entries[np.argmax(gap)] += 1
            else:
                entries[np.argmin(np.where(entries > 1, gap, np.inf))] -= 1
        error = float(np.abs(entries / length - share).max())
        if error < best_error - 1e-12:
            best, best_error = entries, error
    return np.repeat(np.asarray(slots, dtype=np.int32), best)

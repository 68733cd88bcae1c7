"""What every expert's bytes must look like: fingerprints of all ranks, by layer, expert and tensor, taken at attach."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_async.core.errors import SpecError
from eplb_async.core.placement import EMPTY, IntArray
from eplb_async.core.spec import MoESpec
from eplb_async.rank.weights import WeightRows

__all__ = ["ExpertFingerprints", "SampledFingerprints", "slot_fingerprints"]

SAMPLE_EVERY = 8
"""Of so many received rows one is compared where not all are."""


def slot_fingerprints(
    weights: WeightRows,
    placement_LP: IntArray,
    rank: int,
    compute: Callable[[Sequence[torch.Tensor]], Sequence[int]],
) -> NDArray[np.int64]:
    """Fingerprints of what is in this rank's slots, int64 [L, S, most tensors of a layer]; 0 for empty slots.

    Args:
        weights: of this rank.
        placement_LP: where its slots hold what.
        rank: this rank.
        compute: fingerprints of pieces of memory, all of one layer at once.
    """
    num_slots = weights.rows[0][0].shape[0]
    most = max(len(tensors) for tensors in weights.rows)
    result = np.zeros((len(weights.rows), num_slots, most), dtype=np.int64)
    for layer, tensors in enumerate(weights.rows):
        slots = np.flatnonzero(placement_LP[layer, rank * num_slots :][:num_slots] != EMPTY)
        if len(slots):
            found = compute([tensor[slot] for slot in slots.tolist() for tensor in tensors])
            result[layer, slots, : len(tensors)] = np.reshape(found, (len(slots), len(tensors)))
    return result


class ExpertFingerprints:
    """Fingerprints by expert. Experts keep theirs for ever: rebalancing never changes weights."""

    def __init__(self, slots_LPT: NDArray[np.generic], placement_LP: IntArray, spec: MoESpec) -> None:
        """Collect them, and check that all replicas of an expert hold the same bytes.

        Args:
            slots_LPT: per slot of all ranks and tensor, int64 [L, P, tensors].
            placement_LP: the placement at attach.
            spec: the model.

        Raises:
            SpecError: two slots that should hold the same expert differ; names layer, expert and slots.
        """
        self._experts: list[list[tuple[int, ...]]] = []
        for layer in range(spec.num_layers):
            experts: list[tuple[int, ...]] = [()] * spec.num_experts
            first = [0] * spec.num_experts
            for slot, expert in enumerate(placement_LP[layer].tolist()):
                if expert == EMPTY:
                    continue
                found = tuple(slots_LPT[layer, slot].tolist())
                if experts[expert] and experts[expert] != found:
                    raise SpecError(
                        f"layer {layer}: slots {first[expert]} and {slot} should both hold expert {expert}, but their bytes "
                        "differ; load the same weights into every replica, or pass the placement they were loaded in"
                    )
                experts[expert], first[expert] = found, slot
            self._experts.append(experts)

    def of(self, layer: int, expert: int) -> Sequence[int]:
        """One number per tensor of the layer."""
        return self._experts[layer][expert]


class SampledFingerprints:
    """Those of every eighth row asked for: a source that is wrong is found soon, though not before the first wrong commit."""

    def __init__(self, fingerprints: ExpertFingerprints) -> None:
        self._fingerprints, self._asked = fingerprints, 0

    def of(self, layer: int, expert: int) -> Sequence[int] | None:
        """As ExpertFingerprints.of, or None for a row that is not to be compared."""
        self._asked += 1
        return self._fingerprints.of(layer, expert) if self._asked % SAMPLE_EVERY == 1 else None

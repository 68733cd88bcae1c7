"""Loads: tokens routed to logical experts, from whatever an engine counts.

Engines count what they have at hand: logical experts [L, E] at the router, slots of all ranks [L, P], or the slots of
their own rank [L, S] after dispatch. Slot counts are folded with the placement under which they were counted.
"""

from collections.abc import Sequence
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.errors import SpecError
from eplb_async.core.placement import IntArray
from eplb_async.core.spec import MoESpec

__all__ = ["LoadKind", "Phase", "fold_slots", "load_kind"]


class Phase(Enum):
    """What a step did. Loads of DUMMY (idle rank) and PROFILE (warm-up) steps are not traffic and never count."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"
    DUMMY = "dummy"
    PROFILE = "profile"

    __hash__ = object.__hash__  # by identity; Enum's own is a call of Python, and hooks look phases up at every step

    @property
    def counts(self) -> bool:
        """True if the step's load is traffic."""
        return self not in (Phase.DUMMY, Phase.PROFILE)


class LoadKind(Enum):
    """What the columns of a load tensor are."""

    LOGICAL = "logical"
    GLOBAL_SLOTS = "global_slots"
    LOCAL_SLOTS = "local_slots"


def load_kind(shape: Sequence[int], spec: MoESpec, kind: LoadKind | None = None) -> LoadKind:
    """Tell what a load tensor counts by its shape.

    Args:
        shape: of the tensor.
        spec: the model.
        kind: what the caller says it is; needed only where two readings fit (E = P, or one rank) and matter.

    Raises:
        SpecError: no reading fits, or `kind` does not.
    """
    widths = {
        LoadKind.LOGICAL: spec.num_experts,
        LoadKind.GLOBAL_SLOTS: spec.num_slots,
        LoadKind.LOCAL_SLOTS: spec.slots_per_rank,
    }
    for candidate, width in widths.items():
        if tuple(shape) == (spec.num_layers, width) and kind in (None, candidate):
            return candidate
    wanted = ", ".join(f"{name.value} [{spec.num_layers}, {width}]" for name, width in widths.items())
    raise SpecError(
        f"a load tensor of shape {list(shape)}{f' as {kind.value}' if kind else ''} was given; needed one of {wanted}"
    )


def fold_slots(counts_LP: NDArray[np.int64], slot_to_expert_LP: IntArray, num_experts: int) -> NDArray[np.int64]:
    """Tokens per logical expert from tokens per slot. What was counted on an empty slot belongs to nobody and is left out.

    Counts [[5, 1, 2, 9]] on slots [[0, 1, 0, -1]]: [[7, 1]].

    Returns:
        int64 [L, E].
    """
    num_layers = counts_LP.shape[0]
    index = slot_to_expert_LP + 1 + np.arange(num_layers, dtype=np.int64)[:, None] * (num_experts + 1)
    # float64 sums of counts are exact below 2 ** 53
    sums = np.bincount(index.ravel(), weights=counts_LP.ravel(), minlength=num_layers * (num_experts + 1))
    return sums.reshape(num_layers, num_experts + 1)[:, 1:].astype(np.int64)

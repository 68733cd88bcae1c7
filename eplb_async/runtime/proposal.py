"""What the daemon sends a policy worker, and what comes back: a request for a plan, and a proposal."""

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.plan import PlanEntry
from eplb_async.core.spec import MoESpec

__all__ = ["PackedArray", "PlanProposal", "PlanRequest"]


class PackedArray(msgspec.Struct, frozen=True, array_like=True):
    """An array as type, shape and bytes, for a message."""

    dtype: str
    shape: list[int]
    data: bytes

    @classmethod
    def pack(cls, array: NDArray[np.generic]) -> "PackedArray":
        """Copy an array."""
        return cls(array.dtype.str, list(array.shape), np.ascontiguousarray(array).tobytes())

    def unpack(self) -> NDArray[Any]:
        """A read-only view of the bytes."""
        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that a plan depends on.

    Fields:
        policy, options, state: which policy, its options and those of every policy, and what its last call returned.
        spec, staging_rows, slot_bytes: of the group, see GroupInfo.
        generation: that the plan will have.
        windows: load [T, L, E], oldest first, T >= 1.
        placement, versions: the live rows int32 [L, P] and their packed counters.
        share: how the live slots share their experts' tokens, float64 [L, P]; None for evenly.
        renew: layers whose dispatch has to be set, whatever that gains: it is not known, see live_dispatch.py.
        min_gain: see DaemonSettings.
        capacity: bytes of the board.
        budget_bytes: that the plan may move; None: any.
        price: PAR that filling all slots of a layer anew has to bring; a part of them, so much less.
        confidence: standard deviations of sampling noise by which a gain has to be certain.
        revert: rows to go back to, int32 [L, P], in place of a policy's; None: ask the policy.
        fitted_memory: plan on the newest windows only that memory.py takes.
    """

    policy: str
    options: dict[str, Any]
    state: bytes
    spec: MoESpec
    staging_rows: int
    slot_bytes: list[int]
    generation: int
    windows: PackedArray
    placement: PackedArray
    versions: list[int]
    min_gain: float
    capacity: int
    share: PackedArray | None = None
    renew: list[int] = []
    budget_bytes: int | None = None
    price: float = 0.0
    confidence: float = 0.0
    fitted_memory: bool = False
    revert: PackedArray | None = None


class PlanProposal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan without its group: what to move, and what that should bring.

    Fields:
        generation: as requested; the plan is void under another one.
        entries: in commit order; empty if nothing pays.
        layers: that change, in commit order.
        why: for people: what was chosen, and what was left out for which reason.
        par_before_L, par_after_L: PAR per layer of the windows, under the live placement and dispatch, and with these
            entries.
        num_moves, bytes_moved: slots filled anew and bytes pulled for them; bytes_between_ranks: those from other ranks.
        state: for the policy's next call.
        num_windows: that it was made from; 0: not told.
        num_left_out: layers that would pay and fit neither board nor budget.
        uncertain: PAR, summed over layers, of gains that would pay if they were not within the sampling noise.
        policy_s: time that the policy took.
    """

    generation: int
    entries: list[PlanEntry]
    layers: list[int]
    why: str
    par_before_L: list[float]
    par_after_L: list[float]
    num_moves: int
    bytes_moved: int
    bytes_between_ranks: int
    state: bytes
    num_windows: int = 0
    num_left_out: int = 0
    uncertain: float = 0.0
    policy_s: float = 0.0

    @property
    def par_before(self) -> float:
        """Mean over all layers."""
        return sum(self.par_before_L) / len(self.par_before_L)

    @property
    def par_after(self) -> float:
        """Mean over all layers."""
        return sum(self.par_after_L) / len(self.par_after_L)

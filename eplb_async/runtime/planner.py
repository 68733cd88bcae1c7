"""From windows and a live placement to the entries of a plan. Pure functions; they run in a worker of the pool.

    policy       a new placement of all layers
    per layer    aligned with the live row; it moves only if its predicted PAR falls by at least `min_gain` of its PAR
    entries      the layers that pay, best gain per byte first; a layer whose rows do not fit the staging memory at once
                 gives several entries one after the other
    fit          what does not fit the board is left out, worst layers first

Versions: the first entry of a layer replaces the row of the layer's live version; the entry after it replaces the row
that counter(generation, position of the entry before) brought.
"""

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.clock import Clock
from eplb_async.core.diff import aligned_target, commit_rows, moves_between
from eplb_async.core.plan import PlanEntry, counter, validate_entry
from eplb_async.core.score import windows_par
from eplb_async.core.spec import MoESpec

__all__ = ["PackedArray", "PlanProposal", "PlanRequest", "choose_entries", "make_plan"]

IntArray = NDArray[np.int32]
PLAN_OVERHEAD_BYTES = 4096
"""Room on the board for what a plan holds beside its entries; names and reasons are cut to fit (session.py)."""


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
        policy, options, state: which policy, its options, and what its last call returned.
        spec, staging_rows, slot_bytes: of the group, see GroupInfo.
        generation: that the plan will have.
        windows: load [T, L, E], oldest first, T >= 1.
        placement, versions: the live rows int32 [L, P] and their packed counters.
        min_gain: see DaemonSettings.
        capacity: bytes of the board.
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


class PlanProposal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan without its group: what to move, and what that should bring.

    Fields:
        generation: as requested; the plan is void under another one.
        entries: in commit order; empty if nothing pays.
        layers: that change, in commit order.
        why: for people: what was chosen, and what was left out for which reason.
        par_before_L, par_after_L: PAR per layer of the windows, under the live placement and with these entries.
        num_moves, bytes_moved: slots filled anew and bytes pulled for them; bytes_between_ranks: those from other ranks.
        state: for the policy's next call.
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
    policy_s: float = 0.0

    @property
    def par_before(self) -> float:
        """Mean over all layers."""
        return sum(self.par_before_L) / len(self.par_before_L)

    @property
    def par_after(self) -> float:
        """Mean over all layers."""
        return sum(self.par_after_L) / len(self.par_after_L)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer that pays: rows to commit one after the other, moves for each, and what both cost."""

    layer: int
    rows: list[IntArray]
    moves: list[IntArray]
    gain: float
    num_moves: int
    num_bytes: int

    @property
    def key(self) -> tuple[float, int]:
        """Sorts best gain per byte first; a layer that only gives slots up costs nothing."""
        return (-self.gain / self.num_bytes if self.num_bytes else -np.inf, self.layer)

    @property
    def board_bytes(self) -> int:
        """Most bytes that its entries take on the board: rows, moves, and 64 for the fields of each."""
        return sum(4 * row.size + 4 * moves.size + 64 for row, moves in zip(self.rows, self.moves, strict=True))


def make_plan(request: PlanRequest, clock: Clock | None = None) -> PlanProposal:
    """Run the policy and choose what is worth moving.

    Args:
        request: all it depends on.
        clock: times the policy, for the report; None leaves that out.

    Raises:
        UnknownName, ConfigError, SpecError, PlacementError, PolicyError: see eplb_async.policies.registry.run_policy.
        PlanInvalid: our bug.
    """
    from eplb_async.policies.registry import run_policy

    start = clock.monotonic_s() if clock else 0.0
    windows_TLE, live_LP = request.windows.unpack(), request.placement.unpack()
    target_LP, state = run_policy(request.policy, windows_TLE, live_LP, request.spec, request.options, request.state)
    policy_s = clock.monotonic_s() - start if clock else 0.0
    return msgspec.structs.replace(choose_entries(request, target_LP, state), policy_s=policy_s)


def choose_entries(request: PlanRequest, target_LP: IntArray, state: bytes) -> PlanProposal:
    """The proposal for a policy's placement.

    Args:
        request: what was asked for.
        target_LP: the placement that the policy wants, valid, int32 [L, P].
        state: the policy's.

    Raises:
        PlanInvalid: an entry does not pass core.plan.validate_entry; our bug.
    """
    spec, windows_TLE, live_LP = request.spec, request.windows.unpack(), request.placement.unpack()
    before_L = windows_par(windows_TLE, live_LP, spec.topology)
    target_L = windows_par(windows_TLE, target_LP, spec.topology)
    gain_L = before_L - target_L
    pays_L = (gain_L > 0) & (gain_L >= request.min_gain * before_L)
    sent_R = np.zeros(spec.num_ranks, dtype=np.int64)
    paying = np.flatnonzero(pays_L).tolist()
    changes = (_layer_change(request, layer, target_LP[layer], float(gain_L[layer]), sent_R) for layer in paying)
    candidates = [change for change in changes if change is not None]
    candidates.sort(key=lambda change: change.key)
    chosen, cut = _fit(candidates, request.capacity - PLAN_OVERHEAD_BYTES)
    layers = [change.layer for change in chosen]
    after_L = before_L.copy()
    after_L[layers] = target_L[layers]
    entries = _entries(request, chosen)
    return PlanProposal(
        generation=request.generation,
        entries=entries,
        layers=layers,
        why=_why(len(chosen), cut, gain_L, before_L, request.min_gain),
        par_before_L=before_L.tolist(),
        par_after_L=after_L.tolist(),
        num_moves=sum(change.num_moves for change in chosen),
        bytes_moved=sum(change.num_bytes for change in chosen),
        bytes_between_ranks=sum(_bytes_between_ranks(change, request) for change in chosen),
        state=state,
    )


def _layer_change(
    request: PlanRequest, layer: int, target_P: IntArray, gain: float, sent_R: NDArray[np.int64]
) -> _Layer | None:
    topology = request.spec.topology
    row_P: IntArray = request.placement.unpack()[layer]
    rows = commit_rows(row_P, aligned_target(row_P, target_P, topology), topology, request.staging_rows)
    moves = []
    for next_P in rows:
        moves.append(moves_between(row_P, next_P, topology, sent_R))
        row_P = next_P
    num_moves = sum(len(part) for part in moves)
    num_bytes = num_moves * request.slot_bytes[layer]
    if not rows:
        return None
    return _Layer(layer=layer, rows=rows, moves=moves, gain=gain, num_moves=num_moves, num_bytes=num_bytes)


def _fit(candidates: list[_Layer], capacity: int) -> tuple[list[_Layer], int]:
    """The best layers that fit the board together, and how many were left out."""
    chosen, used = [], 0
    for change in candidates:
        if used + change.board_bytes <= capacity:
            chosen.append(change)
            used += change.board_bytes
    return chosen, len(candidates) - len(chosen)


def _entries(request: PlanRequest, chosen: list[_Layer]) -> list[PlanEntry]:
    entries: list[PlanEntry] = []
    for change in chosen:
        version, base_P = request.versions[change.layer], request.placement.unpack()[change.layer]
        for row_P, moves_M3 in zip(change.rows, change.moves, strict=True):
            entry = PlanEntry(
                layer=change.layer,
                base_version=version,
                slots=row_P.astype("<i4").tobytes(),
                moves=moves_M3.astype("<i4").tobytes(),
            )
            validate_entry(entry, base_P, request.spec, request.staging_rows)
            entries.append(entry)
            version, base_P = counter(request.generation, len(entries)), row_P
    return entries


def _bytes_between_ranks(change: _Layer, request: PlanRequest) -> int:
    width = request.spec.slots_per_rank
    crossing = sum(int((moves[:, 1] // width != moves[:, 2] // width).sum()) for moves in change.moves)
    return crossing * request.slot_bytes[change.layer]


def _why(num_chosen: int, cut: int, gain_L: NDArray[np.float64], before_L: NDArray[np.float64], min_gain: float) -> str:
    best = float((gain_L / before_L).max(initial=0.0))
    if not num_chosen and not cut:
        return f"the best layer's PAR would fall by {best:.1%}, needed are {min_gain:.1%}"
    left = f", {cut} more do not fit the board" if cut else ""
    return f"{num_chosen} of {len(gain_L)} layers pay (best: PAR falls by {best:.1%}){left}"

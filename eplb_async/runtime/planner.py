"""From windows and a live placement to the entries of a plan. Pure functions; they run in a worker of the pool.

    policy       a new placement of all layers
    outlook      per layer, the policy's row or the live one with new dispatch tables, whichever pays; see outlook.py
    entries      the layers that pay, best gain per byte first; a layer whose rows do not fit the staging memory at once
                 gives several entries one after the other
    fit          what does not fit the board is left out, worst layers first

Versions: the first entry of a layer replaces the row of the layer's live version; the entry after it replaces the row
that counter(generation, position of the entry before) brought.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.clock import Clock
from eplb_async.core.diff import commit_rows, moves_between
from eplb_async.core.plan import PlanEntry, counter, validate_entry
from eplb_async.runtime.memory import remembered
from eplb_async.runtime.outlook import Outlook, outlook_of
from eplb_async.runtime.proposal import PackedArray, PlanProposal, PlanRequest

__all__ = ["PackedArray", "PlanProposal", "PlanRequest", "choose_entries", "make_plan"]

IntArray = NDArray[np.int32]
PLAN_OVERHEAD_BYTES = 4096
"""Room on the board for what a plan holds beside its entries; names and reasons are cut to fit (session.py)."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer that pays: rows to commit one after the other, moves for each, what both cost, and the last row's tables.

    `table`, `count`: as in PlanEntry, empty for an even split.
    """

    layer: int
    rows: list[IntArray]
    moves: list[IntArray]
    gain: float
    num_moves: int
    num_bytes: int
    table: bytes = b""
    count: bytes = b""

    @property
    def key(self) -> tuple[float, int]:
        """Sorts best gain per byte first; a layer that only gives slots up, or gets other tables, costs nothing."""
        return (-self.gain / self.num_bytes if self.num_bytes else -np.inf, self.layer)

    @property
    def board_bytes(self) -> int:
        """Most bytes that its entries take on the board: rows, moves, and 64 for the fields of each; the tables."""
        rows = sum(4 * row.size + 4 * moves.size + 64 for row, moves in zip(self.rows, self.moves, strict=True))
        return rows + len(self.table) + len(self.count)


def make_plan(request: PlanRequest, clock: Clock | None = None) -> PlanProposal:
    """Run the policy, or take the rows to go back to, and choose what is worth moving.

    Args:
        request: all it depends on.
        clock: times the policy, for the report; None leaves that out.

    Raises:
        UnknownName, ConfigError, SpecError, PlacementError, PolicyError: see eplb_async.policies.registry.run_policy.
        PlanInvalid: our bug.
    """
    from eplb_async.policies.registry import run_policy

    if request.revert is not None:
        return choose_entries(request, request.revert.unpack(), request.state)
    start = clock.monotonic_s() if clock else 0.0
    if request.fitted_memory:
        recent_TLE = remembered(request.windows.unpack(), fitted=True)
        request = msgspec.structs.replace(request, windows=PackedArray.pack(recent_TLE))
    windows_TLE, live_LP = request.windows.unpack(), request.placement.unpack()
    target_LP, state = run_policy(
        request.policy, windows_TLE, live_LP, request.spec, request.options, request.state, _bounds(request)
    )
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
    outlook = outlook_of(request, target_LP)
    sent_R = np.zeros(request.spec.num_ranks, dtype=np.int64)
    paying = np.flatnonzero(outlook.moves_L | outlook.refits_L).tolist()
    candidates = [_layer_change(request, outlook, layer, sent_R) for layer in paying]
    candidates.sort(key=lambda change: change.key)
    chosen, cut = _fit(candidates, request.capacity - PLAN_OVERHEAD_BYTES, request.budget_bytes)
    layers = [change.layer for change in chosen]
    after_L = outlook.before_L.copy()
    after_L[layers] = outlook.after_L[layers]
    entries = _entries(request, chosen)
    return PlanProposal(
        generation=request.generation,
        entries=entries,
        layers=layers,
        why=_why(chosen, cut, outlook, request),
        par_before_L=outlook.before_L.tolist(),
        par_after_L=after_L.tolist(),
        num_moves=sum(change.num_moves for change in chosen),
        bytes_moved=sum(change.num_bytes for change in chosen),
        bytes_between_ranks=sum(_bytes_between_ranks(change, request) for change in chosen),
        state=state,
        num_windows=request.windows.shape[0],
        num_left_out=cut,
        uncertain=outlook.uncertain,
    )


def _bounds(request: PlanRequest) -> tuple[float, float] | None:
    """Share of all slots, and price, for a policy that can keep within them; None where nothing is bounded."""
    if request.budget_bytes is None and not request.price:
        return None
    budget = np.inf if request.budget_bytes is None else request.budget_bytes
    return min(1.0, budget / (sum(request.slot_bytes) * request.spec.num_slots)), request.price


def _layer_change(request: PlanRequest, outlook: Outlook, layer: int, sent_R: NDArray[np.int64]) -> _Layer:
    topology = request.spec.topology
    row_P: IntArray = request.placement.unpack()[layer]
    rows, fitted = [row_P], outlook.stay  # a row that stays is committed again, with other tables
    if outlook.moves_L[layer]:
        rows = commit_rows(row_P, outlook.target_LP[layer], topology, request.staging_rows)
        fitted = outlook.target
    moves = []
    for next_P in rows:
        moves.append(moves_between(row_P, next_P, topology, sent_R))
        row_P = next_P
    num_moves = sum(len(part) for part in moves)
    table, count = b"", b""
    if fitted is not None and not fitted.even_L[layer]:
        table, count = (part.astype("<i4").tobytes() for part in (fitted.table_LEK[layer], fitted.count_LE[layer]))
    return _Layer(
        layer=layer,
        rows=rows,
        moves=moves,
        gain=float(outlook.before_L[layer] - outlook.after_L[layer]),
        num_moves=num_moves,
        num_bytes=num_moves * request.slot_bytes[layer],
        table=table,
        count=count,
    )


def _fit(candidates: list[_Layer], capacity: int, budget_bytes: int | None) -> tuple[list[_Layer], int]:
    """The best layers that fit the board and the budget together, and how many were left out."""
    chosen, used, moved = [], 0, 0
    for change in candidates:
        affordable = budget_bytes is None or moved + change.num_bytes <= budget_bytes
        if affordable and used + change.board_bytes <= capacity:
            chosen.append(change)
            used += change.board_bytes
            moved += change.num_bytes
    return chosen, len(candidates) - len(chosen)


def _entries(request: PlanRequest, chosen: list[_Layer]) -> list[PlanEntry]:
    entries: list[PlanEntry] = []
    for change in chosen:
        version, base_P = request.versions[change.layer], request.placement.unpack()[change.layer]
        last = len(change.rows) - 1
        for index, (row_P, moves_M3) in enumerate(zip(change.rows, change.moves, strict=True)):
            # rows on the way are split evenly: they live for some steps only
            entry = PlanEntry(
                layer=change.layer,
                base_version=version,
                slots=row_P.astype("<i4").tobytes(),
                moves=moves_M3.astype("<i4").tobytes(),
                table=change.table if index == last else b"",
                count=change.count if index == last else b"",
            )
            validate_entry(entry, base_P, request.spec, request.staging_rows)
            entries.append(entry)
            version, base_P = counter(request.generation, len(entries)), row_P
    return entries


def _bytes_between_ranks(change: _Layer, request: PlanRequest) -> int:
    width = request.spec.slots_per_rank
    crossing = sum(int((moves[:, 1] // width != moves[:, 2] // width).sum()) for moves in change.moves)
    return crossing * request.slot_bytes[change.layer]


def _why(chosen: list[_Layer], cut: int, outlook: Outlook, request: PlanRequest) -> str:
    # also of layers that do not pay
    least_L = np.minimum(outlook.stay_L, outlook.target_L)
    best = float(((outlook.before_L - least_L) / outlook.before_L).max(initial=0.0))
    if not chosen and not cut:
        if request.price and (outlook.target_LP == request.placement.unpack()).all():
            return "the policy found no move that is worth what it costs (daemon.move_cost)"
        return f"the best layer's PAR would fall by {best:.1%}, {_refused(outlook, request)}"
    refitted = sum(bool(outlook.refits_L[change.layer]) for change in chosen)
    tables = f", {refitted} of them by dispatch tables alone" if refitted else ""
    left = f", {cut} more do not fit the board or the budget" if cut else ""
    return f"{len(chosen)} of {len(outlook.before_L)} layers pay{tables} (best: PAR falls by {best:.1%}){left}"


def _refused(outlook: Outlook, request: PlanRequest) -> str:
    """Why no layer pays: who has set one thing only has to learn which setting holds it back."""
    reasons = []
    if outlook.num_dear:
        reasons.append(f"{outlook.num_dear} layers gain less than their moves cost (daemon.move_cost)")
    if outlook.num_uncertain:
        reasons.append(f"{outlook.num_uncertain} gain no more than may be sampling noise (daemon.confidence)")
    return " and ".join(reasons) if reasons else f"needed are {request.min_gain:.1%}"

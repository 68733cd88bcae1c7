"""From the board to a plan that can be applied: copied, checked and prepared on a thread, so that no step waits for it.

Checking is full: the checksum, the decoding, every entry against the placement that is live (core/plan.py), and the
version of each layer that an entry starts from. The rows and tables for the router are made here too, ready to be copied.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from eplb_async.core.errors import PlanInvalid
from eplb_async.core.placement import IntArray, expert_to_slots
from eplb_async.core.plan import Plan, PlanEntry, counter, decode_plan, validate_entry
from eplb_async.core.spec import MoESpec
from eplb_async.rank.streams import Completion, Stream
from eplb_async.rank.transfer.base import Pull
from eplb_async.shm.board import PlanBoard

__all__ = ["BREATH_S", "BadPlan", "PlanReader", "PreparedEntry", "PreparedPlan", "Snapshot"]


NO_MOVES: IntArray = np.zeros((0, 3), dtype=np.int32)
BREATH_S = 0.001
"""Slept after each entry, some 0.1 ms of Python. A thread that computes on gives the interpreter up only every 5 ms, and the thread that steps
asks for it at every call into torch: preparing 48 layers in 5 ms held it up by 18. In pieces each wait is as short as a piece, and few fall into one step."""


@dataclass(frozen=True)
class Snapshot:
    """The placement that a plan is checked against: rows int32 [L, P] and the version of each layer."""

    rows_LP: IntArray
    versions: tuple[int, ...]


@dataclass(frozen=True)
class PreparedEntry:
    """One entry, ready for this rank.

    Attributes:
        layer: index.
        position: from 1.
        previous: position of the entry before it for the same layer, 0 if none.
        slot_to_expert_P: the new row, int32 [P].
        row_P, table_EK, count_E: the same and its dispatch rows, in the type of the router's tensors.
        pulls: what this rank receives, in order.
        moves_M3: moves of all ranks in the plan's order, int32 [M, 3]: expert, source slot, destination slot.
    """

    layer: int
    position: int
    previous: int
    slot_to_expert_P: IntArray
    row_P: torch.Tensor
    table_EK: torch.Tensor
    count_E: torch.Tensor
    pulls: tuple[Pull, ...]
    moves_M3: IntArray = field(default_factory=lambda: NO_MOVES)


@dataclass(frozen=True)
class PreparedPlan:
    """A checked plan. `against` is what it was checked against: it may be adopted only while that is live."""

    generation: int
    digest: int
    entries: tuple[PreparedEntry, ...]
    against: Snapshot

    @property
    def length(self) -> int:
        """Number of entries."""
        return len(self.entries)


@dataclass(frozen=True)
class BadPlan:
    """A board whose plan must be refused, and why. Generation 0: it cannot even be told."""

    generation: int
    why: str
    against: Snapshot


class PlanReader:
    """Watches the board for one rank."""

    def __init__(self, board: PlanBoard, spec: MoESpec, rank: int, staging_rows: int, stream: Stream) -> None:
        self._board, self._spec, self._rank = board, spec, rank
        self._staging_rows, self._stream = staging_rows, stream
        self._seen = 0
        self._pending: Completion[PreparedPlan | BadPlan | None] | None = None
        self._ready: PreparedPlan | BadPlan | None = None

    def poll(self, snapshot: Snapshot) -> PreparedPlan | BadPlan | None:
        """The newest plan once it is prepared, None before; never waits. It stays until `forget` or a newer one.

        Args:
            snapshot: the live placement to check a new plan against.
        """
        sequence = self._board.sequence
        if sequence != self._seen and not sequence & 1 and self._pending is None:
            self._seen, self._ready = sequence, None
            self._pending = self._stream.submit(lambda: self._prepare(snapshot))
        if self._pending is not None and self._pending.done:
            if self._pending.error is not None:
                raise self._pending.error
            self._ready, self._pending = self._pending.result, None
        return self._ready

    @property
    def idle(self) -> bool:
        """True if there is nothing on the board that `poll` has not seen to the end."""
        return self._pending is None and self._ready is None and self._board.sequence == self._seen

    def check_again(self) -> None:
        """Prepare the plan on the board once more, against a newer placement."""
        self._seen, self._ready = 0, None

    def forget(self) -> None:
        """The plan was adopted or refused; wait for the next."""
        self._ready = None

    def close(self) -> None:
        """Stop preparing."""
        self._stream.close()

    def _prepare(self, snapshot: Snapshot) -> PreparedPlan | BadPlan | None:
        try:
            posted = self._board.read()
        except PlanInvalid as error:
            return BadPlan(0, str(error), snapshot)
        if posted is None:
            return None
        try:
            plan = decode_plan(posted.data)
            if plan.incarnation != self._board.segment.header.incarnation:
                return None
            if plan.generation != posted.generation:
                raise PlanInvalid(f"the board says generation {posted.generation}, the plan {plan.generation}")
            return PreparedPlan(posted.generation, posted.digest, self._entries(plan, snapshot), snapshot)
        except PlanInvalid as error:
            return BadPlan(posted.generation, str(error), snapshot)

    def _entries(self, plan: Plan, snapshot: Snapshot) -> tuple[PreparedEntry, ...]:
        rows: dict[int, IntArray] = {}
        previous: dict[int, int] = {}
        entries = []
        for position, entry in enumerate(plan.entries, start=1):
            if not 0 <= entry.layer < self._spec.num_layers:
                raise PlanInvalid(
                    f"entry {position} is for layer {entry.layer}; layers are 0..{self._spec.num_layers - 1}"
                )
            before = previous.get(entry.layer, 0)
            version = counter(plan.generation, before) if before else snapshot.versions[entry.layer]
            if entry.base_version != version:
                raise PlanInvalid(
                    f"layer {entry.layer} is at version {version:#x}, the plan starts from {entry.base_version:#x}"
                )
            validate_entry(entry, rows.get(entry.layer, snapshot.rows_LP[entry.layer]), self._spec, self._staging_rows)
            entries.append(self._entry(entry, position, before))
            rows[entry.layer], previous[entry.layer] = entry.slot_to_expert_P, position
            time.sleep(BREATH_S)
        return tuple(entries)

    def _entry(self, entry: PlanEntry, position: int, previous: int) -> PreparedEntry:
        spec, row_P = self._spec, entry.slot_to_expert_P
        if entry.table:
            table_EK = np.frombuffer(entry.table, dtype="<i4").reshape(spec.num_experts, spec.max_replicas)
            count_E = np.frombuffer(entry.count, dtype="<i4")
        else:
            table_LEK, count_LE = expert_to_slots(row_P[None], spec.num_experts, spec.max_replicas)
            table_EK, count_E = table_LEK[0], count_LE[0]
        width = spec.slots_per_rank
        pulls = tuple(
            Pull(expert, source // width, source % width, slot % width)
            for expert, source, slot in entry.moves_M3.tolist()
            if slot // width == self._rank
        )
        row, table, count = (torch.from_numpy(array.astype(np.int64)) for array in (row_P, table_EK, count_E))
        return PreparedEntry(entry.layer, position, previous, row_P, row, table, count, pulls, entry.moves_M3)

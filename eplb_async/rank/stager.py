r"""Staging: pulling the incoming experts of the active plan beside the forward, entry by entry, within a budget per step.

    waiting -> pulling -> staged -> released        an entry; `staged` in plan order only
                  \-> orphaned -> ended             its plan was dropped: its pulls must end before `committed` moves on,
                             \-> abandoned -> ended  or be given up after a deadline, with all staging rows

Copies are bounded per step in number and bytes, and in all by the bytes in flight: a device that is slow is not given more.

An entry starts when enough staging rows are free and, if an earlier entry changes the same layer, once every rank has
committed that one (I12): its sources are live only then. Rows are free again when the own commit has ended (I13).
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from eplb_async.core.config import HookSettings
from eplb_async.core.plan import counter
from eplb_async.rank.plan_reader import PreparedEntry, PreparedPlan
from eplb_async.rank.streams import Completion
from eplb_async.rank.transfer.base import Pull, Transfer
from eplb_async.shm.words import Reduced

__all__ = ["Incoming", "Stager"]

log = logging.getLogger(__name__)


@dataclass
class Incoming:
    """One entry on its way: the staging row of each of its pulls, those not issued yet, and the copies that were."""

    entry: PreparedEntry
    rows: list[int]
    row_bytes: int
    waiting: deque[tuple[Pull, int]]
    copies: deque[Completion[None]] = field(default_factory=deque)
    failed: bool = False


class Stager:
    """Staging of one rank. Only the thread that steps may call it.

    Attributes:
        bytes_pulled, rows_pulled, pulls_abandoned: since attach.
        bytes_in_flight: of copies that were issued and have not ended.
    """

    def __init__(
        self,
        transfer: Transfer,
        settings: HookSettings,
        fingerprints: Callable[[int, int], Sequence[int] | None],
    ) -> None:
        self._transfer, self._settings, self._fingerprints = transfer, settings, fingerprints
        self._free = list(range(transfer.staging.num_rows))
        self._plan: PreparedPlan | None = None
        self._next = 0
        self._incoming: deque[Incoming] = deque()
        self._staged: dict[int, Incoming] = {}
        self._orphans: list[Incoming] = []
        self._orphaned_since_s = 0.0
        self.bytes_pulled = self.rows_pulled = self.bytes_in_flight = self.pulls_abandoned = 0

    @property
    def idle(self) -> bool:
        """True if there is nothing to poll or issue."""
        return self._plan is None and not self._orphans

    @property
    def orphaned(self) -> bool:
        """True while pulls of dropped plans still run."""
        return bool(self._orphans)

    def start(self, plan: PreparedPlan) -> None:
        """Begin with the first entry of an adopted plan."""
        self._plan, self._next = plan, 0

    def agree(self, words: Reduced) -> None:
        """See a step's reduced words, while a plan is held; only entries that all ranks must begin together need them."""

    def close(self) -> None:
        """End what runs beside the transfer; nothing here."""

    def issue(self, all_committed: int, budget_bytes: int | None = None) -> int:
        """Issue copies within this step's budget; how many bytes.

        Args:
            all_committed: a packed counter that every rank is known to have committed.
            budget_bytes: None: what the settings allow.
        """
        before, limit = self.bytes_pulled, self._settings.pull_bytes_per_step
        self._issue(all_committed, limit if budget_bytes is None else budget_bytes)
        if self.bytes_pulled > before:
            self._transfer.flush()
        return self.bytes_pulled - before

    def _issue(self, all_committed: int, budget_bytes: int) -> None:
        settings, spent = self._settings, False
        copies, left = settings.copies_per_step, budget_bytes
        while copies > 0 and self._plan is not None and (current := self._to_issue(self._plan, all_committed)):
            layer, size = current.entry.layer, current.row_bytes
            # a row that is larger than the limit goes alone, for the whole of it
            alone = settings.pull_bytes_per_step
            while (
                current.waiting
                and copies > 0
                and (left >= size or (left >= alone and not spent))
                and self._has_room(size)
            ):
                pull, row = current.waiting.popleft()
                expected = self._fingerprints(layer, pull.expert)
                current.copies.append(self._transfer.pull(layer, pull, row, expected))
                copies, left, spent = copies - 1, left - size, True
                self.bytes_in_flight += size
                self.bytes_pulled += size
                self.rows_pulled += 1
            if current.waiting:
                return

    def poll(self) -> tuple[int, Exception | None]:
        """(position up to which entries are staged, 0 for none; the error of a pull that failed, if any)."""
        self._drain()
        position, error = 0, None
        for incoming in self._incoming:
            while incoming.copies and incoming.copies[0].done:
                ended = self._pop(incoming)
                incoming.failed |= ended.error is not None
                error = error or ended.error
        while self._incoming:
            first = self._incoming[0]
            if first.failed or first.copies or first.waiting:
                break
            self._incoming.popleft()
            self._staged[first.entry.position] = first
            position = first.entry.position
        return position, error

    def take(self, position: int) -> list[tuple[int, int]]:
        """(staging row, own slot) pairs of a staged entry that is being committed; `release` it when that has ended."""
        incoming = self._staged[position]
        return [(row, pull.slot) for row, pull in zip(incoming.rows, incoming.entry.pulls, strict=True)]

    def release(self, position: int) -> None:
        """The commit of an entry has ended on the device: its rows are free."""
        self._free += self._staged.pop(position).rows

    def finish(self) -> None:
        """The plan's last entry was decided."""
        self._plan = None

    def drop(self, committing: Sequence[int]) -> None:
        """The plan was dropped; entries that are being committed (their positions) keep their rows until released."""
        self._plan = None
        for position in [position for position in self._staged if position not in committing]:
            self._free += self._staged.pop(position).rows
        self._orphans += self._incoming
        self._incoming.clear()
        self._orphaned_since_s = time.monotonic()
        self._drain()

    def _drain(self) -> None:
        """See which pulls of dropped plans have ended, and give up those that do not end.

        A pull that was given up may read slots that commits overwrite, and write its rows. Neither does harm: nobody looks at
        what it copies, and its rows are none of ours any more. On this rank nothing else is staged then: no plan begins
        before this one has drained.
        """
        self._orphans = [orphan for orphan in self._orphans if not self._ended(orphan)]
        limit_s = self._settings.drain_deadline_s
        if not self._orphans or time.monotonic() - self._orphaned_since_s <= limit_s or self._staged or self._incoming:
            return
        if not self._transfer.abandon():
            return
        hung = sum(len(orphan.copies) for orphan in self._orphans)
        log.error("%d pulls of a dropped plan have not ended after %g s: given up", hung, limit_s)
        self.pulls_abandoned += hung
        self.bytes_in_flight, self._orphans = 0, []
        self._free = list(range(self._transfer.staging.num_rows))

    def _to_issue(self, plan: PreparedPlan, all_committed: int) -> Incoming | None:
        """The entry to issue copies for, the next one of the plan if that may begin; None if there is nothing to issue."""
        if self._incoming and self._incoming[-1].waiting:
            return self._incoming[-1]
        if self._next == plan.length:
            return None
        entry = plan.entries[self._next]
        if entry.previous and all_committed < counter(plan.generation, entry.previous):
            return None
        if len(entry.pulls) > len(self._free):
            return None
        return self._open(entry)

    def _open(self, entry: PreparedEntry) -> Incoming:
        """Make the plan's next entry the newest incoming one; there are rows for it."""
        rows = [self._free.pop() for _ in entry.pulls]
        row_bytes = self._transfer.weights.slot_bytes[entry.layer]
        incoming = Incoming(entry, rows, row_bytes, deque(zip(entry.pulls, rows, strict=True)))
        self._incoming.append(incoming)
        self._next += 1
        return incoming

    def _has_room(self, row_bytes: int) -> bool:
        return not self.bytes_in_flight or self.bytes_in_flight + row_bytes <= self._settings.pull_bytes_in_flight

    def _pop(self, incoming: Incoming) -> Completion[None]:
        """The oldest copy, which has ended."""
        self.bytes_in_flight -= incoming.row_bytes
        return incoming.copies.popleft()

    def _ended(self, orphan: Incoming) -> bool:
        while orphan.copies and orphan.copies[0].done:
            self._pop(orphan)
        if orphan.copies:
            return False
        self._free += orphan.rows
        return True

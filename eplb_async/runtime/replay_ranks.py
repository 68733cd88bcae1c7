"""The ranks of a replay: how long it takes until the entries of a plan are staged, and at which step each is committed.

The same rules as rank/stager.py and rank/agreement.py, for counts of rows instead of bytes: each rank pulls its rows in order, as many in
a step as `pull_bytes_per_step` and `copies_per_step` allow (at least one), while staging rows are free and not too many bytes are on their
way; a rank's rows arrive one after the other at its bandwidth. What all ranks have staged by step s is committed at step s + lag, one entry
a step; a layer's next entry is pulled only after the commit of the one before.

Left out: senders that are busy, pulls that fail, steps that are slow for once.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from eplb_async.core.config import HookSettings
from eplb_async.core.plan import Plan, PlanEntry

__all__ = ["ReplayRanks"]


@dataclass
class _Rank:
    """One rank: rows left to pull of the entry at `position`, free staging rows, (time of arrival, position) of rows on their way."""

    free: int
    position: int = 0
    waiting: int = 0
    link_free_us: float = 0.0
    coming: deque[tuple[float, int]] = field(default_factory=deque)

    def staged(self) -> int:
        """Entries all of whose rows are here."""
        if self.coming:
            return self.coming[0][1] - 1
        return self.position - 1 if self.waiting else self.position


class ReplayRanks:
    """All ranks of a group, for one plan after the other.

    Attributes:
        bytes_pulled: whose copies were issued, by all ranks.
    """

    def __init__(self, num_ranks: int, staging_rows: int, settings: HookSettings, bytes_per_us: float) -> None:
        """`bytes_per_us`: that one rank receives."""
        self._settings, self._bytes_per_us = settings, bytes_per_us
        self._ranks = [_Rank(staging_rows) for _ in range(num_ranks)]
        self._plan: Plan | None = None
        self._rows: list[list[int]] = []
        self._bytes: list[int] = []
        self._previous: list[int] = []
        self._committed = 0
        self._words: deque[int] = deque()
        self.bytes_pulled = 0

    @property
    def busy(self) -> bool:
        """True while a plan is active."""
        return self._plan is not None

    def publish(self, plan: Plan, slots_per_rank: int, slot_bytes: list[int]) -> None:
        """A plan is on the board; the last one has ended."""
        self._plan, self._committed = plan, 0
        self._rows = [
            np.bincount(entry.moves_M3[:, 2] // slots_per_rank, minlength=len(self._ranks)).tolist()
            for entry in plan.entries
        ]
        self._bytes = [slot_bytes[entry.layer] for entry in plan.entries]
        last: dict[int, int] = {}
        self._previous = []
        for position, entry in enumerate(plan.entries, 1):
            self._previous.append(last.get(entry.layer, 0))
            last[entry.layer] = position
        self._words.clear()
        for rank in self._ranks:
            rank.position = rank.waiting = 0

    def step(self, now_us: float) -> PlanEntry | None:
        """A step begins: the entry that is committed before its forward, if any. `busy` is false after the last one."""
        if self._plan is None:
            return None
        for rank in self._ranks:
            while rank.coming and rank.coming[0][0] <= now_us:
                rank.coming.popleft()
        self._words.append(min(rank.staged() for rank in self._ranks))
        entry = None
        all_committed = self._committed
        if len(self._words) > self._settings.lag and self._words.popleft() > self._committed:
            entry = self._plan.entries[self._committed]
            for rank, rows in zip(self._ranks, self._rows[self._committed], strict=True):
                rank.free += rows
            self._committed += 1
            if self._committed == len(self._plan.entries):
                self._plan = None
                return entry
        for index, rank in enumerate(self._ranks):
            self._pull(index, rank, all_committed, now_us)
        return entry

    def _pull(self, index: int, rank: _Rank, all_committed: int, now_us: float) -> None:
        settings = self._settings
        copies, left, spent = settings.copies_per_step, settings.pull_bytes_per_step, False
        while copies and self._open(index, rank, all_committed):
            size = self._bytes[rank.position - 1]
            while rank.waiting and copies and (left >= size or not spent):
                if rank.coming and (len(rank.coming) + 1) * size > settings.pull_bytes_in_flight:
                    return
                rank.link_free_us = max(rank.link_free_us, now_us) + size / self._bytes_per_us
                rank.coming.append((rank.link_free_us, rank.position))
                self.bytes_pulled += size
                rank.waiting, copies, left, spent = rank.waiting - 1, copies - 1, left - size, True
            if rank.waiting:
                return

    def _open(self, index: int, rank: _Rank, all_committed: int) -> bool:
        """True if the rank has rows to pull: of the entry it is at, or of the next one that it may begin."""
        while not rank.waiting:
            if rank.position == len(self._rows) or all_committed < self._previous[rank.position]:
                return False
            rows = self._rows[rank.position][index]
            if rows > rank.free:
                return False
            rank.free -= rows
            rank.waiting = rows
            rank.position += 1
        return True

"""One incarnation of one group, from the moment all its ranks are there until it ends.

Each look at the group, in this order, because each step relies on the one before:

    newest words   then what they cover is in the live placement
    publisher      follows the active plan; rows of the past become certain up to the words
    rings          records of steps that the words cover can be folded
    windows        closed for trigger and realised PAR
    decider        takes a proposal, starts a decision
"""

import asyncio
import contextlib
import fcntl
import logging
import os
from dataclasses import dataclass

from eplb_async.core.clock import Clock
from eplb_async.core.config import DaemonSettings, HookSettings
from eplb_async.core.errors import SegmentMissing, SegmentRefused
from eplb_async.core.plan import generation_of, position_of
from eplb_async.observability.history import DecisionHistory
from eplb_async.runtime.collector import READ_AT_ONCE, Collector, RingStatistics
from eplb_async.runtime.decider import Decider, GroupParts
from eplb_async.runtime.messages import GroupStatus, PlanProgress, RankStatus
from eplb_async.runtime.phase_load import weights_of
from eplb_async.runtime.pool import PolicyPool
from eplb_async.runtime.publisher import Publisher
from eplb_async.runtime.watchdog import gone_ranks, late_plan
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.live import LivePlacement
from eplb_async.shm.ring import LoadRing
from eplb_async.shm.segment import SHM_DIRECTORY, Segment
from eplb_async.shm.words import AgreementWords, Member, MemberState, Word

__all__ = ["GroupSession", "SessionContext", "joining_status"]

logger = logging.getLogger(__name__)

LIVENESS_S = 0.5
"""How often processes are looked at."""
MAX_STRETCH = 4
"""Most poll intervals between two looks at a quiet group."""
STATUS_DECISIONS = 8
"""Newest decisions in a status."""


@dataclass(frozen=True, kw_only=True)
class SessionContext:
    """What a session gets from the daemon. `hook`: what ranks of these settings do; `first_number`: of its first decision."""

    settings: DaemonSettings
    hook: HookSettings
    pool: PolicyPool
    history: DecisionHistory
    clock: Clock
    tasks: asyncio.TaskGroup
    first_number: int


class GroupSession:
    """All that the daemon does for one incarnation. Owned by the task that calls `run`, which also closes it."""

    def __init__(self, words: AgreementWords, context: SessionContext) -> None:
        """Open the group's other segments and adopt its state. Takes `words` over only if it does not raise.

        Raises:
            SegmentMissing, SegmentRefused: some rank has not made its segment yet, or it is not of this incarnation.
        """
        info, self._settings, self._clock = words.info, context.settings, context.clock
        self._words_map, self.group, self.incarnation = words, info.group, words.incarnation
        opened: list[PlanBoard | LivePlacement | LoadRing] = []
        try:
            opened.append(board := PlanBoard.open(info.group, words.incarnation))
            self._claim = _claim(board.segment)
            opened.append(live := LivePlacement.open(info.group, info.spec, words.incarnation))
            rings = {}
            for rank in range(info.spec.num_ranks):
                opened.append(ring := LoadRing.open(info.group, rank, words.incarnation))
                rings[rank] = ring
            self._newest: list[Word] = [self._first_word(rank) for rank in range(info.spec.num_ranks)]
            self.publisher = Publisher(board, live, self._newest, context.clock)
        except (SegmentMissing, SegmentRefused):
            for part in opened:
                part.close()
            if hasattr(self, "_claim"):
                os.close(self._claim)
            raise
        settings = context.settings
        sizes = (settings.window_steps, settings.num_windows)
        self.collector = Collector(info.spec, rings, self.publisher.rows, sizes)
        self.collector.serve(weights_of(settings))
        parts = GroupParts(
            words=words,
            board=board,
            publisher=self.publisher,
            hook=context.hook,
            collector=self.collector,
            pool=context.pool,
            history=context.history,
            clock=context.clock,
            tasks=context.tasks,
        )
        self.decider = Decider(parts, settings, context.first_number)
        self._board, self._live, self._history = board, live, context.history
        self._gone: dict[int, str] = {}
        self._next_liveness_s = 0.0
        self._stretch = 1
        self._num_records = min(ring.info.num_records for ring in rings.values())

    async def run(self) -> None:
        """Serve the group until its incarnation is over."""
        logger.info("group %s: incarnation %d of %d ranks", self.group, self.incarnation, len(self._newest))
        while True:  # shared memory has no event to wait for
            await self._look()
            if over := self._over():
                break
            await self._nap()
        logger.info("group %s: incarnation %d has ended: %s", self.group, self.incarnation, over)
        await self.decider.close(over)

    def configure(self, settings: DaemonSettings) -> None:
        """Take new settings."""
        self._settings = settings
        self.decider.configure(settings)
        self.collector.resize(settings.window_steps, settings.num_windows)
        self.collector.serve(weights_of(settings))

    async def close(self, why: str) -> None:
        """Drop all mappings; the ranks go on by themselves. Idempotent."""
        await self.decider.close(why)
        self.collector.close()
        self._board.close()
        self._live.close()
        self._words_map.close()
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1

    def status(self) -> GroupStatus:
        """What `eplb-async status` shows."""
        members = self._members()
        gone = gone_ranks(members)
        rings = self.collector.statistics()
        over = self._over()
        state = "ended" if over else "paused" if self.decider.paused else "serving"
        ranks = tuple(
            _rank_status(ring.rank, members[ring.rank], self._newest[ring.rank], ring, ring.rank in gone)
            for ring in rings
        )
        return GroupStatus(
            group=self.group,
            incarnation=self.incarnation,
            state=state,
            problems=tuple(gone.values()),
            ranks=ranks,
            par_live=self.decider.par_live if self.collector.windows else None,
            windows=len(self.collector.windows),
            window_steps=self._settings.window_steps,
            serves=self._settings.serve,
            phases=self.collector.phases.steps,
            phase_loads=self.collector.phase_status(self.publisher),
            lost_records=sum(ring.num_lost for ring in rings),
            generation=generation_of(self.publisher.committed),
            plan=self._plan_progress(),
            planning=self.decider.planning,
            shadow=self.decider.shadow_status(),
            cost=self.decider.costs.status(),
            decisions=tuple(self._history.newest(STATUS_DECISIONS)),
        )

    async def _look(self) -> None:
        self._newest = [self._words_map.newest(rank) or self._newest[rank] for rank in range(len(self._newest))]
        ended = self.publisher.observe(self._newest)
        self._look_for_gone()
        most = max([await self._drain(rank) for rank in range(len(self._newest))])
        self._adapt(most / self._num_records)
        new_windows = self.collector.complete(self._gone)
        self.decider.step(self._newest, ended, new_windows)
        if why := late_plan(self.publisher.active, self._clock.monotonic_s(), self._settings.plan_deadline_s):
            self.publisher.abort(why)

    async def _drain(self, rank: int) -> int:
        """Read one ring to its end, in parts between which the event loop runs; how many records."""

        def newest_step() -> int:
            return self._words_map.member(rank).newest_step

        total = part = self.collector.drain(rank, newest_step)
        while part == READ_AT_ONCE:
            await asyncio.sleep(0)
            total += (part := self.collector.drain(rank, newest_step))
        await asyncio.sleep(0)
        return total

    async def _nap(self) -> None:
        """Until the next look: soon while something is under way, less often while rings fill slowly."""
        interval_s = self._settings.poll_interval_s
        if not self.decider.busy:
            interval_s *= self._stretch
        self.decider.wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.decider.wake.wait(), interval_s)

    def _adapt(self, fullest: float) -> None:
        """A look has its own cost: stretch the time between them as long as no ring gets a quarter full."""
        if fullest > 0.25:
            self._stretch = 1
        elif fullest < 0.125:
            self._stretch = min(MAX_STRETCH, 2 * self._stretch)

    def _over(self) -> str:
        """Why the incarnation is over; "" while it is not."""
        if self._words_map.segment.replaced:
            return "its shared memory was replaced"
        if self._words_map.ended:
            return "a rank left or was replaced"
        if len(self._gone) == len(self._newest):
            return "all its ranks are gone"
        return ""

    def _members(self) -> list[Member]:
        return [self._words_map.member(rank) for rank in range(self._words_map.num_ranks)]

    def _first_word(self, rank: int) -> Word:
        word = self._words_map.newest(rank)
        if word is None:
            raise SegmentRefused(self._words_map.segment.name, f"no whole word of rank {rank}", "one of every rank")
        return word

    def _look_for_gone(self) -> None:
        """Each look at a process is a file of /proc: not at every poll."""
        now = self._clock.monotonic_s()
        if now < self._next_liveness_s:
            return
        self._next_liveness_s = now + LIVENESS_S
        gone = gone_ranks(self._members())
        for rank in sorted(gone.keys() - self._gone.keys()):
            logger.warning("group %s: %s", self.group, gone[rank])
        self._gone = gone

    def _plan_progress(self) -> PlanProgress | None:
        if (active := self.publisher.active) is None:
            return None
        return PlanProgress(
            generation=active.plan.generation,
            num_entries=len(active.plan.entries),
            staged=active.staged,
            committed=active.committed,
            age_s=self._clock.monotonic_s() - active.published_s,
            reason=active.abort_reason or active.plan.reason,
        )


def _claim(board: Segment) -> int:
    """A descriptor that keeps other daemons away from a board until it is closed; a board has one writer.

    Raises:
        SegmentMissing: the board went away.
        SegmentRefused: another daemon, of another runtime directory, serves the group.
    """
    try:
        claim = os.open(SHM_DIRECTORY / board.name[1:], os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SegmentMissing(board.name) from error
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(claim)
        raise SegmentRefused(board.name, "another daemon that writes it", "one daemon per group") from error
    return claim


def joining_status(words: AgreementWords) -> GroupStatus:
    """The status of a group whose ranks are not all there yet."""
    members = [words.member(rank) for rank in range(words.num_ranks)]
    waiting = [f"rank {rank} is {member.state.name.lower()}" for rank, member in enumerate(members)]
    ready = [member.state is MemberState.READY for member in members]
    return GroupStatus(
        group=words.info.group,
        incarnation=words.incarnation,
        state="joining",
        problems=tuple(text for text, fine in zip(waiting, ready, strict=True) if not fine),
        ranks=(),
    )


def _rank_status(rank: int, member: Member, word: Word, ring: RingStatistics, gone: bool) -> RankStatus:
    dead = gone and member.state in (MemberState.JOINING, MemberState.READY)
    return RankStatus(
        rank=rank,
        pid=member.pid,
        state="gone" if dead else member.state.name.lower(),
        step=word.step,
        staged=(generation_of(word.staged), position_of(word.staged)),
        committed=(generation_of(word.committed), position_of(word.committed)),
        records=ring.num_records,
        lost=ring.num_lost,
        missed=ring.num_missed,
        damaged=ring.num_damaged,
        unfolded=ring.num_unfolded,
        budget_bytes=ring.pace[0],
        pauses=ring.pace[1],
        slowdowns=ring.pace[2],
    )

"""Puts plans on the board when that is allowed, follows the ranks through them, and tells what came of them.

    NONE --(publish)--> ACTIVE --(all ranks committed (g + 1, 0))--> finished | dropped --> NONE

Only ranks decide (I11). The publisher reads their newest words and never writes one. It posts a plan only when

    the newest `committed` of every rank of this node covers the plan on the board (I13): board rows may be read by copies
    until then; all ranks stand at (g, 0), and g, the next generation, is theirs, not a count of ours
    the abort word is below g: an abort for g would drop the new plan at once

A plan that an earlier daemon left on the board and whose generation is not covered is aborted at the start: it may have
been half published, and nobody here knows why it was made. A daemon that dies between `post` and the first look at it
needs no other care: ranks finish or drop the plan by themselves (I6).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from eplb_async.core.clock import Clock
from eplb_async.core.errors import InternalError, PlanInvalid, SegmentRefused
from eplb_async.core.plan import (
    Plan,
    counter,
    decode_plan,
    encode_plan,
    generation_of,
    position_of,
    validate_dispatch,
)
from eplb_async.runtime.live_dispatch import LiveDispatch
from eplb_async.runtime.row_history import RowHistory
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.live import LivePlacement
from eplb_async.shm.words import Word

__all__ = ["ActivePlan", "PlanEnd", "Publisher"]

logger = logging.getLogger(__name__)


@dataclass
class ActivePlan:
    """A published plan on its way. Counts are entries that all ranks have staged, and have committed (device-complete)."""

    plan: Plan
    published_s: float
    staged: int = 0
    committed: int = 0
    first_stage_s: float | None = None
    abort_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class PlanEnd:
    """What came of a plan: how many of its entries were committed, all or not, and seconds since it was published."""

    plan: Plan
    finished: bool
    num_committed: int
    publish_to_first_stage_s: float | None
    publish_to_end_s: float
    why: str


class Publisher:
    """The board's writer for one incarnation of a group. Used by one task only."""

    def __init__(self, board: PlanBoard, live: LivePlacement, words: Sequence[Word], clock: Clock) -> None:
        """Adopt the running state.

        Args:
            board, live: of the incarnation.
            words: the newest of every rank.
            clock: for the times of a plan.

        Raises:
            SegmentRefused: the live placement cannot be read: its writer died in the middle, or is at it.
        """
        self._board, self._live, self._clock = board, live, clock
        self.active: ActivePlan | None = None
        self.committed = self._least_committed(words)
        if (snapshot := live.read()) is None:
            raise SegmentRefused(live.segment.name, "a row that is being written", "whole rows")
        self.rows_LP, self.version_L = snapshot
        self.rows = RowHistory(self.rows_LP, self.version_L, self.committed)
        self._on_board = 0
        self.dispatch = LiveDispatch(live.spec, self.rows_LP, self.version_L, self._abort_what_was_left())

    def may_publish(self, words: Sequence[Word]) -> int | None:
        """The generation that a plan may be published for now; None if none may."""
        committed = self._least_committed(words)
        generation = generation_of(committed)
        quiet = all(word.staged == committed and word.committed == committed for word in words)
        if self.active is not None or not quiet or position_of(committed):
            return None
        self._repair_abort(generation)
        if self._on_board >= generation or self._board.abort >= generation:
            return None
        return generation

    def publish(self, plan: Plan, words: Sequence[Word]) -> None:
        """Put a plan on the board.

        Args:
            plan: of the generation that `may_publish` gave.
            words: the newest of every rank.

        Raises:
            InternalError: it may not be published now.
            PlanInvalid: it does not fit the board.
        """
        if self.may_publish(words) != plan.generation:
            raise InternalError(f"plan of generation {plan.generation} may not be published now")
        self._board.post(plan.generation, encode_plan(plan))
        self._on_board = plan.generation
        self.active = ActivePlan(plan, self._clock.monotonic_s())
        logger.info("generation %d published: %d entries", plan.generation, len(plan.entries))

    def abort(self, reason: str) -> None:
        """Ask the ranks to drop the active plan; has no effect on one that they have finished."""
        if self.active is None or self.active.abort_reason:
            return
        self.active.abort_reason = reason
        self._board.order_abort(self.active.plan.generation)
        logger.warning("generation %d aborted: %s", self.active.plan.generation, reason)

    def observe(self, words: Sequence[Word]) -> PlanEnd | None:
        """Look at the newest words of every rank; what came of the active plan, once it has ended.

        Also moves `committed`, `rows_LP`, `version_L`, `rows` and `dispatch` on.
        """
        committed, active = self._least_committed(words), self.active
        if active is not None:
            self._progress(active, words)
        if committed == self.committed:
            return None
        # the words were read before: what they cover is in the snapshot, since a rank writes its live row first
        if (snapshot := self._live.read()) is None:
            return None  # the next look will do
        self.rows_LP, self.version_L = snapshot
        self.committed = committed
        plan = active.plan if active else None
        self.rows.advance(committed, self.rows_LP, self.version_L, plan)
        self.dispatch.advance(self.rows_LP, self.version_L, plan)
        if active is None or committed < counter(active.plan.generation + 1, 0):
            return None
        self.active = None
        return self._end(active)

    @staticmethod
    def _least_committed(words: Sequence[Word]) -> int:
        return min(word.committed for word in words)

    def _progress(self, active: ActivePlan, words: Sequence[Word]) -> None:
        generation, length = active.plan.generation, len(active.plan.entries)

        def position(packed: int) -> int:
            if generation_of(packed) == generation:
                return position_of(packed)
            return length if generation_of(packed) > generation else 0

        active.staged = max(active.staged, min(position(word.staged) for word in words))
        active.committed = max(active.committed, min(position(word.committed) for word in words))
        if active.first_stage_s is None and any(position(word.staged) for word in words):
            active.first_stage_s = self._clock.monotonic_s()

    def _end(self, active: ActivePlan) -> PlanEnd:
        generation, length = active.plan.generation, len(active.plan.entries)
        versions = self.version_L.tolist()
        reached = max((position_of(v) for v in versions if generation_of(v) == generation), default=0)
        finished, first = reached == length, active.first_stage_s
        if not finished:
            logger.warning("generation %d was dropped after %d of %d entries", generation, reached, length)
        return PlanEnd(
            plan=active.plan,
            finished=finished,
            num_committed=reached,
            publish_to_first_stage_s=None if first is None or not reached else first - active.published_s,
            publish_to_end_s=self._clock.monotonic_s() - active.published_s,
            why="" if finished else active.abort_reason or "dropped by the ranks",
        )

    def _repair_abort(self, generation: int) -> None:
        """No daemon aborts a generation before its number has come; ranks ignore such a word, and plans would wait for ever."""
        if not 0 <= (abort := self._board.abort) <= generation:
            logger.error("the abort word was damaged: it names generation %d, the ranks stand at %d", abort, generation)
            self._board.repair_abort(generation - 1)

    def _abort_what_was_left(self) -> Plan | None:
        """The plan that an earlier daemon left on the board, if it can be read, aborted if it is not over."""
        generation = generation_of(self.committed)
        self._repair_abort(generation)
        try:
            posted = self._board.read()
        except PlanInvalid as error:
            # the ranks refuse it as well; its generation cannot be told
            logger.warning("%s; generation %d is aborted", error, generation)
            self._board.order_abort(generation)
            return None
        if posted is None:
            return None
        if posted.generation > generation:
            # not by the rules: no rank can hold it, so it is no reason to wait
            logger.error("the board holds generation %d, the ranks stand at %d", posted.generation, generation)
            return None
        self._on_board = posted.generation
        if posted.generation == generation:
            logger.warning("generation %d of an earlier daemon is not over: aborted", posted.generation)
            self._board.order_abort(posted.generation)
        try:
            plan = decode_plan(posted.data)
            for entry in plan.entries:
                validate_dispatch(entry, self._live.spec)
        except PlanInvalid as error:
            logger.warning("the plan of an earlier daemon cannot be read: %s", error)
            return None
        return plan if plan.incarnation == self._board.segment.header.incarnation else None

"""The daemon's driver of a group's decisions: runs the policy in the pool, publishes, answers operators.

What is decided, when and why is in decisions.py, which the replay drives as well. Here is what waits: the worker of the
pool, the ranks that must be quiet before a plan may be published, and whoever asked for a rebalance.

At most one plan is active and one policy runs per group. An error of a policy fails its decision and nothing else.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from eplb_async.core.clock import Clock
from eplb_async.core.config import DaemonSettings, HookSettings
from eplb_async.core.errors import EplbError
from eplb_async.core.plan import generation_of
from eplb_async.observability.history import Decision, DecisionHistory, Outcome
from eplb_async.runtime.collector import Collector
from eplb_async.runtime.decisions import Decisions
from eplb_async.runtime.group_view import GroupFacts
from eplb_async.runtime.messages import ShadowStatus
from eplb_async.runtime.phase_load import weights_of
from eplb_async.runtime.planner import PlanProposal, PlanRequest
from eplb_async.runtime.pool import PolicyPool
from eplb_async.runtime.publisher import PlanEnd, Publisher
from eplb_async.runtime.shadow import Shadow
from eplb_async.runtime.step_costs import StepCosts
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.words import AgreementWords, Word

__all__ = ["Decider", "GroupParts"]


@dataclass(frozen=True, kw_only=True)
class GroupParts:
    """What a decision is made from and goes to."""

    words: AgreementWords
    board: PlanBoard
    publisher: Publisher
    hook: HookSettings
    collector: Collector
    pool: PolicyPool
    history: DecisionHistory
    clock: Clock
    tasks: asyncio.TaskGroup


@dataclass
class _Request:
    """An operator's request; `answer` gets the final Decision."""

    dry_run: bool
    answer: asyncio.Future[Decision] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Decider:
    """The decisions of one incarnation. Its methods are called by the session's task only, except `rebalance`.

    Attributes:
        costs: what steps take; goes on when shadow mode is switched.
    """

    def __init__(self, parts: GroupParts, settings: DaemonSettings, first_number: int) -> None:
        """`first_number`: of the first decision; the daemon counts on over incarnations."""
        self._parts = parts
        self.paused = False
        self.costs = StepCosts(parts.words.info.spec, parts.collector.load, parts.publisher)
        self._begin_book(settings, first_number)
        self.wake = asyncio.Event()
        self._requests: list[_Request] = []
        self._planning: asyncio.Task[PlanProposal | EplbError] | None = None
        self._answering: tuple[int, _Request | None] | None = None

    @property
    def next_number(self) -> int:
        """Of the next decision."""
        return self._decisions.next_number

    @property
    def par_live(self) -> float:
        """Mean PAR of the windows under the live placement; 1 without any."""
        return self._decisions.par_live

    @property
    def busy(self) -> bool:
        """True while a decision is under way, up to the end of its plan."""
        return self._decisions.open_number is not None

    @property
    def planning(self) -> bool:
        """True while a policy runs."""
        return self._planning is not None

    def configure(self, settings: DaemonSettings) -> None:
        """Take new settings."""
        if weights_of(settings) != weights_of(self._decisions.settings):
            self.costs.begin_anew()
        if settings.shadow == self._decisions.settings.shadow:
            self._decisions.settings = settings
            return
        self._decisions.finish(
            outcome=Outcome.UNKNOWN, why="shadow mode was switched " + ["off", "on"][settings.shadow]
        )
        self._answer()
        self._begin_book(settings, self.next_number)

    def shadow_status(self) -> ShadowStatus | None:
        """What plans would have gained that were not applied; None where they are."""
        return self._shadow.status() if self._shadow is not None else None

    async def rebalance(self, dry_run: bool) -> Decision:
        """Decide as soon as possible, whatever the trigger says; returns once the outcome is final."""
        request = _Request(dry_run)
        self._requests.append(request)
        self.wake.set()
        return await request.answer

    def step(self, words: Sequence[Word], ended: PlanEnd | None, new_windows: int) -> None:
        """One look: follow the active plan, take a finished proposal, start a decision if one is due.

        Args:
            words: the newest of every rank.
            ended: what came of the active plan, if it has just ended.
            new_windows: windows completed since the last look.
        """
        if self._shadow is not None:
            ended = self._shadow.observe(words)
            self._shadow.count(
                list(self._parts.collector.load.kept)[-new_windows:] if new_windows else (), self._parts.publisher
            )
        if ended is not None:
            self._decisions.follow_end(ended, max(word.step for word in words))
        self._decisions.look(min(word.step for word in words), new_windows, ended is not None)
        if self._planning is not None and self._planning.done():
            self._take_proposal(words)
        elif self._planning is None and not self.busy:
            self._maybe_start(words)
        self._answer()

    async def close(self, why: str) -> None:
        """The incarnation is over, or the daemon stops: end what is under way."""
        if self._planning is not None:
            self._planning.cancel()
            await asyncio.wait([self._planning])
            self._planning = None
        self._decisions.finish(outcome=Outcome.UNKNOWN, why=why)
        self._answer()
        for request in self._requests:
            if request.answer.done():
                continue  # nobody waits any more
            request.answer.set_exception(EplbError(f"the group has ended: {why}"))
        self._requests.clear()

    def _begin_book(self, settings: DaemonSettings, first_number: int) -> None:
        """Decisions under the live placement, or under a shadow's that begins there."""
        parts, info = self._parts, self._parts.words.info
        facts = GroupFacts(
            group=info.group,
            incarnation=parts.words.incarnation,
            spec=info.spec,
            staging_rows=info.staging_rows,
            slot_bytes=info.slot_bytes,
            capacity=parts.board.capacity,
        )
        self._shadow = Shadow(facts, parts.publisher, parts.hook, parts.clock) if settings.shadow else None
        self._target: Publisher | Shadow = self._shadow or parts.publisher
        live = self._shadow.live if self._shadow is not None else parts.publisher
        seen, record = (parts.collector.load, live), (parts.history, first_number)
        self._decisions = Decisions(facts, seen, settings, record, parts.clock, self.costs)

    def _maybe_start(self, words: Sequence[Word]) -> None:
        self._requests = [request for request in self._requests if not request.answer.done()]
        request = self._requests[0] if self._requests else None
        asked = "" if request is None else "operator (dry run)" if request.dry_run else "operator"
        # a plan that had to wait for a worker would be made from old windows
        trigger = self._decisions.due(asked, paused=self.paused)
        if trigger is None or not self._parts.pool.ready:
            return
        generation = self._target.may_publish(words)
        if generation is None:
            if request is None or not request.dry_run:
                return  # as soon as the ranks are quiet
            generation = generation_of(self._target.committed)
        if request is not None:
            self._requests.remove(request)
        self._answering = self._decisions.next_number, request
        plan_request = self._decisions.begin(trigger, generation)
        if plan_request is not None:
            name = f"plan {self._answering[0]}"
            self._planning = self._parts.tasks.create_task(self._plan(plan_request), name=name)

    async def _plan(self, request: PlanRequest) -> PlanProposal | EplbError:
        """An error is a result: raised, it would end the daemon's TaskGroup."""
        try:
            return await self._parts.pool.plan(request, self._decisions.settings.policy_deadline_s)
        except EplbError as error:
            return error
        finally:
            self.wake.set()

    def _take_proposal(self, words: Sequence[Word]) -> None:
        task, self._planning = self._planning, None
        if task is None or self._answering is None:
            return
        _, request = self._answering
        result = task.result()
        plan = self._decisions.judge(result, dry_run=request is not None and request.dry_run)
        if plan is None or isinstance(result, EplbError):
            return
        if self._target.may_publish(words) != plan.generation:
            self._decisions.finish(outcome=Outcome.FAILED, why="the ranks moved on while the policy ran")
            return
        self._target.publish(plan, words)
        self._decisions.published(result)

    def _answer(self) -> None:
        """Give an operator the final decision."""
        if self._answering is None or self.busy:
            return
        (number, request), self._answering = self._answering, None
        decision = self._parts.history.get(number)
        if request is not None and not request.answer.done() and decision is not None:
            request.answer.set_result(decision)

"""One decision after the other for one group: trigger, plan, publish, follow, measure, and write it all down.

    IDLE --(trigger)--> PLANNING --(entries)--> FOLLOWING --(plan ended)--> IDLE, and MEASURING on the windows after
                           `-----(nothing pays, dry run, error)--> IDLE

At most one plan is active and one policy runs per group. An error of a policy fails its decision and nothing else.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.clock import Clock
from eplb_async.core.config import DaemonSettings
from eplb_async.core.errors import EplbError
from eplb_async.core.plan import Plan, generation_of
from eplb_async.observability.history import Decision, DecisionHistory, Outcome
from eplb_async.policies.dispatch import wants_weights
from eplb_async.runtime.collector import Collector
from eplb_async.runtime.live_par import LivePar, mean_with_load
from eplb_async.runtime.planner import PackedArray, PlanProposal, PlanRequest
from eplb_async.runtime.pool import PolicyPool
from eplb_async.runtime.publisher import PlanEnd, Publisher
from eplb_async.runtime.trigger import TriggerState, decide
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.words import AgreementWords, Word

__all__ = ["Decider", "GroupParts"]

logger = logging.getLogger(__name__)

REALISED_WINDOWS = 4
"""Windows after a plan over which its realised PAR is averaged, unless the next plan comes first."""


@dataclass(frozen=True, kw_only=True)
class GroupParts:
    """What a decision is made from and goes to."""

    words: AgreementWords
    board: PlanBoard
    publisher: Publisher
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


@dataclass
class _Open:
    """The decision that is under way."""

    number: int
    triggered_s: float
    request: _Request | None
    loaded_L: NDArray[np.bool_]


class Decider:
    """The decisions of one incarnation. Its methods are called by the session's task only, except `rebalance`."""

    def __init__(self, parts: GroupParts, settings: DaemonSettings, first_number: int) -> None:
        """`first_number`: of the first decision; the daemon counts on over incarnations."""
        self._parts, self.settings = parts, settings
        self.paused = False
        self.next_number = first_number
        self.par_live = 1.0
        spec = parts.words.info.spec
        self._par = LivePar(spec.topology, spec.num_layers)
        self._step = self._decided_at = -1
        self.wake = asyncio.Event()
        self._requests: list[_Request] = []
        self._planning: asyncio.Task[PlanProposal | EplbError] | None = None
        self._open: _Open | None = None
        self._measuring: tuple[int, int] | None = None
        self._policy_state: tuple[str, bytes] = ("", b"")

    @property
    def busy(self) -> bool:
        """True while a decision is under way, up to the end of its plan."""
        return self._open is not None

    @property
    def planning(self) -> bool:
        """True while a policy runs."""
        return self._planning is not None

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
        self._step = min(word.step for word in words)
        if self._decided_at < 0:
            self._decided_at = self._step
        if ended is not None:
            self._follow_end(ended, max(word.step for word in words))
        if new_windows or ended is not None:
            self.par_live = mean_with_load(self._live_par())
        if new_windows:
            self._measure()
        if self._planning is not None and self._planning.done():
            self._take_proposal(words)
        elif self._planning is None and self._open is None:
            self._maybe_start(words)

    async def close(self, why: str) -> None:
        """The incarnation is over, or the daemon stops: end what is under way."""
        if self._planning is not None:
            self._planning.cancel()
            await asyncio.wait([self._planning])
            self._planning = None
        if self._open is not None:
            self._finish(outcome=Outcome.UNKNOWN, why=why)
        for request in self._requests:
            if request.answer.done():
                continue  # nobody waits any more
            request.answer.set_exception(EplbError(f"the group has ended: {why}"))
        self._requests.clear()

    def _maybe_start(self, words: Sequence[Word]) -> None:
        self._requests = [request for request in self._requests if not request.answer.done()]
        request = self._requests[0] if self._requests else None
        asked = "" if request is None else "operator (dry run)" if request.dry_run else "operator"
        state = TriggerState(
            requested=asked,
            paused=self.paused,
            steps=self._step - self._decided_at,
            interval_steps=self.settings.interval_steps,
            num_windows=len(self._parts.collector.windows),
            par_live=self.par_live,
            par_threshold=self.settings.par_threshold,
        )
        # a plan that had to wait for a worker would be made from old windows
        if (trigger := decide(state)) is None or not self._parts.pool.ready:
            return
        generation = self._parts.publisher.may_publish(words)
        if generation is None:
            if request is None or not request.dry_run:
                return  # as soon as the ranks are quiet
            generation = generation_of(self._parts.publisher.committed)
        if request is not None:
            self._requests.remove(request)
        self._start(trigger, generation, request)

    def _start(self, trigger: str, generation: int, request: _Request | None) -> None:
        parts, number = self._parts, self.next_number
        self.next_number += 1
        self._decided_at = self._step
        live_L = self._live_par()
        self._open = _Open(number, parts.clock.monotonic_s(), request, ~np.isnan(live_L))
        parts.history.put(
            Decision(
                number=number,
                group=parts.words.info.group,
                incarnation=parts.words.incarnation,
                generation=generation,
                time_unix_s=parts.clock.unix_s(),
                trigger=trigger,
                policy=self.settings.policy,
                outcome=Outcome.PLANNING,
                par_live=mean_with_load(live_L),
                par_live_L=_rounded(live_L),
            )
        )
        if not parts.collector.windows:
            why = f"no load yet: the first window is complete after {self.settings.window_steps} steps with traffic"
            self._finish(outcome=Outcome.FAILED, why=why)
            return
        self._planning = parts.tasks.create_task(self._plan(self._plan_request(generation)), name=f"plan {number}")

    async def _plan(self, request: PlanRequest) -> PlanProposal | EplbError:
        """An error is a result: raised, it would end the daemon's TaskGroup."""
        try:
            return await self._parts.pool.plan(request, self.settings.policy_deadline_s)
        except EplbError as error:
            return error
        finally:
            self.wake.set()

    def _plan_request(self, generation: int) -> PlanRequest:
        parts, settings = self._parts, self.settings
        info, publisher = parts.words.info, parts.publisher
        name, state = self._policy_state
        share_LP = publisher.dispatch.share_LP
        return PlanRequest(
            policy=settings.policy,
            options=settings.policy_options,
            state=state if name == settings.policy else b"",
            spec=info.spec,
            staging_rows=info.staging_rows,
            slot_bytes=info.slot_bytes,
            generation=generation,
            windows=PackedArray.pack(parts.collector.windows_TLE),
            placement=PackedArray.pack(publisher.rows_LP),
            versions=publisher.version_L.tolist(),
            share=None if share_LP is None else PackedArray.pack(share_LP),
            renew=publisher.dispatch.to_renew(wants_weights(settings.policy_options)),
            min_gain=settings.min_gain,
            capacity=parts.board.capacity,
        )

    def _take_proposal(self, words: Sequence[Word]) -> None:
        task, opened = self._planning, self._open
        self._planning = None
        if task is None or opened is None:
            return
        decide_s = self._parts.clock.monotonic_s() - opened.triggered_s
        proposal = task.result()
        if isinstance(proposal, EplbError):
            logger.error("group %s: decision %d failed: %s", self._parts.words.info.group, opened.number, proposal)
            self._finish(outcome=Outcome.FAILED, why=str(proposal), decide_s=decide_s)
            return
        self._parts.history.change(opened.number, decide_s=decide_s, **_numbers(proposal, opened.loaded_L))
        dry_run = opened.request is not None and opened.request.dry_run
        if not proposal.entries or dry_run:
            outcome = Outcome.DRY_RUN if proposal.entries else Outcome.NOTHING_PAYS
            self._finish(outcome=outcome, why=proposal.why)
            return
        if self._parts.publisher.may_publish(words) != proposal.generation:
            self._finish(outcome=Outcome.FAILED, why="the ranks moved on while the policy ran")
            return
        self._publish(proposal, opened, words)

    def _publish(self, proposal: PlanProposal, opened: _Open, words: Sequence[Word]) -> None:
        decision = self._parts.history.get(opened.number)
        plan = Plan(
            incarnation=self._parts.words.incarnation,
            generation=proposal.generation,
            entries=proposal.entries,
            policy=self.settings.policy[:256],
            reason=decision.trigger[:256] if decision else "",
            par_before=proposal.par_before,
            par_after=proposal.par_after,
            num_moves=proposal.num_moves,
            bytes_moved=proposal.bytes_moved,
            created_unix_s=self._parts.clock.unix_s(),
        )
        self._parts.publisher.publish(plan, words)
        self._policy_state = (self.settings.policy, proposal.state)
        self._measuring = None
        self._parts.history.change(opened.number, outcome=Outcome.PUBLISHED, why=proposal.why)

    def _follow_end(self, ended: PlanEnd, newest_step: int) -> None:
        if (opened := self._open) is None:
            return
        since_trigger = self._parts.clock.monotonic_s() - opened.triggered_s
        fields: dict[str, Any] = {"why": ended.why} if ended.why else {}
        if ended.num_committed:
            self._measuring = (opened.number, newest_step)
            fields["publish_to_last_commit_s"] = ended.publish_to_end_s
            fields["trigger_to_last_commit_s"] = since_trigger
        self._finish(
            outcome=Outcome.FINISHED if ended.finished else Outcome.DROPPED,
            num_committed=ended.num_committed,
            publish_to_first_stage_s=ended.publish_to_first_stage_s,
            **fields,
        )

    def _measure(self) -> None:
        """Realised PAR on the windows that began after the last commit."""
        if self._measuring is None:
            return
        (number, after_step), collector = self._measuring, self._parts.collector
        windows = [window for window in collector.windows if collector.first_step_of(window[0]) > after_step]
        if windows:
            publisher = self._parts.publisher
            realised_L = self._par.of(windows, publisher.rows_LP, publisher.dispatch.share_LP)
            mean = mean_with_load(realised_L)
            self._parts.history.change(number, par_realised=mean, par_realised_L=_rounded(realised_L))
        if len(windows) >= REALISED_WINDOWS:
            self._measuring = None

    def _finish(self, **fields: Any) -> None:
        opened, self._open = self._open, None
        if opened is None:
            return
        decision = self._parts.history.change(opened.number, **fields)
        if decision is not None:
            logger.info(
                "group %s: decision %d: %s %s", decision.group, decision.number, decision.outcome.value, decision.why
            )
        if opened.request is not None and not opened.request.answer.done() and decision is not None:
            opened.request.answer.set_result(decision)

    def _live_par(self) -> NDArray[np.float64]:
        publisher = self._parts.publisher
        return self._par.of(self._parts.collector.windows, publisher.rows_LP, publisher.dispatch.share_LP)


def _rounded(par_L: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in np.nan_to_num(par_L, nan=1.0))


def _numbers(proposal: PlanProposal, loaded_L: NDArray[np.bool_]) -> dict[str, Any]:
    after_L = np.array(proposal.par_after_L)
    return {
        "par_predicted": float(after_L[loaded_L].mean()) if loaded_L.any() else 1.0,
        "par_predicted_L": _rounded(after_L),
        "layers": tuple(proposal.layers),
        "num_entries": len(proposal.entries),
        "num_moves": proposal.num_moves,
        "bytes_moved": proposal.bytes_moved,
        "bytes_between_ranks": proposal.bytes_between_ranks,
        "policy_s": proposal.policy_s,
    }

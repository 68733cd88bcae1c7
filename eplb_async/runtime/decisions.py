"""The course of a group's decisions, without waiting for anything: what the daemon's session and the replay both drive.

    IDLE --due, begin--> PLANNING --judge--> FOLLOWING --follow_end--> IDLE, and MEASURING on the windows after
                            `----(nothing pays, dry run, error)--> IDLE

Whoever drives it runs the policy on the request of `begin`, publishes the plan of `judge`, and tells of every look at the
group. At most one decision is under way. No asyncio, no shared memory, no clock but the one given.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.clock import Clock
from eplb_async.core.config import DaemonSettings
from eplb_async.core.errors import EplbError
from eplb_async.core.plan import Plan
from eplb_async.core.score import par, rank_load
from eplb_async.observability.history import Decision, DecisionHistory, Outcome
from eplb_async.policies.dispatch import wants_weights
from eplb_async.runtime.gain_life import GainLife, PastPlan
from eplb_async.runtime.group_view import GroupFacts, LiveView, PlanOutcome
from eplb_async.runtime.live_par import LivePar, mean_with_load
from eplb_async.runtime.load_change import LoadChange
from eplb_async.runtime.planner import PackedArray, PlanProposal, PlanRequest
from eplb_async.runtime.regret import Regret, Revert
from eplb_async.runtime.step_costs import StepCosts
from eplb_async.runtime.trigger import TriggerState, decide
from eplb_async.runtime.windows import LoadWindows, Window

__all__ = ["Decisions"]

logger = logging.getLogger(__name__)

REALISED_WINDOWS = 4
"""Windows after a plan over which its realised PAR is averaged, unless the next plan comes first."""


@dataclass
class _Open:
    """The decision that is under way."""

    number: int
    triggered_s: float
    loaded_L: NDArray[np.bool_]
    may_revert: bool = True


class Decisions:
    """The decisions of one incarnation."""

    def __init__(
        self,
        facts: GroupFacts,
        seen: tuple[LoadWindows, LiveView],
        settings: DaemonSettings,
        record: tuple[DecisionHistory, int],
        clock: Clock,
        costs: StepCosts,
    ) -> None:
        """Nothing was decided yet.

        Args:
            facts: of the group.
            seen: the windows, and the live placement that they are judged under.
            settings: of the daemon; may be replaced between two looks.
            record: where decisions are written down, and the number of the first.
            clock: for times.
            costs: what steps take, under the placement that they run with.
        """
        self.facts, self.settings, self._clock, self.costs = facts, settings, clock, costs
        self._windows, self._live = seen
        self._history, self.next_number = record
        self.par_live = self._par_newest = 1.0
        self._par_reached, self._since_step = math.inf, 0
        self._par = LivePar(facts.spec.topology, facts.spec.num_layers)
        self._step = self._decided_at = -1
        self._open: _Open | None = None
        self._measuring: tuple[int, int] | None = None
        self._policy_state: tuple[str, bytes] = ("", b"")
        self._budget_bytes = float(settings.bytes_per_step * settings.budget_steps)

        def par_of(
            load: NDArray[Any], rows: NDArray[np.int32], share: NDArray[np.float64] | None
        ) -> NDArray[np.float64]:
            return par(rank_load(load, rows, facts.spec.topology, share))

        self.life, self.regret = GainLife(par_of, settings.window_steps), Regret(par_of, facts.spec.num_ranks)
        self._published: PastPlan | None = None
        self._change, self._decided_with = LoadChange(), settings
        self._load_change = self._worth_retrying = math.inf

    @property
    def open_number(self) -> int | None:
        """The number of the decision under way, up to the end of its plan."""
        return None if self._open is None else self._open.number

    def look(self, step: int, new_windows: int, placement_changed: bool) -> None:
        """What was seen of the group: the step all ranks have reached, windows completed, whether a plan has ended."""
        kept = self.settings.bytes_per_step * self.settings.budget_steps
        earned = self.settings.bytes_per_step * (step - self._step) if self._step >= 0 else 0
        self._budget_bytes = min(self._budget_bytes + earned, kept)
        self._step = step
        if self._decided_at < 0:
            self._decided_at = step
        if new_windows or placement_changed:
            self.par_live = mean_with_load(self._live_par())
        if new_windows:
            self.costs.look(new_windows)
            self._par_newest = mean_with_load(self._par_of(list(self._windows.kept)[-1:]))
            if self._open is None and self._windows.first_step_of(self._windows.kept[-1][0]) >= self._since_step:
                self._par_reached = min(self._par_reached, self._par_newest)
            self._measure()
            if self.settings.least_change:
                self._load_change = self._change.since(self._windows.kept)
                if self._load_change >= self.settings.least_change:
                    self._change.changed()
            for window in list(self._windows.kept)[-new_windows:]:
                self.life.window(window[1])
                self._judge_past(window)

    def due(self, requested: str = "", *, paused: bool = False) -> str | None:
        """Why to decide now; None if not, or while a decision is under way. `requested`: see TriggerState."""
        if self._open is not None:
            return None
        if not requested and not paused and (revert := self.regret.revert) is not None:
            if revert.rows(self._live.rows_LP) is not None:
                return revert.reason
            self.regret.revert = None  # other plans have changed these layers since
        return decide(
            TriggerState(
                requested=requested,
                paused=paused,
                steps=self._step - self._decided_at,
                interval_steps=self.settings.interval_steps,
                num_windows=len(self._windows.kept),
                par_live=self.par_live,
                par_threshold=self.settings.par_threshold,
                min_gap_steps=self.settings.min_gap_steps,
                par_newest=self._par_newest,
                par_reached=self._par_reached,
                par_drift=self.settings.par_drift,
                load_change=self._load_change if self._is_settled() else math.inf,
                least_change=self.settings.least_change,
            )
        )

    def begin(self, trigger: str, generation: int) -> PlanRequest | None:
        """A decision begins: what to ask the policy; None if it has failed already, for want of load.

        Args:
            trigger: why, for people.
            generation: that its plan would have.
        """
        facts, number = self.facts, self.next_number
        self.next_number += 1
        self._decided_at = self._step
        live_L = self._live_par()
        revert = self.regret.take(trigger)
        self._open = _Open(number, self._clock.monotonic_s(), ~np.isnan(live_L), may_revert=revert is None)
        self._history.put(
            Decision(
                number=number,
                group=facts.group,
                incarnation=facts.incarnation,
                generation=generation,
                time_unix_s=self._clock.unix_s(),
                step=self._step,
                trigger=trigger,
                policy=self.settings.policy,
                shadow=self.settings.shadow,
                outcome=Outcome.PLANNING,
                trust=round(self.regret.trust, 4),
                reverts=None if revert is None else revert.number,
                par_live=mean_with_load(live_L),
                par_live_L=_rounded(live_L),
            )
        )
        if not self._windows.kept:
            why = f"no load yet: the first window is complete after {self.settings.window_steps} steps with traffic"
            self.finish(outcome=Outcome.FAILED, why=why)
            return None
        return self._plan_request(generation) if revert is None else self._revert_request(generation, revert)

    def judge(self, result: PlanProposal | EplbError, *, dry_run: bool = False) -> Plan | None:
        """What the policy's answer leads to: a plan to publish, or None and the decision is final."""
        opened = self._open
        if opened is None:
            return None
        decide_s = self._clock.monotonic_s() - opened.triggered_s
        if isinstance(result, EplbError):
            logger.error("group %s: decision %d failed: %s", self.facts.group, opened.number, result)
            self.finish(outcome=Outcome.FAILED, why=str(result), decide_s=decide_s)
            return None
        time = self.costs.predicted(result) if result.entries else {}
        decision = self._history.change(opened.number, decide_s=decide_s, **_numbers(result, opened.loaded_L), **time)
        refusal = ""
        if self.settings.weigh_time and opened.may_revert:  # what was shown to be better needs no gain
            life_steps = self._expected_life() * self.settings.window_steps
            refusal = self.costs.refusal(time, life_steps, self.regret.trust)
        if not result.entries or dry_run or refusal:
            if not dry_run:
                self._decided_on(result, is_refused=bool(refusal))
            outcome = Outcome.DRY_RUN if result.entries and dry_run else Outcome.NOTHING_PAYS
            self.finish(outcome=outcome, why=refusal or result.why)
            return None
        return Plan(
            incarnation=self.facts.incarnation,
            generation=result.generation,
            entries=result.entries,
            policy=self.settings.policy[:256],
            reason=decision.trigger[:256] if decision else "",
            par_before=result.par_before,
            par_after=result.par_after,
            num_moves=result.num_moves,
            bytes_moved=result.bytes_moved,
            created_unix_s=self._clock.unix_s(),
        )

    def published(self, proposal: PlanProposal) -> None:
        """The plan that `judge` made of this proposal is on the board."""
        self._policy_state = (self.settings.policy, proposal.state)
        self._decided_on(proposal)
        self._measuring = None
        self._budget_bytes -= proposal.bytes_moved
        layers, share_LP = sorted(set(proposal.layers)), self._live.dispatch.share_LP
        self._published = PastPlan(
            layers=layers,
            predicted=sum(proposal.par_before_L[layer] - proposal.par_after_L[layer] for layer in layers),
            before_NP=self._live.rows_LP[layers],
            after_NP=self._live.rows_LP[layers],
            before_share_NP=None if share_LP is None else share_LP[layers],
        )
        if self._open is not None:
            self.costs.publish(self._open.number)
            self._history.change(self._open.number, outcome=Outcome.PUBLISHED, why=proposal.why)

    def follow_end(self, ended: PlanOutcome, newest_step: int) -> None:
        """The plan has ended; windows that begin after `newest_step` tell what it brought."""
        if (opened := self._open) is None:
            return
        self._since_step = newest_step + 1
        since_trigger = self._clock.monotonic_s() - opened.triggered_s
        fields: dict[str, Any] = {"why": ended.why} if ended.why else {}
        if not ended.finished:
            self._change.forget()
            self._load_change = math.inf
            self.costs.leave_out(newest_step)
        if ended.finished and (plan := self._published) is not None:
            share_LP = self._live.dispatch.share_LP
            plan.after_NP = self._live.rows_LP[plan.layers]
            plan.after_share_NP = None if share_LP is None else share_LP[plan.layers]
            self.life.follow(plan)
            self.regret.follow(opened.number, plan, newest_step + 1, may_revert=opened.may_revert)
        if ended.num_committed:
            self._measuring = (opened.number, newest_step)
            fields["publish_to_last_commit_s"] = ended.publish_to_end_s
            fields["trigger_to_last_commit_s"] = since_trigger
        self.finish(
            outcome=Outcome.FINISHED if ended.finished else Outcome.DROPPED,
            num_committed=ended.num_committed,
            publish_to_first_stage_s=ended.publish_to_first_stage_s,
            **fields,
        )

    def finish(self, **fields: Any) -> None:
        """The decision under way is final, with these fields of Decision."""
        opened, self._open = self._open, None
        if opened is None:
            return
        # what a decision could not mend is no reason for the next
        self._par_reached = math.inf
        decision = self._history.change(opened.number, **fields)
        if decision is not None:
            logger.info(
                "group %s: decision %d: %s %s", decision.group, decision.number, decision.outcome.value, decision.why
            )

    def _plan_request(self, generation: int) -> PlanRequest:
        facts, settings, live, trust = self.facts, self.settings, self._live, self.regret.trust
        name, state = self._policy_state
        share_LP = live.dispatch.share_LP
        return PlanRequest(
            policy=settings.policy,
            options=settings.policy_options,
            state=state if name == settings.policy else b"",
            spec=facts.spec,
            staging_rows=facts.staging_rows,
            slot_bytes=facts.slot_bytes,
            generation=generation,
            windows=PackedArray.pack(self._windows.windows_TLE),
            placement=PackedArray.pack(live.rows_LP),
            versions=live.version_L.tolist(),
            share=None if share_LP is None else PackedArray.pack(share_LP),
            renew=live.dispatch.to_renew(wants_weights(settings.policy_options)),
            # a gain that is trusted by half has to be twice as much
            min_gain=settings.min_gain / trust,
            capacity=facts.capacity,
            budget_bytes=int(self._budget_bytes) if settings.bytes_per_step else None,
            price=settings.move_cost / max(self._expected_life() * settings.window_steps, 1.0) / trust,
            confidence=settings.confidence / trust,
            fitted_memory=settings.memory == "fitted",
        )

    def _expected_life(self) -> float:
        """Windows that gains are expected to live: as past ones did, and at least as long as the traffic that is known to stay."""
        if not self.settings.least_change or not self._windows.kept:
            return self.life.windows
        return max(self.life.windows, float(self._change.stayed(self._windows.kept[-1][0])))

    def _is_settled(self) -> bool:
        """False where the same load may be decided on otherwise: with other settings, other things pay, and so they do once load has stayed for long."""
        return self._decided_with == self.settings and self._expected_life() < self._worth_retrying

    def _revert_request(self, generation: int, revert: Revert) -> PlanRequest:
        """Back to rows that were better, as far as they are on the windows since: what was shown needs no price."""
        since = [load for at, load in self._windows.kept if self._windows.first_step_of(at) >= revert.first_step]
        return msgspec.structs.replace(
            self._plan_request(generation),
            windows=PackedArray.pack(np.array(since or [self._windows.kept[-1][1]], dtype=np.float64)),
            min_gain=self.settings.min_gain,
            price=0.0,
            confidence=0.0,
            revert=PackedArray.pack(revert.target(self._live.rows_LP)),
        )

    def _judge_past(self, window: Window) -> None:
        """A window tells what past plans brought."""
        first_step, settings = self._windows.first_step_of(window[0]), self.settings
        for verdict in self.regret.window(first_step, window[1], settings.regret_windows, settings.min_gain):
            self._history.change(
                verdict.number,
                gain_predicted=round(verdict.predicted, 4),
                gain_realised=round(verdict.realised, 4),
                gain_noise=round(verdict.noise, 4),
                trust_after=round(verdict.trust, 4),
                verdict=verdict.text,
                **self.costs.realised(verdict.number, verdict.first_step, settings.regret_windows),
            )
            logger.info(
                "group %s: decision %d %s; trust %.2f", self.facts.group, verdict.number, verdict.text, verdict.trust
            )

    def _decided_on(self, proposal: PlanProposal, *, is_refused: bool = False) -> None:
        """While load stays as it was in the windows of this proposal, there is nothing to decide again, if that was all there was to gain."""
        kept, self._decided_with = list(self._windows.kept), self.settings
        gain = sum(proposal.par_before_L) - sum(proposal.par_after_L)
        unsure = proposal.uncertain > gain and proposal.num_windows < self.settings.num_windows
        if proposal.num_left_out or unsure or not kept:
            self._change.undecided(kept[-1][0] if kept else -1)
        else:
            self._change.decided(kept[-proposal.num_windows :], kept[-1][0])
        # else traffic that stays might be left as it is for ever: with each retry, half the price
        self._worth_retrying = math.inf if proposal.entries and not is_refused else 2 * self._expected_life()
        self._load_change = self._change.since(kept)

    def _measure(self) -> None:
        """Realised PAR on the windows that began after the last commit."""
        if self._measuring is None:
            return
        number, after_step = self._measuring
        windows = [window for window in self._windows.kept if self._windows.first_step_of(window[0]) > after_step]
        if windows:
            realised_L = self._par_of(windows)
            mean = mean_with_load(realised_L)
            self._history.change(number, par_realised=mean, par_realised_L=_rounded(realised_L))
        if len(windows) >= REALISED_WINDOWS:
            self._measuring = None

    def _live_par(self) -> NDArray[np.float64]:
        return self._par_of(self._windows.kept)

    def _par_of(self, windows: Sequence[Window]) -> NDArray[np.float64]:
        return self._par.of(windows, self._live.rows_LP, self._live.dispatch.share_LP)


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

"""A recorded trace against the daemon's own decisions, in closed loop: what would have been live when, and what that had cost.

    steps of the trace   balance and time under the placement that is live, then summed into windows
    windows              the daemon's (LoadWindows)
    decisions            the daemon's (Decisions): trigger, policy, planner, history; the policy's answer comes after `decide_us`
    ranks                ReplayRanks: pacing, staging, lag, one commit a step

The clock is the sum of the steps' times, so nothing depends on this machine. A step takes, summed over layers, `token_us` for each token of
the busiest rank, and `fixed_us`; transfers run beside it, or make it longer by `mib_us`; a commit holds it up for `stall_us`. These times go into
windows, and so into the fit that decisions weigh (StepCosts), as those of real steps do.

In the daemon a decision may begin at any look. Here it begins at the end of a window, where there is something new to decide on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.config import Settings
from eplb_async.core.cost import StepCost
from eplb_async.core.errors import EplbError
from eplb_async.core.placement import initial_placement
from eplb_async.core.plan import Plan, counter
from eplb_async.core.spec import MoESpec
from eplb_async.observability.history import DecisionHistory, Outcome
from eplb_async.observability.replay_report import ReplayReport
from eplb_async.runtime.decisions import Decisions
from eplb_async.runtime.group_view import GroupFacts
from eplb_async.runtime.modelled_live import ModelledLive
from eplb_async.runtime.planner import PlanProposal, make_plan
from eplb_async.runtime.replay_ranks import ReplayRanks
from eplb_async.runtime.replay_trace import Spans, StretchedTrace
from eplb_async.runtime.step_costs import StepCosts
from eplb_async.runtime.step_times import WindowTimes
from eplb_async.runtime.windows import LoadWindows
from eplb_async.shm.board import plan_capacity

__all__ = ["Replay", "ReplayCosts", "replay_all"]

SERIES_POINTS = 600


@dataclass(frozen=True, kw_only=True)
class ReplayCosts:
    """What things take.

    Fields:
        token_us: of the busiest rank, for each of its tokens, in each layer.
        fixed_us: rest of a step.
        bytes_per_us: that each rank receives beside the forward.
        stall_us: by which a commit holds its step up.
        mib_us: by which each MiB that is pulled, by all ranks together, makes its step longer.
        decide_us: from a trigger to the proposal.
    """

    token_us: float = 0.06
    fixed_us: float = 10_000.0
    bytes_per_us: float = 50_000.0
    stall_us: float = 50.0
    decide_us: float = 50_000.0
    mib_us: float = 0.0


class _Clock:
    """The replayed time."""

    now_us = 0.0

    def monotonic_s(self) -> float:
        """Since the first step."""
        return self.now_us / 1e6

    def unix_s(self) -> float:
        """The same: a replay has no date."""
        return self.now_us / 1e6


@dataclass(frozen=True)
class _PlanEnd:
    """See publisher.PlanEnd: here plans always finish."""

    num_committed: int
    publish_to_end_s: float
    publish_to_first_stage_s: float | None = None
    finished: bool = True
    why: str = ""


class Replay:
    """One configuration on its way through a trace. Every call to `feed` takes it some steps further."""

    def __init__(self, name: str, settings: Settings, spec: MoESpec, slot_bytes: int, costs: ReplayCosts) -> None:
        """At the first step, with the initial placement and no windows. `slot_bytes`: of one expert in one layer."""
        hook, daemon = settings.hook, settings.daemon
        self._name, self._settings, self._spec, self._costs = name, settings, spec, costs
        self._clock, self._live = _Clock(), ModelledLive(spec, initial_placement(spec))
        staging_rows = hook.staging_rows or spec.slots_per_rank
        facts = GroupFacts(
            group=name,
            incarnation=1,
            spec=spec,
            staging_rows=staging_rows,
            slot_bytes=[slot_bytes] * spec.num_layers,
            capacity=plan_capacity(spec),
        )
        self._facts, self._history = facts, DecisionHistory(1 << 30)
        self._windows = LoadWindows((spec.num_layers, spec.num_experts), daemon.window_steps, daemon.num_windows)
        self._decisions = Decisions(
            facts,
            (self._windows, self._live),
            daemon,
            (self._history, 0),
            self._clock,
            StepCosts(spec, self._windows, self._live),
        )
        self._decisions.look(0, 0, False)
        self._ranks = ReplayRanks(spec.num_ranks, staging_rows, hook, costs.bytes_per_us)
        self._initial_LER = self._live.part_LER.copy()
        self._open_LE = np.zeros((spec.num_layers, spec.num_experts), dtype=np.int64)
        self._open_us, self._open_bytes, self._open_versions = 0.0, 0, [(0, 0)]
        self._generation, self._step = 1, 0
        self._proposal: PlanProposal | EplbError | None = None
        self._proposal_due_us = self._published_s = 0.0
        self._plan: Plan | None = None
        self._position = 0
        self._measured: list[NDArray[np.float64]] = []
        self._ideal_us = self._stall_us = 0.0
        self._behind_steps: list[int] = []

    def feed(self, spans: Spans) -> None:
        """Replay these steps, which follow those of the call before.

        Raises:
            ValueError: a window of the configuration does not end with a span.
        """
        if self._windows.steps % spans.every:
            raise ValueError(f"windows of {self._windows.steps} steps do not consist of spans of {spans.every}")
        first = 0
        while first < len(spans):
            rest = self._windows.steps - self._step % self._windows.steps
            num = min(len(spans) - first, rest // spans.every)
            if self._ranks.busy or self._proposal is not None:
                num = 1  # the placement may change, or a plan begin, at each step
            part = slice(first, first + num)
            self._run(spans.first_KLE[part], spans.every)
            self._open_LE += spans.total_KLE[part].sum(axis=0)
            self._look()
            first += num

    @property
    def cost(self) -> StepCost | None:
        """What decisions know of the time of steps."""
        return self._decisions.costs.cost

    @property
    def rows_LP(self) -> NDArray[np.int32]:
        """The placement as it is now."""
        return self._live.rows_LP

    def report(self) -> ReplayReport:
        """What came of it so far."""
        measured_M4 = np.concatenate(self._measured)
        decisions = self._history.newest()
        plans = [decision for decision in decisions if decision.outcome in (Outcome.FINISHED, Outcome.PUBLISHED)]
        moved, shown = sum(plan.bytes_moved for plan in plans), max(1, len(measured_M4) // SERIES_POINTS)
        return ReplayReport(
            name=self._name,
            policy=self._settings.daemon.policy,
            num_steps=self._step,
            num_measured=len(measured_M4),
            par_mean=float(measured_M4[:, 1].mean()),
            par_p99=float(np.quantile(measured_M4[:, 1], 0.99)),
            par_initial=float(measured_M4[:, 2].mean()),
            num_plans=len(plans),
            num_decisions=len(decisions),
            moves=sum(plan.num_moves for plan in plans),
            bytes_moved=moved,
            bytes_per_step=moved / self._step,
            total_s=self._clock.monotonic_s(),
            ideal_s=self._ideal_us / 1e6,
            stall_s=self._stall_us / 1e6,
            behind_steps=float(np.mean(self._behind_steps)) if self._behind_steps else 0.0,
            decisions=decisions,
            series=[
                (int(measured_M4[at, 0]), round(float(measured_M4[at : at + shown, 1].mean()), 4))
                for at in range(0, len(measured_M4), shown)
            ],
        )

    def _run(self, first_KLE: NDArray[np.int64], every: int) -> None:
        """Spans, of which only the last may see a commit: then there is only one."""
        begun_us = self._clock.now_us
        stall_us = self._commit(0)
        load_LKE = first_KLE.transpose(1, 0, 2).astype(np.float64)
        load_LKR = load_LKE @ self._live.part_LER
        peak_LK, mean_LK = load_LKR.max(axis=2), load_LKE.sum(axis=2) / self._spec.num_ranks
        initial_LK = (load_LKE @ self._initial_LER).max(axis=2)
        step_us_K = self._costs.token_us * peak_LK.sum(axis=0) + self._costs.fixed_us
        ideal_us_K = self._costs.token_us * mean_LK.sum(axis=0) + self._costs.fixed_us
        self._ideal_us += float(ideal_us_K.sum()) * every
        steps_K = self._step + every * np.arange(len(first_KLE), dtype=np.float64)
        rows = [steps_K, _mean_par(peak_LK, mean_LK), _mean_par(initial_LK, mean_LK), step_us_K]
        self._measured.append(np.stack(rows, axis=1))
        self._clock.now_us += float(step_us_K.sum())
        rest = every - 1
        while rest and self._ranks.busy:
            stall_us += self._commit(every - rest)
            self._clock.now_us += float(step_us_K[-1])
            rest -= 1
        self._clock.now_us += float(step_us_K.sum()) * rest
        self._step += len(first_KLE) * every
        self._stall_us += stall_us
        self._clock.now_us += stall_us
        self._open_us += self._clock.now_us - begun_us

    def _commit(self, ahead: int) -> float:
        """A step begins, so many ahead of the last that were counted; by how much a commit and pulls make it longer."""
        if self._plan is None:
            return 0.0
        before = self._ranks.bytes_pulled
        entry = self._ranks.step(self._clock.now_us)
        pulled = self._ranks.bytes_pulled - before
        self._open_bytes += pulled
        longer_us = self._costs.mib_us * pulled / (1 << 20)
        if entry is None:
            return longer_us
        self._position += 1
        assert entry is self._plan.entries[self._position - 1]
        self._live.commit(self._plan, self._position)
        at = (self._step + ahead) % self._windows.steps
        self._open_versions.append((at, counter(self._plan.generation, self._position)))
        return longer_us + self._costs.stall_us

    def _look(self) -> None:
        """What the daemon does when it looks at the group."""
        window, rest = divmod(self._step, self._windows.steps)
        new = 0
        if not rest:
            new = int(self._windows.add(window - 1, self._open_LE, self._times()))
            self._open_LE = np.zeros_like(self._open_LE)
            self._open_us, self._open_bytes, self._open_versions = 0.0, 0, [(0, self._open_versions[-1][1])]
        ended = self._plan is not None and not self._ranks.busy
        if ended and self._plan is not None:
            since_s = self._clock.monotonic_s() - self._published_s
            self._decisions.follow_end(_PlanEnd(len(self._plan.entries), since_s), self._step)
            self._plan = None
            self._generation += 1
            self._behind_steps.append(self._step - self._history.newest(1)[0].step)
        self._decisions.look(self._step, new, ended)
        if self._proposal is not None and self._clock.now_us >= self._proposal_due_us:
            self._publish()
        elif new and (trigger := self._decisions.due()):
            self._begin(trigger)

    def _times(self) -> WindowTimes:
        """Of the window that is complete."""
        steps = self._windows.steps
        return WindowTimes(
            num_steps=steps,
            num_timed=steps,
            step_us=self._open_us / steps,
            pulled_bytes=self._open_bytes,
            num_commits=len(self._open_versions) - 1,
            versions=tuple(self._open_versions),
        )

    def _begin(self, trigger: str) -> None:
        request = self._decisions.begin(trigger, self._generation)
        if request is None:
            return
        self._proposal_due_us = self._clock.now_us + self._costs.decide_us
        try:
            self._proposal = make_plan(request)
        except EplbError as error:
            self._proposal = error

    def _publish(self) -> None:
        proposal, self._proposal = self._proposal, None
        if proposal is None or (plan := self._decisions.judge(proposal)) is None:
            return
        if isinstance(proposal, PlanProposal):
            self._decisions.published(proposal)
        self._plan, self._position, self._published_s = plan, 0, self._clock.monotonic_s()
        self._ranks.publish(plan, self._spec.slots_per_rank, self._facts.slot_bytes)


def replay_all(trace: StretchedTrace, replays: Sequence[Replay], progress: Callable[[int], None]) -> list[ReplayReport]:
    """Take all configurations through the trace, side by side on the same steps.

    Args:
        trace: the steps.
        replays: at their first step.
        progress: is told of steps done, now and then.
    """
    for spans in trace.spans():
        for one in replays:
            one.feed(spans)
        progress(spans.first_step + len(spans) * spans.every)
    return [one.report() for one in replays]


def _mean_par(peak_LK: NDArray[np.float64], mean_LK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the layers with load of peak / mean; 1 for a step without any."""
    loaded_LK = mean_LK > 0
    par_LK = np.where(loaded_LK, peak_LK / np.where(loaded_LK, mean_LK, 1.0), 0.0)
    num_K = loaded_LK.sum(axis=0)
    return np.where(num_K > 0, par_LK.sum(axis=0) / np.maximum(num_K, 1), 1.0)

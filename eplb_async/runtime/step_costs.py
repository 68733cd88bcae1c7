"""Milliseconds of a group: windows go into the fit of core/cost.py, and what plans save and cost comes out of it.

    window: load, step times, bytes, commits  -->  tokens of the busiest rank per step, under the rows that were live  -->  fit
    proposal: PAR before and after            -->  tokens less on the busiest rank x ms of a token                     -->  ms saved per step
              bytes and commits               -->  x their ms, as far as they are sure                                 -->  ms that the moves cost

Both are None until the fit knows what tokens cost; then everything goes by tokens, as without it. What plans really changed is told by step
times alone: the mean of the last windows before in which nothing moved, and of the first windows after.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.cost import BYTES, COMMITS, EVEN, FIXED, TOKENS, CostFit, StepCost
from eplb_async.core.score import even_share, rank_load
from eplb_async.core.spec import MoESpec
from eplb_async.runtime.group_view import LiveView
from eplb_async.runtime.messages import CostStatus
from eplb_async.runtime.proposal import PlanProposal
from eplb_async.runtime.step_times import WindowTimes
from eplb_async.runtime.windows import LoadWindows, Window

__all__ = ["StepCosts"]

BEFORE = 4
"""Windows before a plan whose steps its own are compared with."""
MOST_PLANS = 16
"""For which the time before is remembered, until they are judged."""


class StepCosts:
    """The fit of one incarnation. Used by one task only."""

    def __init__(self, spec: MoESpec, windows: LoadWindows, live: LiveView) -> None:
        """`live`: the placement that steps run with; not a shadow's."""
        self._spec, self._windows, self._live = spec, windows, live
        self._fit = CostFit()
        self._known: tuple[NDArray[np.int32] | None, NDArray[np.float64] | None] = (None, None)
        self._before = self._now
        self._seen_step, self._left_out = -1, -1
        self._before_ms: OrderedDict[int, float] = OrderedDict()

    @property
    def cost(self) -> StepCost | None:
        """The fit so far; None before the first."""
        return self._fit.cost

    @property
    def num_windows(self) -> int:
        """With step times, so far."""
        return self._fit.num_windows

    def status(self) -> CostStatus | None:
        """For people; None before the first fit."""
        if (cost := self._fit.cost) is None:
            return None
        error_ms = cost.errors[TOKENS] * cost.parts_ms[TOKENS] / cost.token_ms if cost.token_ms else None
        return CostStatus(
            windows=cost.num_windows,
            known=cost.known,
            step_ms=cost.step_ms,
            fixed_ms=cost.parts_ms[FIXED],
            even_ms=cost.parts_ms[EVEN],
            tokens_ms=cost.parts_ms[TOKENS],
            tokens_error_ms=error_ms,
            pulls_ms=cost.parts_ms[BYTES],
            commits_ms=cost.parts_ms[COMMITS],
        )

    def look(self, num_new: int) -> None:
        """So many windows are complete since the last look; commits of plans were seen before."""
        for window in list(self._windows.kept)[-num_new:]:
            times = self._windows.times.get(window[0])
            first_step = self._windows.first_step_of(window[0])
            if first_step <= self._seen_step or times is None:
                continue
            self._seen_step = first_step
            tokens = self._tokens(window, times.versions)
            if times.num_timed and times.num_steps and first_step > self._left_out:
                moved = times.pulled_bytes, times.num_commits
                even = float(window[1].sum()) / self._spec.num_ranks
                mean = [value / times.num_steps for value in (tokens, even, *moved)]
                self._fit.add(mean[0], mean[1], mean[2], mean[3], times.step_us / 1e3)

    def begin_anew(self) -> None:
        """Windows are of other steps from now on."""
        self._fit = CostFit()

    def leave_out(self, newest_step: int) -> None:
        """A plan was dropped: windows that had begun by then tell of other things than its moves."""
        self._left_out = newest_step

    def predicted(self, proposal: PlanProposal) -> dict[str, Any]:
        """Fields of Decision: what the plan saves per step and costs in all, and by which fit; none while that is not known."""
        cost, steps = self._fit.cost, self._steps_of(proposal)
        if cost is None or not cost.known or not steps:
            return {}
        saved_L = np.array(proposal.par_before_L) - np.array(proposal.par_after_L)
        windows = list(self._windows.kept)[-proposal.num_windows :]
        mean_L = np.sum([load_LE.sum(axis=1) for _, load_LE in windows], axis=0) / steps / self._spec.num_ranks
        share = 100 * cost.parts_ms[TOKENS] / cost.step_ms
        return {
            "saved_ms_per_step": cost.token_ms * float(saved_L @ mean_L),
            "moving_ms": cost.moving_ms(proposal.bytes_moved, len(proposal.entries)),
            "cost_fit": f"{cost.num_windows} windows: tokens are {share:.0f} +- {share * cost.errors[TOKENS] / cost.token_ms:.0f} % of {cost.step_ms:.2f} ms",
        }

    def refusal(self, predicted: dict[str, Any], life_steps: float, trust: float) -> str:
        """Why a plan of these predictions is not to be made; "" if it is, or if nothing is known."""
        if not predicted:
            return ""
        saved, moving_ms = predicted["saved_ms_per_step"] * trust, predicted["moving_ms"]
        if saved * life_steps >= moving_ms:
            return ""
        return (
            f"would cost more than it brings: {saved:.3f} ms per step for {life_steps:.0f} steps against {moving_ms:.1f} ms of moves "
            f"({predicted['cost_fit']})"
        )

    def publish(self, number: int) -> None:
        """The plan of that decision begins now."""
        quiet = [times for times in self._windows.times.values() if not times.pulled_bytes and not times.num_commits]
        if (before_ms := _mean_ms(quiet[-BEFORE:])) is not None:
            self._before_ms[number] = before_ms
        while len(self._before_ms) > MOST_PLANS:
            self._before_ms.popitem(last=False)

    def realised(self, number: int, first_step: int, num_windows: int) -> dict[str, Any]:
        """Fields of Decision: how long steps took before its plan, and in so many windows from a step on; none if either is not known."""
        before_ms = self._before_ms.pop(number, None)
        after = [
            self._windows.times[window]
            for window, _ in self._windows.kept
            if window in self._windows.times and self._windows.first_step_of(window) >= first_step
        ]
        after_ms = _mean_ms(after[:num_windows])
        if before_ms is None or after_ms is None:
            return {}
        return {"step_ms_before": before_ms, "step_ms_after": after_ms}

    @property
    def _now(self) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Rows and shares that are live; the same arrays as long as they are."""
        rows_LP, share_LP = self._live.rows_LP, self._live.dispatch.share_LP
        if rows_LP is not self._known[0] or share_LP is not self._known[1]:
            self._known = rows_LP, share_LP
            self._whole = rows_LP, even_share(rows_LP, self._spec.num_experts) if share_LP is None else share_LP
        return self._whole

    def _tokens(self, window: Window, versions: Sequence[tuple[int, int]]) -> float:
        """Of the busiest rank in the window, summed over layers; each layer under the rows that it had at each step.

        A layer whose newest version is there from step 30 of 50 on ran for 20 steps with its rows as they are now, else with those before. If it is
        not there at all, it was committed after the window.
        """
        load_LE, now, before = window[1], self._now, self._before
        now_L = self._peak(load_LE, *now)
        if now is before:
            return float(now_L.sum())
        steps, newest_L = self._windows.steps, self._live.version_L
        part_L = np.zeros(len(newest_L))
        for first_step, version in reversed(versions):
            part_L[newest_L <= version] = (steps - first_step) / steps
        before_L = self._peak(load_LE, *before)
        there_L1 = (part_L > 0)[:, None]
        mixed = np.where(there_L1, now[0], before[0]), np.where(there_L1, now[1], before[1])
        self._before = now if there_L1.all() else mixed
        return float((part_L * now_L + (1 - part_L) * before_L).sum())

    def _peak(
        self, load_LE: NDArray[np.int64], rows_LP: NDArray[np.int32], share_LP: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Tokens of the busiest rank in each layer."""
        return np.asarray(rank_load(load_LE, rows_LP, self._spec.topology, share_LP).max(axis=-1))

    def _steps_of(self, proposal: PlanProposal) -> int:
        """Steps that counted in the windows that the proposal was made from; 0 if that is not known."""
        windows = list(self._windows.kept)[-proposal.num_windows :] if proposal.num_windows else []
        times = [self._windows.times.get(window) for window, _ in windows]
        return sum(one.num_steps for one in times if one is not None) if None not in times else 0


def _mean_ms(times: Sequence[WindowTimes]) -> float | None:
    """Of the steps of these windows."""
    timed: NDArray[np.int64] = np.array([one.num_timed for one in times])
    if not timed.sum():
        return None
    return float(timed @ np.array([one.step_us for one in times])) / float(timed.sum()) / 1e3

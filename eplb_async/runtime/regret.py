"""Did it pay: what each plan brought on the windows after it, against what was predicted, and what follows from that.

    committed --regret_windows windows--> judged:  paid          trust rises
                                                   did not pay   trust falls: the realised gain is below `LEAST_PAID` of the predicted one
                                                   harmed        and layers that the rows before would serve better are to be reverted, once

Each window that begins after the commit is scored under the rows that the plan brought and under those it replaced, whatever was planned since. All of it
has to be beyond noise: `SURE` standard deviations, of counts (Poisson) or of the windows' own scatter, whichever is more.

Trust is a factor on predicted gains. A plan that did not pay takes `LOST` of it, one that paid gives `REGAINED` of what is missing back, and so
does time, a little with each window: a daemon that trusts nothing makes no plans that could pay.

    trust 1; two plans that did not pay: 0.5; one that paid: 0.75; gains of less than min_gain / 0.75 are not moved for
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eplb_async.runtime.gain_life import PastPlan

__all__ = ["Regret", "Revert", "Verdict"]

FloatArray = NDArray[np.float64]

SURE = 2.0
LEAST_PAID = 0.25
"""Share of the predicted gain. Plans are made for gains that last, and load moves on: half is usual."""
LOST, REGAINED, PER_WINDOW = 0.3, 0.5, 0.01
LEAST_TRUST = 0.1
MOST_TRIALS = 8


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of the plan of a decision; gains are PAR, mean over the layers that it changed.

    Fields:
        number: of the decision.
        first_step: that its windows begin with, at least.
        predicted, realised, noise: gain, and the standard deviation of the realised one.
        harmed: layers that would be better off with their rows before.
        trust: from now on.
        text: for people.
    """

    number: int
    first_step: int
    predicted: float
    realised: float
    noise: float
    harmed: tuple[int, ...]
    trust: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Revert:
    """Rows to go back to: layers, their rows as they are if nobody changed them since, and those before, int32 [n, P]."""

    number: int
    layers: tuple[int, ...]
    after_NP: NDArray[np.int32]
    before_NP: NDArray[np.int32]
    first_step: int
    reason: str

    def rows(self, live_LP: NDArray[np.int32]) -> NDArray[np.int32] | None:
        """What to go back to; None if every layer has been changed since."""
        target_LP = self.target(live_LP)
        return None if np.array_equal(target_LP, live_LP) else target_LP

    def target(self, live_LP: NDArray[np.int32]) -> NDArray[np.int32]:
        """The live rows, with those layers as they were before that nobody has changed since."""
        target_LP = live_LP.copy()
        for row, layer in enumerate(self.layers):
            if np.array_equal(live_LP[layer], self.after_NP[row]):
                target_LP[layer] = self.before_NP[row]
        return target_LP


@dataclass
class _Trial:
    number: int
    plan: PastPlan
    first_step: int
    may_revert: bool
    loads: list[FloatArray] = field(default_factory=list)


class Regret:
    """Plans on trial, and the trust that is left. Pure but for its memory."""

    def __init__(self, par_of: Callable[..., FloatArray], num_ranks: int) -> None:
        """`par_of`: see GainLife."""
        self._par_of, self._num_ranks = par_of, num_ranks
        self._trials: list[_Trial] = []
        self.trust = 1.0
        self.revert: Revert | None = None

    def follow(self, number: int, plan: PastPlan, first_step: int, *, may_revert: bool) -> None:
        """The plan of that decision has been committed; windows from `first_step` on tell what it brings."""
        if plan.predicted > 0 and len(self._trials) < MOST_TRIALS:
            self._trials.append(_Trial(number, plan, first_step, may_revert))

    def window(self, first_step: int, load_LE: NDArray[np.int64], num_windows: int, min_gain: float) -> list[Verdict]:
        """A window is complete.

        Args:
            first_step: its first.
            load_LE: its load.
            num_windows: that a plan is judged by; 0 judges none.
            min_gain: share of PAR below which a layer is not reverted.
        """
        if not num_windows:
            self._trials, self.trust, self.revert = [], 1.0, None
            return []
        self.trust += PER_WINDOW * (1 - self.trust)
        verdicts = []
        for trial in self._trials:
            if first_step >= trial.first_step:
                trial.loads.append(load_LE[trial.plan.layers].astype(np.float64))
            if len(trial.loads) >= num_windows:
                verdicts.append(self._judge(trial, min_gain))
        self._trials = [trial for trial in self._trials if len(trial.loads) < num_windows]
        return verdicts

    def take(self, trigger: str) -> Revert | None:
        """The revert that gave this reason, which is then no longer to be made: each is tried once."""
        if self.revert is None or self.revert.reason != trigger:
            return None
        taken, self.revert = self.revert, None
        return taken

    def _judge(self, trial: _Trial, min_gain: float) -> Verdict:
        plan, load_TNE = trial.plan, np.array(trial.loads)
        before_TN = np.array([self._par_of(load, plan.before_NP, plan.before_share_NP) for load in load_TNE])
        after_TN = np.array([self._par_of(load, plan.after_NP, plan.after_share_NP) for load in load_TNE])
        gain_N, noise_N = (before_TN - after_TN).mean(axis=0), self._noise(load_TNE, before_TN, after_TN)
        harmed_N = -gain_N > np.maximum(SURE * noise_N, min_gain * after_TN.mean(axis=0))
        num = len(gain_N)
        predicted, realised, noise = (
            plan.predicted / num,
            float(gain_N.mean()),
            float(np.sqrt((noise_N**2).sum()) / num),
        )
        if realised + SURE * noise < LEAST_PAID * predicted:
            self.trust = max(LEAST_TRUST, self.trust * (1 - LOST))
            text = "harmed" if realised + SURE * noise < 0 else "did not pay"
        else:
            self.trust += REGAINED * (1 - self.trust)
            text = "paid"
        text += f": PAR of its layers fell by {realised:.3f} +- {noise:.3f}, predicted {predicted:.3f}"
        harmed = tuple(layer for layer, bad in zip(plan.layers, harmed_N, strict=True) if bad)
        if harmed and trial.may_revert:
            text += f"; {len(harmed)} layers were better off before"
            self.revert = Revert(
                number=trial.number,
                layers=harmed,
                after_NP=plan.after_NP[harmed_N],
                before_NP=plan.before_NP[harmed_N],
                first_step=trial.first_step,
                reason=f"decision {trial.number} harmed {len(harmed)} layers: PAR rose by {-float(gain_N[harmed_N].mean()):.3f}",
            )
        return Verdict(
            number=trial.number,
            first_step=trial.first_step,
            predicted=predicted,
            realised=realised,
            noise=noise,
            harmed=harmed,
            trust=self.trust,
            text=text,
        )

    def _noise(self, load_TNE: FloatArray, before_TN: FloatArray, after_TN: FloatArray) -> FloatArray:
        """Standard deviation of the mean gain, per layer."""
        tokens_N = np.maximum(load_TNE.sum(axis=(0, 2)) / self._num_ranks, 1.0)
        counted_N: FloatArray = np.sqrt((before_TN + after_TN).mean(axis=0) / tokens_N)
        if len(before_TN) == 1:
            return counted_N
        scatter_N: FloatArray = (before_TN - after_TN).std(axis=0, ddof=1) / np.sqrt(len(before_TN))
        return np.maximum(counted_N, scatter_N)

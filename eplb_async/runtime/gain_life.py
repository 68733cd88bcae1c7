"""How long an improvement lives, measured: what past plans still bring, window after window.

For a while after a plan, each new window is scored under the rows that the plan brought and under those it replaced. The difference is what
the plan brings in that window, whatever was planned since. Set against what was predicted it gives, over the last plans, the share of a
gain that is left after k windows; the sum of these shares is its life in windows.

    predicted 0.4; realised 0.4, 0.2, 0.1, then nothing: a life of 1 + 0.5 + 0.25 = 1.75 windows
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["GainLife", "PastPlan"]

AGES = 16
"""Windows for which a plan is followed."""
MOST_FOLLOWED = 8
"""Plans that are followed at once; where they come faster, some are not."""
KEPT = 0.9
"""Weight of a plan relative to the one after it."""
PRIOR_STEPS, PRIOR_PLANS = 450, 1.0
"""Life of a gain before anything is known, and how many plans that counts as. In steps, so that a first plan has the same price whatever steps are summed
into a window. Longer lives spend too much on the first windows, which may be odd (docs/log.md)."""
LEAST_LEFT, MOST_LEFT = 0.0, 0.97
"""Bounds of what a window leaves of a gain, for ages that were not seen: 0.97 is a life of 33 windows."""


@dataclass
class PastPlan:
    """A plan that has been committed: its layers, its predicted gain (PAR, summed over them), rows [n, P] and shares before and after."""

    layers: list[int]
    predicted: float
    before_NP: NDArray[np.int32]
    after_NP: NDArray[np.int32]
    before_share_NP: NDArray[np.float64] | None = None
    after_share_NP: NDArray[np.float64] | None = None
    age: int = 0


class GainLife:
    """The life of past gains. Pure but for its memory."""

    def __init__(self, par_of: Callable[..., NDArray[np.float64]], window_steps: int) -> None:
        """`par_of(load [n, E], rows [n, P], shares [n, P] or None)`: PAR per layer. `window_steps`: steps of a window."""
        self._par_of = par_of
        self._followed: list[PastPlan] = []
        # shares q, q^2, ... of a gain are left after 1, 2, ... windows: a life of q / (1 - q)
        prior = (PRIOR_STEPS / (PRIOR_STEPS + window_steps)) ** np.arange(1, AGES + 1)
        self._left_A, self._of_A = PRIOR_PLANS * prior, np.full(AGES, PRIOR_PLANS)

    def follow(self, plan: PastPlan) -> None:
        """A plan has been committed; the next window is its first."""
        if plan.predicted > 0 and len(self._followed) < MOST_FOLLOWED:
            self._followed.append(plan)

    def window(self, load_LE: NDArray[np.int64]) -> None:
        """A window is complete."""
        for plan in self._followed:
            load_NE = load_LE[plan.layers]
            before = self._par_of(load_NE, plan.before_NP, plan.before_share_NP).sum()
            gain = float(before - self._par_of(load_NE, plan.after_NP, plan.after_share_NP).sum())
            # relative to its prediction, so that a plan of a few layers tells as much as one of all
            self._left_A[plan.age] = KEPT * self._left_A[plan.age] + gain / plan.predicted
            self._of_A[plan.age] = KEPT * self._of_A[plan.age] + 1.0
            plan.age += 1
        self._followed = [plan for plan in self._followed if plan.age < AGES]

    @property
    def windows(self) -> float:
        """Expected life of a gain, in windows: the sum over ages of what is left of it, and what follows after the last age."""
        left_A = np.clip(self._left_A / self._of_A, 0.0, 1.0)
        if left_A[0] <= 0:
            return 0.0
        ratio = float(np.clip((left_A[-1] / left_A[0]) ** (1 / (AGES - 1)), LEAST_LEFT, MOST_LEFT))
        return float(left_A.sum() + left_A[-1] * ratio / (1 - ratio))

"""What a step costs in milliseconds, fitted while a group serves. Pure: windows go in, coefficients with standard errors come out.

    step_ms = fixed_ms + token_ms * tokens + byte_ms * bytes + commit_ms * commits

`tokens`: of a step's busiest rank, summed over layers; `bytes`: pulled per step by all ranks together; `commits`: entries per step. Windows of

    tokens  1000  1200  1400     of  10.0  10.4  10.8 ms:   fixed 8 ms, token 0.002 ms; of bytes and commits nothing is known

Recursive least squares with forgetting, in the form of sums: of products of the inputs with each other and with the time, each multiplied by
`KEPT` before a window is added. The coefficients are those that fit best among the ones that are not negative: if the best of all are not, all 15
choices of which are zero are tried. Standard errors are those without that bound; forgetting and weights make windows count as fewer.

A window that is far from the fit counts for less (Huber): beyond `CLIPPED` times the scatter of windows it pulls no harder than one that is there,
so steps that were slow for once, or a drop, do little. What changes for good is followed, as old windows are forgotten.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CostFit", "StepCost"]

FloatArray = NDArray[np.float64]

KEPT = 0.995
"""Weight of a window relative to the one after it: a memory of some 200."""
FIRST = 12
"""Windows that the first fit is made of, all at once, so that an odd one among the first does not count."""
CLIPPED = 2.0
SLOWLY = 1 / 32
"""Of the newest window in the scatter."""
LEAST_SCATTER = 1e-3
"""Of the time of a step: clocks and counts are not better than that."""
SURE_TOKENS, SURE_COSTS = 3.0, 2.0
"""Standard errors that a coefficient must be above zero: that of tokens to be known, those of bytes and commits to count."""
SMALLEST = 1e-10
"""Added to the normalised sums: inputs that do not vary have errors that are huge, and not undefined."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """A fit.

    Fields:
        fixed_ms, token_ms, byte_ms, commit_ms: see the module; none is negative.
        errors: standard error of each, in this order; inf where nothing was seen of it.
        parts_ms: what each makes of a usual step.
        scatter_ms: by which windows differ from the fit.
        num_windows: that it was made from.
    """

    fixed_ms: float
    token_ms: float
    byte_ms: float
    commit_ms: float
    errors: tuple[float, float, float, float]
    parts_ms: tuple[float, float, float, float]
    scatter_ms: float
    num_windows: int

    @property
    def step_ms(self) -> float:
        """A usual step."""
        return sum(self.parts_ms)

    @property
    def known(self) -> bool:
        """Whether tokens can be turned into time: their number has varied enough for that."""
        return self.token_ms > 0 and self.token_ms >= SURE_TOKENS * self.errors[1]

    def moving_ms(self, num_bytes: float, num_commits: float) -> float:
        """What a plan costs all steps together, as far as that is sure: costs that may as well be zero count as zero."""
        cost = 0.0
        for value, error, amount in (
            (self.byte_ms, self.errors[2], num_bytes),
            (self.commit_ms, self.errors[3], num_commits),
        ):
            cost += value * amount if value >= SURE_COSTS * error else 0.0
        return cost


class CostFit:
    """The fit of one group. Pure but for its memory."""

    def __init__(self) -> None:
        self._first: list[tuple[FloatArray, float]] = []
        self._inputs_44, self._time_4 = np.zeros((4, 4)), np.zeros(4)
        self._time_squared = self._weights_squared = self._scatter_ms = 0.0
        self._num = 0
        self._cost: StepCost | None = None

    def add(self, tokens: float, num_bytes: float, num_commits: float, step_ms: float) -> None:
        """A window: means of its steps, see the module."""
        input_4 = np.array([1.0, tokens, num_bytes, num_commits])
        if self._num + len(self._first) < FIRST:
            self._first.append((input_4, step_ms))
            if len(self._first) == FIRST:
                self._begin()
            return
        away_ms = abs(step_ms - float(input_4 @ _solve(self._inputs_44, self._time_4, self._time_squared)))
        self._take(input_4, step_ms, self._weight_of(away_ms))
        # clipped, or one that is far off would make room for more
        seen_ms = min(1.25 * away_ms, 4 * self._scatter_ms)
        self._scatter_ms += SLOWLY * (seen_ms - self._scatter_ms)

    @property
    def cost(self) -> StepCost | None:
        """The fit; None before the first windows."""
        if self._cost is None and self._num:
            self._cost = self._made()
        return self._cost

    @property
    def num_windows(self) -> int:
        """That were added."""
        return self._num + len(self._first)

    def _begin(self) -> None:
        """The first windows, weighed anew until the weights agree with the fit."""
        windows, self._first = self._first, []
        weights = [1.0] * len(windows)
        for _ in range(8):
            self._inputs_44, self._time_4, self._time_squared = np.zeros((4, 4)), np.zeros(4), 0.0
            self._weights_squared, self._num = 0.0, 0
            for (input_4, step_ms), weight in zip(windows, weights, strict=True):
                self._take(input_4, step_ms, weight)
            found_4 = _solve(self._inputs_44, self._time_4, self._time_squared)
            away = [abs(step_ms - float(input_4 @ found_4)) for input_4, step_ms in windows]
            self._scatter_ms = 1.48 * float(np.median(away))
            weights = [self._weight_of(one) for one in away]

    def _weight_of(self, away_ms: float) -> float:
        scatter_ms = max(self._scatter_ms, LEAST_SCATTER * self._usual_ms)
        return min(1.0, CLIPPED * scatter_ms / away_ms) if away_ms > 0 else 1.0

    @property
    def _usual_ms(self) -> float:
        return float(self._time_4[0] / self._inputs_44[0, 0]) if self._num else 0.0

    def _take(self, input_4: FloatArray, step_ms: float, weight: float) -> None:
        self._inputs_44 = KEPT * self._inputs_44 + weight * np.outer(input_4, input_4)
        self._time_4 = KEPT * self._time_4 + weight * step_ms * input_4
        self._time_squared = KEPT * self._time_squared + weight * step_ms**2
        self._weights_squared = KEPT**2 * self._weights_squared + weight**2
        self._num += 1
        self._cost = None

    def _made(self) -> StepCost:
        found_4 = _solve(self._inputs_44, self._time_4, self._time_squared)
        rest = self._time_squared - 2 * found_4 @ self._time_4 + found_4 @ self._inputs_44 @ found_4
        weight = float(self._inputs_44[0, 0])
        variance = max(float(rest), 0.0) / max(weight - len(found_4), 1.0)
        variance = max(variance, (LEAST_SCATTER * self._usual_ms) ** 2)
        # n windows that count half: sums of n / 2, and errors of n, not of n / 2 that count whole
        spread_4 = self._weights_squared / weight * _spread(self._inputs_44)
        errors = [float(value) for value in np.sqrt(variance * spread_4)]
        mean_4 = self._inputs_44[0] / weight
        parts = [float(value) for value in found_4 * mean_4]
        return StepCost(
            fixed_ms=float(found_4[0]),
            token_ms=float(found_4[1]),
            byte_ms=float(found_4[2]),
            commit_ms=float(found_4[3]),
            errors=(errors[0], errors[1], errors[2], errors[3]),
            parts_ms=(parts[0], parts[1], parts[2], parts[3]),
            scatter_ms=variance**0.5,
            num_windows=self._num,
        )


def _solve(inputs_44: FloatArray, time_4: FloatArray, time_squared: float) -> FloatArray:
    """The coefficients that are not negative and fit best."""
    scale_4 = np.sqrt(np.diag(inputs_44))
    seen = np.flatnonzero(scale_4 > 0)
    best_4, best_rest = np.zeros(4), time_squared
    for num in range(len(seen), 0, -1):
        for chosen in itertools.combinations(seen.tolist(), num):
            at = list(chosen)
            normal = inputs_44[np.ix_(at, at)] / np.outer(scale_4[at], scale_4[at]) + SMALLEST * np.eye(num)
            found = np.linalg.solve(normal, time_4[at] / scale_4[at])
            rest = time_squared - float(found @ (time_4[at] / scale_4[at]))
            if (found >= 0).all() and rest < best_rest:
                best_4, best_rest = np.zeros(4), rest
                best_4[at] = found / scale_4[at]
                if num == len(seen):
                    return best_4  # of all coefficients, and none is negative
    return best_4


def _spread(inputs_44: FloatArray) -> FloatArray:
    """Variance of each coefficient, for windows that scatter by 1; inf for an input that was never there."""
    scale_4 = np.sqrt(np.diag(inputs_44))
    spread_4, seen = np.full(4, np.inf), np.flatnonzero(scale_4 > 0)
    scale = np.outer(scale_4[seen], scale_4[seen])
    inverse = np.linalg.inv(inputs_44[np.ix_(seen, seen)] / scale + SMALLEST * np.eye(len(seen)))
    spread_4[seen] = np.diag(inverse) / scale_4[seen] ** 2
    return spread_4

"""What a step costs in milliseconds, fitted while a group serves. Pure: windows go in, coefficients with standard errors come out.

    step_ms = fixed_ms + token_ms * tokens + byte_ms * bytes + commit_ms * commits + even_ms * even

`tokens`: of a step's busiest rank, summed over layers; `bytes`: pulled per step by all ranks together; `commits`: entries per step; `even`: tokens of
a rank if all had as many, summed over layers. The last is no part of what balancing can change, but of what grows with it: attention takes longer
in a larger batch, wherever its tokens are routed. Without it that would count as experts' time. It is left out while batches are all alike. Windows of

    tokens  1000  1200  1400     of  10.0  10.4  10.8 ms, even 500:   fixed 8 ms, token 0.002 ms; of bytes and commits nothing is known

Recursive least squares with forgetting, in the form of sums: of products of the inputs with each other and with the time, each multiplied by
`KEPT` before a window is added. The coefficients are those that fit best among the ones that are not negative: if the best of all are, choices
of which are zero are tried. Standard errors are those without that bound; forgetting and weights make windows count as fewer.

A window that is far from the fit counts for less (Huber): beyond `CLIPPED` times the scatter of windows it pulls no harder than one that is there,
so steps that were slow for once, or a drop, do little. What changes for good is followed, as old windows are forgotten.

Shape suffix: I inputs.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BYTES", "COMMITS", "EVEN", "FIXED", "TOKENS", "CostFit", "StepCost"]

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
LEAST_VARIED = 1e-5
"""Variance of `even`, of its square, below which batches are alike: the fixed part then holds what goes with it."""
NUM_INPUTS = 5
FIXED, TOKENS, BYTES, COMMITS, EVEN = range(NUM_INPUTS)
"""Places of the inputs, and of their coefficients."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """A fit.

    Fields:
        fixed_ms, token_ms, byte_ms, commit_ms, even_ms: see the module; none is negative.
        errors: standard error of each, in the order of FIXED, TOKENS, BYTES, COMMITS, EVEN; inf where nothing was seen of it.
        parts_ms: what each makes of a usual step.
        scatter_ms: by which windows differ from the fit.
        num_windows: that it was made from.
    """

    fixed_ms: float
    token_ms: float
    byte_ms: float
    commit_ms: float
    even_ms: float
    errors: tuple[float, ...]
    parts_ms: tuple[float, ...]
    scatter_ms: float
    num_windows: int

    @property
    def step_ms(self) -> float:
        """A usual step."""
        return sum(self.parts_ms)

    @property
    def known(self) -> bool:
        """Whether tokens can be turned into time: their number has varied enough for that."""
        return self.token_ms > 0 and self.token_ms >= SURE_TOKENS * self.errors[TOKENS]

    def moving_ms(self, num_bytes: float, num_commits: float) -> float:
        """What a plan costs all steps together, as far as that is sure: costs that may as well be zero count as zero."""
        cost = 0.0
        for value, error, amount in (
            (self.byte_ms, self.errors[BYTES], num_bytes),
            (self.commit_ms, self.errors[COMMITS], num_commits),
        ):
            cost += value * amount if value >= SURE_COSTS * error else 0.0
        return cost


class CostFit:
    """The fit of one group. Pure but for its memory."""

    def __init__(self) -> None:
        self._first: list[tuple[FloatArray, float]] = []
        self._inputs_II, self._time_I = np.zeros((NUM_INPUTS, NUM_INPUTS)), np.zeros(NUM_INPUTS)
        self._time_squared = self._weights_squared = self._scatter_ms = 0.0
        self._num = 0
        self._cost: StepCost | None = None

    def add(self, tokens: float, even: float, num_bytes: float, num_commits: float, step_ms: float) -> None:
        """A window: means of its steps, see the module."""
        input_I = np.array([1.0, tokens, num_bytes, num_commits, even])
        if self._num + len(self._first) < FIRST:
            self._first.append((input_I, step_ms))
            if len(self._first) == FIRST:
                self._begin()
            return
        away_ms = abs(step_ms - float(input_I @ _solve(self._inputs_II, self._time_I)))
        self._take(input_I, step_ms, self._weight_of(away_ms))
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
            self._inputs_II, self._time_I = np.zeros((NUM_INPUTS, NUM_INPUTS)), np.zeros(NUM_INPUTS)
            self._time_squared = 0.0
            self._weights_squared, self._num = 0.0, 0
            for (input_I, step_ms), weight in zip(windows, weights, strict=True):
                self._take(input_I, step_ms, weight)
            found_I = _solve(self._inputs_II, self._time_I)
            away = [abs(step_ms - float(input_I @ found_I)) for input_I, step_ms in windows]
            self._scatter_ms = 1.48 * float(np.median(away))
            weights = [self._weight_of(one) for one in away]

    def _weight_of(self, away_ms: float) -> float:
        scatter_ms = max(self._scatter_ms, LEAST_SCATTER * self._usual_ms)
        return min(1.0, CLIPPED * scatter_ms / away_ms) if away_ms > 0 else 1.0

    @property
    def _usual_ms(self) -> float:
        return float(self._time_I[0] / self._inputs_II[0, 0]) if self._num else 0.0

    def _take(self, input_I: FloatArray, step_ms: float, weight: float) -> None:
        self._inputs_II = KEPT * self._inputs_II + weight * np.outer(input_I, input_I)
        self._time_I = KEPT * self._time_I + weight * step_ms * input_I
        self._time_squared = KEPT * self._time_squared + weight * step_ms**2
        self._weights_squared = KEPT**2 * self._weights_squared + weight**2
        self._num += 1
        self._cost = None

    def _made(self) -> StepCost:
        found_I = _solve(self._inputs_II, self._time_I)
        assert len(found_I) == NUM_INPUTS
        rest = self._time_squared - 2 * found_I @ self._time_I + found_I @ self._inputs_II @ found_I
        weight = float(self._inputs_II[0, 0])
        variance = max(float(rest), 0.0) / max(weight - len(found_I), 1.0)
        variance = max(variance, (LEAST_SCATTER * self._usual_ms) ** 2)
        # n windows that count half: sums of n / 2, and errors of n, not of n / 2 that count whole
        spread_I = self._weights_squared / weight * _spread(self._inputs_II)
        mean_I = self._inputs_II[FIXED] / weight
        return StepCost(
            fixed_ms=float(found_I[FIXED]),
            token_ms=float(found_I[TOKENS]),
            byte_ms=float(found_I[BYTES]),
            commit_ms=float(found_I[COMMITS]),
            even_ms=float(found_I[EVEN]),
            errors=tuple(np.sqrt(variance * spread_I).tolist()),
            parts_ms=tuple((found_I * mean_I).tolist()),
            scatter_ms=variance**0.5,
            num_windows=self._num,
        )


def _solve(inputs_II: FloatArray, time_I: FloatArray) -> FloatArray:
    """The coefficients that are not negative and fit best: the first choice of which are zero whose own best has none below, and whose zeros would
    not do better above it (the conditions of Kuhn and Tucker; the sums make the problem convex, so there is one)."""
    scale_I, seen = np.sqrt(np.diag(inputs_II)), _seen(inputs_II)
    normal = inputs_II[np.ix_(seen, seen)] / np.outer(scale_I[seen], scale_I[seen]) + SMALLEST * np.eye(len(seen))
    target, best_I = time_I[seen] / scale_I[seen], np.zeros(NUM_INPUTS)
    for num in range(len(seen), 0, -1):
        for chosen in itertools.combinations(range(len(seen)), num):
            at, part = list(chosen), np.zeros(len(seen))
            part[at] = np.linalg.solve(normal[np.ix_(at, at)], target[at])
            if (part >= 0).all() and (target - normal @ part <= SMALLEST * target.max()).all():
                best_I[seen] = part / scale_I[seen]
                return best_I
    return best_I


def _seen(inputs_II: FloatArray) -> NDArray[np.intp]:
    """Inputs that were there at all, and `even` only if it varied."""
    square_I = np.diag(inputs_II)
    there_I = square_I > 0
    varied = square_I[EVEN] - inputs_II[FIXED, EVEN] ** 2 / max(inputs_II[FIXED, FIXED], 1e-300)
    there_I[EVEN] &= varied > LEAST_VARIED * square_I[EVEN]
    return np.flatnonzero(there_I)


def _spread(inputs_II: FloatArray) -> FloatArray:
    """Variance of each coefficient, for windows that scatter by 1; inf for an input that was never there."""
    scale_I, seen = np.sqrt(np.diag(inputs_II)), _seen(inputs_II)
    spread_I = np.full(NUM_INPUTS, np.inf)
    scale = np.outer(scale_I[seen], scale_I[seen])
    inverse = np.linalg.inv(inputs_II[np.ix_(seen, seen)] / scale + SMALLEST * np.eye(len(seen)))
    spread_I[seen] = np.diag(inverse) / scale_I[seen] ** 2
    return spread_I

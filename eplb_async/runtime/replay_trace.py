"""Recorded loads as a stream of steps: windows of a trace, each stretched over many steps by seeded sampling.

A window's shares of tokens per expert are taken for those of each of its steps, and a step is a multinomial sample of them. Steps come
in spans of `every`: the first step of a span is drawn by itself, and is the one that balance and time are measured on; the others are
drawn as one sum, whose distribution is the same as that of the sum of so many steps. With `every` 1 each step is drawn and measured.

    window 0                                  window 1
    |x....|x....|x....|x....|x....|x....|     |x....|...      every = 5: x is measured, all are counted

Same trace, stretch and seed: the same steps, whoever looks at them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.errors import ConfigError

__all__ = ["Spans", "Stretch", "StretchedTrace", "measured_every"]

MOST_MEASURED = 1e8
"""Loads (steps x layers x experts) that are all drawn step by step; drawing takes some 150 ns each."""
SPANS_AT_ONCE = 32
"""Spans in memory together; more are not faster."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """How a trace becomes steps.

    Fields:
        steps_per_window: steps that a recorded window lasts.
        tokens_per_step: load of a layer in a step, summed over its experts (tokens x top-k); 0: as in the window.
        seed: of the samples.
        every: steps of a span; divides steps_per_window.
    """

    steps_per_window: int = 1
    tokens_per_step: int = 0
    seed: int = 0
    every: int = 1


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Some consecutive spans of one recorded window.

    Fields:
        first_step: of the first span.
        every: steps of a span.
        first_KLE: load of each span's first step, int64 [K, L, E].
        total_KLE: load of all steps of each span.
    """

    first_step: int
    every: int
    first_KLE: NDArray[np.int64]
    total_KLE: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first_KLE)


class StretchedTrace:
    """A trace's steps, from the first on, as often as wanted."""

    def __init__(self, trace_TLE: NDArray[np.float64], stretch: Stretch) -> None:
        """Loads of windows, and what to make of them.

        Raises:
            ConfigError: `every` does not divide the steps of a window.
        """
        if stretch.steps_per_window % stretch.every:
            raise ConfigError(
                "every", f"is {stretch.every}; it must divide {stretch.steps_per_window} steps per window"
            )
        self._trace_TLE, self._stretch = trace_TLE, stretch

    @property
    def num_steps(self) -> int:
        """Of the whole trace."""
        return len(self._trace_TLE) * self._stretch.steps_per_window

    def spans(self) -> Iterator[Spans]:
        """All spans in order, some at a time."""
        stretch = self._stretch
        for window, load_LE in enumerate(self._trace_TLE):
            random = np.random.default_rng([stretch.seed, window])
            left = stretch.steps_per_window // stretch.every
            step = window * stretch.steps_per_window
            while left:
                num = min(left, SPANS_AT_ONCE)
                first_KLE = self._drawn(load_LE, num, 1, random)
                rest_KLE = self._drawn(load_LE, num, stretch.every - 1, random)
                yield Spans(first_step=step, every=stretch.every, first_KLE=first_KLE, total_KLE=first_KLE + rest_KLE)
                left, step = left - num, step + num * stretch.every

    def _drawn(
        self, load_LE: NDArray[np.float64], num: int, steps: int, random: np.random.Generator
    ) -> NDArray[np.int64]:
        """Sums of so many steps, so many times, [num, L, E]."""
        if not steps:
            return np.zeros((num, *load_LE.shape), dtype=np.int64)
        if self._stretch.steps_per_window == 1 and not self._stretch.tokens_per_step:
            return np.rint(load_LE).astype(np.int64)[None]
        total_L = load_LE.sum(axis=1)
        share_LE = np.where(total_L[:, None] > 0, load_LE, 1.0)
        share_LE = share_LE / share_LE.sum(axis=1, keepdims=True)
        tokens_L = np.rint(total_L).astype(np.int64)
        if self._stretch.tokens_per_step:
            tokens_L = np.where(total_L > 0, self._stretch.tokens_per_step, 0)
        return random.multinomial(tokens_L * steps, share_LE, size=(num, len(load_LE)))


def measured_every(num_loads: float, lengths: Sequence[int]) -> int:
    """Steps of a span for a trace of so many loads: 1 where all can be drawn, else at most 10 that divide these lengths.

    1e9 loads, windows of 600 and 1000 steps: 10. 1e9 loads, a window of 7 steps: 7.
    """
    if num_loads <= MOST_MEASURED:
        return 1
    divided = math.gcd(*lengths)
    return max(every for every in range(1, 11) if divided % every == 0)

"""Whether load has changed since a decision was made from it. Where it has not, deciding again could only find what was not worth it then.

The mean shares of the windows that the decision was made from are compared with those of the windows since. Chance alone makes them
differ, by the scatter of single windows, which they show themselves, and at least by that of counts (Poisson). The squared difference,
over what chance makes of it, is about 1 where nothing has changed, however noisy windows are, and grows with the number of windows
where something has.

    one layer, two experts, windows of 100 tokens: 50:50 twice, then 60:40 twice. Difference 0.1 for each expert, squared and summed 0.02.
    A window's variance is that of counts: 0.25 / 100 and 0.24 / 100. By chance: 2 experts x (0.0025 / 2 + 0.0024 / 2) = 0.0049. Ratio 4.1
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eplb_async.runtime.windows import Window

__all__ = ["LoadChange", "load_change"]

FloatArray = NDArray[np.float64]


class LoadChange:
    """How much load has changed since a decision, kept up with the windows."""

    def __init__(self) -> None:
        """Nothing was decided yet."""
        self._before_TLE: FloatArray | None = None
        self._newest = -1

    def decided(self, windows: Sequence[Window], newest: int) -> None:
        """It was decided on these windows; `newest` is the index of the last one that there was."""
        self._before_TLE, self._newest = _stacked(windows), newest

    def forget(self) -> None:
        """What was decided does not count any more."""
        self._before_TLE = None

    def since(self, kept: Sequence[Window]) -> float:
        """How much all windows since, or the newest alone, differ; inf if nothing was decided, 0 without new windows."""
        if self._before_TLE is None:
            return math.inf
        new = [window for window in kept if window[0] > self._newest]
        # a slow change shows in many windows, a sudden one in the newest before it does in their mean
        return max((load_change(self._before_TLE, _stacked(part)) for part in (new, new[-1:]) if part), default=0.0)


def load_change(before_TLE: FloatArray, since_TLE: FloatArray) -> float:
    """Squared difference of mean shares over the one that chance makes; 0 where there is nothing to compare.

    Args:
        before_TLE, since_TLE: windows of load, in tokens.
    """
    if not len(before_TLE) or not len(since_TLE):
        return 0.0
    parts = [_mean_and_variance(windows_TLE) for windows_TLE in (before_TLE, since_TLE)]
    difference = float(((parts[0][0] - parts[1][0]) ** 2).sum())
    scattered = [scatter for _, _, scatter in parts if scatter is not None]
    chance = 0.0
    for (_, counted, scatter), windows_TLE in zip(parts, (before_TLE, since_TLE), strict=True):
        # a window alone scatters as those do that it is compared with
        seen = scatter if scatter is not None else max(scattered, default=0.0)
        chance += max(counted, seen) / len(windows_TLE)
    return difference / chance if difference else 0.0


def _stacked(windows: Sequence[Window]) -> FloatArray:
    return np.array([load_LE for _, load_LE in windows], dtype=np.float64)


def _mean_and_variance(windows_TLE: FloatArray) -> tuple[FloatArray, float, float | None]:
    """Mean share per layer and expert, and the variance of one window's, summed over both: of counts, and as seen in several."""
    tokens_TL1 = np.maximum(windows_TLE.sum(axis=2, keepdims=True), 1.0)
    share_TLE = windows_TLE / tokens_TL1
    mean_LE = share_TLE.mean(axis=0)
    counted = float((mean_LE * (1 - mean_LE) / tokens_TL1).mean(axis=0).sum())
    return mean_LE, counted, float(share_TLE.var(axis=0, ddof=1).sum()) if len(windows_TLE) > 1 else None

"""Whether load has changed since a decision was made from it. Where it has not, deciding again could only find what was not worth it then.

The mean shares of the windows that the decision was made from are compared with those of the windows since. Chance alone makes them
differ, by the scatter of single windows, which they show themselves, and at least by that of counts (Poisson). The squared difference,
over what chance makes of it, is about 1 where nothing has changed, however noisy windows are, and grows with the number of windows
where something has. Traffic that has stayed for n windows is expected to stay for n more: where nothing else is known, gains live as long as that.

    one layer, two experts, windows of 100 tokens: 50:50 twice, then 60:40 twice. Difference 0.1 for each expert, squared and summed 0.02.
    A window's variance is that of counts: 0.25 / 100 and 0.24 / 100. By chance: 2 experts x (0.0025 / 2 + 0.0024 / 2) = 0.0049. Ratio 4.1
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from eplb_async.runtime.windows import Window

__all__ = ["LoadChange", "load_change"]

FloatArray = NDArray[np.float64]


class LoadChange:
    """How much load has changed since a decision, kept up with the windows: each is looked at once when it comes, and once when it goes."""

    def __init__(self) -> None:
        """Nothing was decided yet."""
        self._before: _Shares | None = None
        self._newest = -1
        self._oldest: int | None = None
        self._since, self._counted = _Shares(), dict[int, NDArray[np.int64]]()

    def decided(self, windows: Sequence[Window], newest: int) -> None:
        """It was decided on these windows; `newest` is the index of the last one that there was."""
        self._before, self._newest = _Shares(load_LE for _, load_LE in windows), newest
        self._since, self._counted = _Shares(), {}
        if self._oldest is None:
            self._oldest = windows[0][0]

    def undecided(self, newest: int) -> None:
        """A decision settled nothing; the next window, whatever it shows, may."""
        self._before, self._newest, self._oldest = None, newest, None

    def forget(self) -> None:
        """What was decided does not count any more."""
        self.undecided(-1)

    def changed(self) -> None:
        """Load is not what it was."""
        self._oldest = None

    def stayed(self, newest: int) -> int:
        """Windows up to this one since the oldest that was decided on, if load has not changed in between; else 0."""
        return 0 if self._oldest is None else newest + 1 - self._oldest

    def since(self, kept: Sequence[Window]) -> float:
        """How much all windows since, or the newest alone, differ; inf if nothing was decided, 0 without new windows."""
        new = {index: load_LE for index, load_LE in kept if index > self._newest}
        if self._before is None:
            return math.inf if new or self._newest < 0 else 0.0
        if not new:
            return 0.0
        for index in self._counted.keys() - new.keys():
            self._since.add(self._counted.pop(index), times=-1)
        for index in new.keys() - self._counted.keys():
            self._since.add(new[index])
        self._counted = new
        # a slow change shows in many windows, a sudden one in the newest before it does in their mean
        return max(_change(self._before, part) for part in (self._since, _Shares([kept[-1][1]])))


def load_change(before_TLE: FloatArray, since_TLE: FloatArray) -> float:
    """Squared difference of mean shares over the one that chance makes; 0 where there is nothing to compare.

    Args:
        before_TLE, since_TLE: windows of load, in tokens.
    """
    if not len(before_TLE) or not len(since_TLE):
        return 0.0
    return _change(_Shares(before_TLE), _Shares(since_TLE))


class _Shares:
    """Windows of load, as far as they matter here: sums of shares, of their squares, and of 1 / tokens."""

    def __init__(self, windows: Iterable[NDArray[np.generic]] = ()) -> None:
        self.num, self._squares = 0, 0.0
        self._sum_LE: FloatArray = np.zeros((1, 1))
        self._inverse_L: FloatArray = np.zeros(1)
        for load_LE in windows:
            self.add(load_LE)

    def add(self, load_LE: NDArray[np.generic], times: int = 1) -> None:
        """One window more, or, -1 times, one less."""
        inverse_L1 = 1.0 / np.maximum(load_LE.sum(axis=1, keepdims=True, dtype=np.float64), 1.0)
        share_LE = load_LE * inverse_L1
        self.num += times
        self._sum_LE = self._sum_LE + times * share_LE
        self._squares += times * _squared(share_LE)
        self._inverse_L = self._inverse_L + times * inverse_L1[:, 0]

    def spread(self) -> tuple[FloatArray, float, float | None]:
        """Mean share per layer and expert, and the variance of one window's, summed over both: of counts, and as seen in several."""
        mean_LE = self._sum_LE / self.num
        square_L = np.einsum("le,le->l", mean_LE, mean_LE)
        counted = float(((mean_LE.sum(axis=1) - square_L) * self._inverse_L).sum()) / self.num
        if self.num < 2:
            return mean_LE, counted, None
        return mean_LE, counted, max(0.0, self._squares - self.num * float(square_L.sum())) / (self.num - 1)


def _squared(array_LE: FloatArray) -> float:
    # not np.vdot: BLAS would wake its threads, which take cores from ranks
    return float(np.einsum("le,le->", array_LE, array_LE))


def _change(before: _Shares, since: _Shares) -> float:
    parts = [part.spread() for part in (before, since)]
    apart_LE = parts[0][0] - parts[1][0]
    difference = _squared(apart_LE)
    scattered = [scatter for _, _, scatter in parts if scatter is not None]
    chance = 0.0
    for (_, counted, scatter), windows in zip(parts, (before, since), strict=True):
        # a window alone scatters as those do that it is compared with
        seen = scatter if scatter is not None else max(scattered, default=0.0)
        chance += max(counted, seen) / windows.num
    return difference / chance if difference else 0.0

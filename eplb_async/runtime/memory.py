"""How many of the recent windows are still about the traffic of now: the memory with which the past would have been forecast best.

Where traffic stays, many windows have least sampling noise, and a policy sees what varies between them; where it changed, old windows are stale. Which
of the two it is shows in the windows themselves: each but the oldest is forecast by the mean shares of the n before it, for each length n of memory, and the
length whose shares were off least is taken. A shorter memory than all has to be better by `MARGIN`: that all windows agree is the better guess,
and a placement that is fitted to few windows is fitted to their noise.

Shares [.5, .5], [.5, .5], [.9, .1], [.9, .1]: the newest alone misses once, all of them twice: 1.
"""

from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

__all__ = ["fitted_memory", "remembered"]

FloatArray = NDArray[np.float64]

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MARGIN = 0.8
"""Most error of a shorter memory, relative to that of all windows; chosen by replay (docs/log.md)."""
BREAK = 5.0
"""A newest window that was forecast so many times worse than the ones before it, on average, is of other traffic: it is planned on alone. Else the
first plan after a change would be made from old windows, and its moves be lost."""


def fitted_memory(windows_TLE: FloatArray) -> int:
    """How many of the newest windows to plan on, 1 to T, by squared error of the shares of tokens over windows and layers."""
    num_windows = len(windows_TLE)
    total_TL = windows_TLE.sum(axis=2, keepdims=True)
    share_TLE = windows_TLE / np.where(total_TL > 0, total_TL, 1.0)
    sums_TLE = np.concatenate([np.zeros_like(share_TLE[:1]), np.cumsum(share_TLE, axis=0)])

    def errors(length: int) -> list[float]:
        found = []
        for window in range(1, num_windows):
            first = max(0, window - length)
            forecast_LE = (sums_TLE[window] - sums_TLE[first]) / (window - first)
            found.append(float(((forecast_LE - share_TLE[window]) ** 2).sum()))
        return found

    best, chosen = num_windows, errors(num_windows)
    least = MARGIN * sum(chosen)
    for length in takewhile(lambda length: length < num_windows, LENGTHS):
        if sum(off := errors(length)) < least:
            best, chosen, least = length, off, sum(off)
    if num_windows > 2 and chosen[-1] > BREAK * sum(chosen[:-1]) / (num_windows - 2):
        return 1
    return best


def remembered(windows_TLE: FloatArray, fitted: bool) -> FloatArray:
    """The windows to plan on: the newest that are not stale, or all. A view."""
    return windows_TLE[-fitted_memory(windows_TLE) :] if fitted else windows_TLE

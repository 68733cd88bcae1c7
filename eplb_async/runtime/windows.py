"""The windows of load that decisions are made from: the collector's, and the replay's, which has no rings to collect from.

Window w holds steps w * steps to (w + 1) * steps - 1. Only windows with traffic are kept, the newest few.
"""

from collections import OrderedDict, deque

import numpy as np
from numpy.typing import NDArray

from eplb_async.runtime.step_times import WindowTimes

__all__ = ["LoadWindows", "Window"]


Window = tuple[int, NDArray[np.int64]]
"""Its index, and its load [L, E]."""


class LoadWindows:
    """The newest complete windows. Used by one task only.

    Attributes:
        kept: (window index, int64 [L, E]), oldest first; an array is not changed once it is in here.
        steps: per window.
        times: of the windows that are kept, by index; of those that have any.
    """

    def __init__(self, shape_LE: tuple[int, int], steps: int, num_kept: int) -> None:
        """`num_kept`: windows kept."""
        self._shape_LE, self.steps = shape_LE, steps
        self.kept: deque[Window] = deque(maxlen=num_kept)
        self.times: OrderedDict[int, WindowTimes] = OrderedDict()

    def add(self, window: int, load_LE: NDArray[np.int64], times: WindowTimes | None = None) -> bool:
        """A window is complete; false, and it is left out, if it has no traffic."""
        if not load_LE.any():
            return False
        self.kept.append((window, load_LE))
        if times is not None:
            self.times[window] = times
        while self.times and next(iter(self.times)) < self.kept[0][0]:
            self.times.popitem(last=False)
        return True

    def resize(self, steps: int, num_kept: int) -> bool:
        """Other windows from now on; true, and those collected are forgotten, if their length changes."""
        changed = steps != self.steps
        if changed:
            self.steps = steps
            self.clear()
        self.kept = deque(self.kept, maxlen=num_kept)
        return changed

    def clear(self) -> None:
        """Forget all windows."""
        self.kept.clear()
        self.times.clear()

    @property
    def windows_TLE(self) -> NDArray[np.float64]:
        """The windows, oldest first, float64 [T, L, E]; T is 0 before the first."""
        return np.array([load for _, load in self.kept], dtype=np.float64).reshape((len(self.kept), *self._shape_LE))

    def first_step_of(self, window: int) -> int:
        """The first step of a window."""
        return window * self.steps

"""How long the steps of a window took, and what ran beside them: pulled bytes and commits. From the fields of load records, without the counts.

A record tells how long the step *before* its own took, so a time belongs to the record before it of the same ring, whose phase says whether
it counts. The time of a window's last step comes with the next window's first record, and is left out if that is not there yet.

    rank 0    step 8 decode    step 9 decode, previous 10 ms    step 10 prefill, previous 11 ms    step 11, previous 90 ms
    windows of 10 steps, decode: window 0 has steps 8 and 9 of 10 and 11 ms; window 1 has none yet, since the 90 ms were prefill
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from eplb_async.shm.ring import Batch

__all__ = ["StepTimes", "WindowTimes"]

PAUSE = 8.0
"""A step that took more than this times the median of its phase in the window waited for requests: the time between two begins is then
no step's. Prompts are not that much longer than one another, and a median stands more than half of the steps being odd."""
MOST_US, MOST_BYTES = 600_000_000, 1 << 40
"""Of one step; more, or less than 0, is damage."""


@dataclass(frozen=True, kw_only=True)
class WindowTimes:
    """Of the steps of a window whose load counts.

    Fields:
        num_steps: on the rank with most of them.
        num_timed: times that `step_us` is the mean of; 0: none is known.
        step_us: mean time of a step, of the rank with the greatest.
        pulled_bytes: whose copies were issued, on all ranks together.
        num_commits: entries of plans that took effect; a drop counts as one.
        versions: (step of the window from which on, packed counter) of the placements that it ran with, in order; the first step is 0.
    """

    num_steps: int = 0
    num_timed: int = 0
    step_us: float = 0.0
    pulled_bytes: int = 0
    num_commits: int = 0
    versions: tuple[tuple[int, int], ...] = ()


@dataclass
class _Rank:
    """What one ring has told of a window."""

    num_steps: int = 0
    pulled_bytes: int = 0
    num_commits: int = 0
    times: list[NDArray[np.int64]] = field(default_factory=list)
    """[2, n]: microseconds, 0 where that is not known; phase."""
    versions: list[tuple[int, int]] = field(default_factory=list)

    def step_us(self) -> tuple[int, float]:
        """How many steps, and their mean; (0, 0) if none was timed."""
        took_n, phase_n = np.concatenate(self.times, axis=1)
        took_n, phase_n = took_n[took_n > 0], phase_n[took_n > 0]
        if not len(took_n):
            return 0, 0.0
        kept_n = np.ones(len(took_n), dtype=np.bool_)
        for phase in np.unique(phase_n):
            same_n = phase_n == phase
            kept_n &= ~same_n | (took_n <= PAUSE * np.median(took_n[same_n]))
        return int(kept_n.sum()), float(took_n[kept_n].mean())


class StepTimes:
    """Times of the windows that are still open. Pure but for its memory."""

    def __init__(self) -> None:
        self._open: dict[int, dict[int, _Rank]] = {}
        self._last: dict[int, tuple[int, int, int]] = {}

    def add(self, rank: int, batch: Batch, window_steps: int, counts: NDArray[np.bool_]) -> None:
        """Records of a ring, which follow those of the call before.

        Args:
            rank: whose ring.
            batch: one record at least, valid.
            window_steps: of a window.
            counts: which phases count, by their index in PHASES.
        """
        step, phase, version = self._last.get(rank, (-2, 0, int(batch.version[0])))
        self._last[rank] = int(batch.step[-1]), int(batch.phase[-1]), int(batch.version[-1])
        window, served = batch.step // window_steps, counts[batch.phase]
        # what a record tells is of the record before; that of the last one is not there yet
        took_us = np.zeros(len(window), dtype=np.int64)
        took_us[:-1] = batch.previous_us[1:] * (batch.step[1:] == batch.step[:-1] + 1)
        took_us[~served | (took_us < 0) | (took_us > MOST_US)] = 0
        first_us = int(batch.previous_us[0])
        if step == batch.step[0] - 1 and counts[phase] and 0 < first_us <= MOST_US:
            self._rank(step // window_steps, rank).times.append(np.array([[first_us], [phase]]))
        pulled = np.where((batch.pulled >= 0) & (batch.pulled <= MOST_BYTES), batch.pulled, 0)
        before = np.concatenate(([version], batch.version[:-1]))
        changes = np.flatnonzero(batch.version != before).tolist()
        cuts = [0, *(np.flatnonzero(window[1:] != window[:-1]) + 1).tolist(), len(window)]
        for first, last in pairwise(cuts):
            known, part = self._rank(int(window[first]), rank), slice(first, last)
            known.times.append(np.array((took_us[part], batch.phase[part])))
            known.num_steps += int(np.count_nonzero(served[part]))
            known.pulled_bytes += int(pulled[part].sum())
            if not known.versions:
                known.versions.append((0, int(batch.version[first])))
            here = [at for at in changes if first <= at < last]
            known.num_commits += len(here)
            known.versions += [(int(batch.step[at]) % window_steps, int(batch.version[at])) for at in here]

    def close(self, window: int) -> WindowTimes:
        """The window is complete, and so are those before it."""
        ranks = list(self._open.get(window, {}).values())
        self._open = {number: known for number, known in self._open.items() if number > window}
        timed = [known.step_us() for known in ranks]
        # all commit at the same steps: whoever tells most
        versions = max((tuple(known.versions) for known in ranks), default=(), key=len)
        slowest = max(timed, key=lambda one: one[1], default=(0, 0.0))
        return WindowTimes(
            num_steps=max((known.num_steps for known in ranks), default=0),
            num_timed=slowest[0],
            step_us=slowest[1],
            pulled_bytes=sum(known.pulled_bytes for known in ranks),
            num_commits=max((known.num_commits for known in ranks), default=0),
            versions=versions,
        )

    def clear(self) -> None:
        """Windows begin anew."""
        self._open.clear()

    def _rank(self, window: int, rank: int) -> _Rank:
        """What is known of a window from a ring."""
        return self._open.setdefault(window, {}).setdefault(rank, _Rank())

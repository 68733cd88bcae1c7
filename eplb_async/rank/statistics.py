"""What the hook costs: the time of each of its phases, per step."""

from enum import Enum

import msgspec
import numpy as np

__all__ = ["HookPhase", "HookStatistics", "PhaseTimes", "Timing"]

KEPT = 4096
"""Steps over which percentiles are taken; the newest ones."""


class HookPhase(Enum):
    """Parts of the hook, in the order in which a step runs them."""

    POLL = "poll"
    AGREE = "agree"
    COMMIT = "commit"
    ISSUE = "issue"
    RECORD = "record"

    __hash__ = object.__hash__  # see Phase


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Host time of one phase in microseconds: percentiles over the newest steps that ran it, maximum since attach."""

    p50_us: float
    p99_us: float
    max_us: float
    num: int


class HookStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's own view.

    Fields:
        step: the next step's number.
        generation, position: of `decided`.
        num_commits, num_plans, num_drops: since attach.
        rows_pulled, bytes_pulled: since attach.
        staging_bytes: memory for staging rows.
        draining: pulls of a dropped plan still run; the next plan waits for them on all ranks.
        pull_budget_bytes: that a step may begin to pull now, see pace.py.
        pull_pauses, pull_slowdowns: times that pulls were paused, and that the budget was cut, since attach.
        pulls_abandoned: that did not end after their plan was dropped, and were given up; since attach.
        last_error: why this rank last asked for a drop, or "".
        times: per phase of the hook; COMMIT only over steps that committed or dropped something, POLL and ISSUE only over those in
            which anything was to be done.
    """

    step: int
    generation: int
    position: int
    num_commits: int
    num_plans: int
    num_drops: int
    rows_pulled: int
    bytes_pulled: int
    staging_bytes: int
    pull_budget_bytes: int
    pull_pauses: int
    pull_slowdowns: int
    draining: bool
    pulls_abandoned: int
    last_error: str
    times: dict[str, Timing]


class PhaseTimes:
    """Durations of one phase."""

    def __init__(self) -> None:
        self._kept_us = np.zeros(KEPT)
        self._num = 0
        self._max_us = 0.0

    def add(self, duration_ns: int) -> None:
        """Count one step."""
        duration_us = duration_ns / 1e3
        self._kept_us[self._num % KEPT] = duration_us
        self._num += 1
        if duration_us > self._max_us:
            self._max_us = duration_us

    def timing(self) -> Timing:
        """The summary so far; zeros before the first step."""
        kept_us = self._kept_us[: min(self._num, KEPT)]
        p50_us, p99_us = np.percentile(kept_us, (50, 99)).tolist() if len(kept_us) else (0.0, 0.0)
        return Timing(p50_us=p50_us, p99_us=p99_us, max_us=self._max_us, num=self._num)

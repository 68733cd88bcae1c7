"""The pace of transfers: how many bytes a step may begin to pull, by how long steps take with transfers and without.

    at the limit --steps with transfers run long--> halved, down to the least --still long--> a pause, to see steps without
         ^---------they are as usual: a sixteenth of the limit more--'
    several slow steps in a row (a burst of requests, or a transfer that hurts) --> a pause, then on at the least

A step is of one kind. Of no transfers: it tells what is usual. Of transfers: some were issued in it or on their way; it is compared with
the usual. Odd: a plan was adopted or an entry committed in it; it tells nothing. A step is *slow* if it took more than `slow_step_ratio`
times the usual, whatever its kind: the step after it issues nothing. Steps with transfers *run long* if the median of four is above the
usual by more than `pace_tolerance` of it, and than twice its scatter.

A rank is *idle* in a dummy step, or if it has just waited for requests: the engine's own time of a step is less than half of the time between
its begin and the next, or a step without transfers took more than eight times the usual. The budget is then a share of another limit.

Ranks need not agree on any of it. No clock, no I/O: times are given.
"""

from enum import Enum
from statistics import median

from eplb_async.core.config import HookSettings
from eplb_async.core.load import Phase
from eplb_async.rank.usual_steps import UsualSteps

__all__ = ["Pace", "StepKind"]

JUDGED = 4
"""Steps with transfers that are judged together: a median of fewer would follow chance."""
GROWTH, CUT = 1 / 16, 0.5
"""Of the limit, added while steps are as usual; and what is left of the budget when they run long. As in TCP: down at once, up with care."""
BURST = 3
"""Slow steps in a row that make a pause."""
PAUSE_STEPS = 16
"""More than half of the steps that the usual is the median of: what has changed for good is known after one pause."""
LOOKS = 4
"""Times that steps run long at the least budget before a pause looks at steps without transfers."""
WAITED_RATIO, WAITED_SHARE = 8.0, 2.0


class StepKind(Enum):
    """What a step tells, see the module."""

    QUIET = "quiet"
    TRANSFERS = "transfers"
    ODD = "odd"


QUIET = StepKind.QUIET
"""A member of an Enum takes a while to look up; `begin` runs at every step."""


class Pace:
    """The pace of one rank. Only the thread that steps may call it.

    Attributes:
        kind: of the step that runs; QUIET from `begin` on, unless `ran` tells of something.
        budget_bytes: per step, as long as nothing is paused: between the least and the limit.
        num_pauses, num_slowdowns: since attach; slow-downs are cuts of the budget.
    """

    def __init__(self, settings: HookSettings, row_bytes: int) -> None:
        """At the limit; `row_bytes`: the largest row that may have to be pulled."""
        self._settings, self.usual = settings, UsualSteps()
        self._add = self.usual.add
        self._limit = settings.pull_bytes_per_step
        self._least = min(settings.least_pull_bytes_per_step, self._limit)
        self._idle_ratio = (settings.idle_pull_bytes_per_step or self._limit) / self._limit
        self.budget_bytes = self._limit
        self.num_pauses = self.num_slowdowns = 0
        self.kind = QUIET
        self._saved, self._saved_most = 0, max(self._least, min(row_bytes, self._limit))
        self._start_ns = 0
        self._ended: tuple[StepKind, Phase, int, int, int] = (StepKind.ODD, Phase.DUMMY, 0, 0, 0)
        self._ratios: list[float] = []
        self._slow_in_row = self._long_at_least = self._pause_left = 0

    def begin(self, now_ns: int, phase: Phase, tokens: int, measured_us: float | None) -> int:
        """A step begins: microseconds that the one before it took, 0 if that is not known.

        Args:
            now_ns: a monotonic clock.
            phase, tokens: of the step before, which has ended.
            measured_us: what the engine says that it took; None: it does not say.
        """
        took_us = between_us = (now_ns - self._start_ns) // 1000 if self._start_ns else 0
        if measured_us is not None:
            took_us = int(measured_us)
        self._start_ns, kind = now_ns, self.kind
        if kind is not QUIET:
            self.kind = QUIET
        elif took_us > 0:
            self._add[phase]((tokens, took_us))
        self._ended = kind, phase, tokens, took_us, between_us
        return took_us

    def grant(self, phase: Phase) -> int:
        """Bytes that this step may issue copies for. To be asked once in each step in which a plan is held.

        What is not enough for a row is saved for the next step, up to one row.
        """
        settings = self._settings
        kind, before, tokens, took_us, between_us = self._ended
        usual = self.usual.of(before, tokens) if kind is not StepKind.ODD and took_us > 0 else None
        waited = kind is QUIET and usual is not None and took_us > WAITED_RATIO * usual[0]
        slow = False
        if usual is not None and not waited:
            slow = settings.slow_step_ratio > 0 and took_us > settings.slow_step_ratio * usual[0]
            if settings.adapt_pace:
                self._judge(kind, took_us, usual, slow=slow)
        if self._pause_left:
            self._pause_left -= 1
            return 0
        if slow:
            return 0
        idle = phase is Phase.DUMMY or waited or 0 < WAITED_SHARE * took_us <= between_us
        budget = int(self.budget_bytes * self._idle_ratio) if idle else self.budget_bytes
        if self.budget_bytes < self._limit:
            budget = self._saved = max(budget, min(self._saved + budget, self._saved_most))
        return budget

    def ran(self, spent: int, in_flight: int, *, odd: bool) -> None:
        """What the step that begins does: bytes of the last grant that were spent, those on their way, and whether it is odd."""
        self._saved = max(0, self._saved - spent)
        if odd:
            self.kind = StepKind.ODD
        elif spent or in_flight:
            self.kind = StepKind.TRANSFERS

    def _judge(self, kind: StepKind, took_us: int, usual: tuple[float, float], *, slow: bool) -> None:
        if self._pause_left:
            return
        moving = kind is StepKind.TRANSFERS
        self._slow_in_row = self._slow_in_row + 1 if slow else 0
        if self._slow_in_row == BURST:
            self.budget_bytes = self._least
            self._pause()
        elif slow:
            # a wait for requests is as long as a transfer that hurts very much, but does not come at every step
            if moving and took_us <= WAITED_RATIO * usual[0]:
                self._cut()
        elif moving:
            usual_us, scatter_us = usual
            self._ratios.append(took_us / usual_us)
            if len(self._ratios) == JUDGED:
                excess, self._ratios = median(self._ratios) - 1, []
                self._weigh(excess > max(self._settings.pace_tolerance, 2 * scatter_us / usual_us))

    def _weigh(self, long: bool) -> None:
        """Some steps with transfers ran long, or did not."""
        if not long:
            self.budget_bytes = min(self._limit, self.budget_bytes + max(1, int(GROWTH * self._limit)))
            self._long_at_least = 0
        elif self.budget_bytes > self._least:
            self._cut()
        else:
            self._long_at_least += 1
            if self._long_at_least == LOOKS:
                self._pause()

    def _cut(self) -> None:
        self._ratios.clear()
        if self.budget_bytes > self._least:
            self.budget_bytes = max(self._least, int(CUT * self.budget_bytes))
            self.num_slowdowns += 1

    def _pause(self) -> None:
        self._ratios.clear()
        self._slow_in_row = self._long_at_least = 0
        self._pause_left = PAUSE_STEPS
        self.num_pauses += 1

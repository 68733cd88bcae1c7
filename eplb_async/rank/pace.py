"""The pace of steps: how long they take, and a rank that is being slow for once is left alone by transfers for that step."""

from eplb_async.core.load import Phase

__all__ = ["StepClock", "StepPace"]

WEIGHT = 1 / 16
"""Of the newest step in the usual one, which so follows a lasting change within some 30 steps."""


class StepClock:
    """How long steps take on this host, from one beginning to the next. Only the thread that steps may call it."""

    def __init__(self) -> None:
        self._start_ns = 0

    def begin(self, now_ns: int, measured_us: float | None) -> int:
        """A step begins: microseconds that the one before it took, 0 if that is not known.

        Args:
            now_ns: a monotonic clock.
            measured_us: what the engine says that it took; None: it does not say.
        """
        start_ns, self._start_ns = self._start_ns, now_ns
        if measured_us is not None:
            return int(measured_us)
        return (now_ns - start_ns) // 1000 if start_ns else 0


class StepPace:
    """Knows how long steps usually take, for each phase. Only the thread that steps may call it."""

    def __init__(self, slow_ratio: float) -> None:
        """`slow_ratio`: a step that took more than this times the usual is slow; 0: none is."""
        self._slow_ratio = slow_ratio
        self._usual_ns: dict[Phase, float] = {}
        self._phase: Phase | None = None
        self._start_ns = 0

    def pause(self) -> None:
        """Steps are not told of for a while; the next one has none before it."""
        self._phase = None

    def step(self, phase: Phase, now_ns: int) -> bool:
        """A step begins; false if the one before it, which has just ended, was slow.

        Usually 10 ms, ratio 1.5: after a step of 20 ms false, and the usual one is 10.6 ms then.

        Args:
            phase: of the step that begins.
            now_ns: a monotonic clock.
        """
        before, took_ns = self._phase, now_ns - self._start_ns
        self._phase, self._start_ns = phase, now_ns
        if before is None:
            return True
        usual_ns = self._usual_ns.get(before)
        if usual_ns is None:
            self._usual_ns[before] = took_ns
            return True
        self._usual_ns[before] = usual_ns + (took_ns - usual_ns) * WEIGHT
        return not self._slow_ratio or took_ns <= self._slow_ratio * usual_ns

"""Time, as an argument: so that tests and replay can pass a clock of their own."""

import time
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """A source of time."""

    def monotonic_s(self) -> float:
        """Seconds that never go back; comparable between processes of one host."""
        ...

    def unix_s(self) -> float:
        """Wall-clock seconds since 1970, for people."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return time.monotonic()

    def unix_s(self) -> float:
        """Seconds since 1970."""
        return time.time()

"""What the daemon itself costs: CPU time, memory, and which release it is."""

import os
import resource
from pathlib import Path
from typing import NamedTuple

from eplb_async.core.clock import Clock

__all__ = ["Usage", "UsageNow", "release"]


class UsageNow(NamedTuple):
    """Seconds since the daemon began, CPU seconds of this process since then, resident bytes."""

    uptime_s: float
    cpu_s: float
    memory_bytes: int


class Usage:
    """Measures this process from when it is made."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._start_s, self._start_cpu_s = clock, clock.monotonic_s(), _cpu_s()

    def now(self) -> UsageNow:
        """See UsageNow."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE")
        return UsageNow(self._clock.monotonic_s() - self._start_s, _cpu_s() - self._start_cpu_s, memory)


def release() -> str:
    """The version of this package."""
    from eplb_async import __version__

    return __version__


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

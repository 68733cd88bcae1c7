"""The system's clock is the machine's."""

import time

from eplb_async.core.clock import Clock, SystemClock


def test_system_clock_reads_the_machines_clocks() -> None:
    """monotonic_s is comparable with time.monotonic, unix_s with time.time; the former never goes back."""
    clock: Clock = SystemClock()
    before, first, second, after = time.monotonic(), clock.monotonic_s(), clock.monotonic_s(), time.monotonic()
    assert before <= first <= second <= after
    assert abs(clock.unix_s() - time.time()) < 60

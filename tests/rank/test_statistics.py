"""Times of the hook's phases."""

import numpy as np

from eplb_async.rank.statistics import KEPT, PhaseTimes


def test_percentiles_are_in_microseconds_and_of_the_newest_steps() -> None:
    """Old steps fall out of the percentiles, but not out of the maximum and the count."""
    times = PhaseTimes()
    for duration in [9_000_000] * KEPT + [5_000] * KEPT:
        times.add(duration)
    timing = times.timing()
    assert (timing.p50_us, timing.p99_us, timing.max_us, timing.num) == (5.0, 5.0, 9000.0, 2 * KEPT)


def test_percentiles_are_numpys() -> None:
    """Over fewer steps than are kept, only those count."""
    times, durations = PhaseTimes(), [1_000 * number for number in range(1, 101)]
    for duration in durations:
        times.add(duration)
    p50, p99 = np.percentile(np.array(durations) / 1e3, (50, 99))
    assert (times.timing().p50_us, times.timing().p99_us) == (p50, p99)


def test_nothing_was_timed_yet() -> None:
    """Zeros, not an error."""
    timing = PhaseTimes().timing()
    assert (timing.p50_us, timing.p99_us, timing.max_us, timing.num) == (0.0, 0.0, 0.0, 0)

"""What the soak calls growth; a short soak of real processes is marked slow, the long form is scripts/soak."""

from collections.abc import Callable
from pathlib import Path

import pytest

from eplb_async.shm.gc import collect_garbage
from tests.faults.soak import Sample, growth, run_soak

__all__: list[str] = []

STEADY = Sample(0.0, {"rank 0": 100.0, "daemon": 40.0}, {"rank 0": 19, "daemon": 26}, {"rank 0": 3}, 15, 3.0, 0, 1)


def samples(change: Callable[[int], dict[str, object]] = lambda _: {}) -> list[Sample]:
    """Twenty looks, each changed by its number."""
    return [Sample(**{**STEADY.__dict__, "at_s": float(i), **change(i)}) for i in range(20)]


def test_flat_is_flat() -> None:
    """Also when memory grows at the start, a connection comes and goes, and allocators breathe a little."""
    assert growth(samples()) == []
    assert growth(samples(lambda i: {"own_mib": {"rank 0": 100.0 + min(i, 4) * 30 + i % 3, "daemon": 40.0}})) == []
    assert growth(samples(lambda i: {"descriptors": {"rank 0": 19 + 5 * (i % 2)}})) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda i: {"own_mib": {"rank 0": 100.0, "daemon": 40.0 + i}}, "daemon has 12.0 MiB more"),
        (lambda i: {"descriptors": {"rank 0": 19 + i}}, "rank 0 has 38 descriptors, and had 26"),
        (lambda i: {"threads": {"rank 0": 3 + i}}, "rank 0 has 22 threads, and had 10"),
        (lambda i: {"segments": 15 + i // 19}, "16 segments, and there were 15"),
    ],
)
def test_growth_is_named(change: Callable[[int], dict[str, object]], found: str) -> None:
    """Memory, descriptors and threads of each process, and segments."""
    assert growth(samples(change)) == [found]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_short_soak(group: str, runtime_dir: Path) -> None:
    """Half a minute of real ranks and a daemon: plans are made, nothing grows, nothing is left."""
    told: list[Sample] = []
    soak = run_soak(group, runtime_dir, (30.0, 3.0, 1e-3), told.append)
    collect_garbage(group)
    assert soak.problems == []
    assert told[-1].steps > 500
    assert told[-1].generation > 1

"""Load has changed when it differs by more than its own scatter."""

import math
from collections import deque

import numpy as np
import pytest

from eplb_async.runtime.load_change import LoadChange, load_change
from eplb_async.runtime.windows import Window

__all__: list[str] = []

SHARE_LE = np.random.default_rng(0).dirichlet(np.full(32, 0.3), size=6)


def windows(rng: np.random.Generator, share_LE: np.ndarray, number: int, spread: float = 0.0) -> np.ndarray:
    """Windows of 10,000 tokens of these shares; `spread`: how much each window's own shares are off, a part."""
    found = []
    for _ in range(number):
        own_LE = share_LE * np.exp(spread * rng.standard_normal(share_LE.shape))
        found.append([rng.multinomial(10_000, own_E / own_E.sum()) for own_E in own_LE])
    return np.array(found, dtype=np.float64)


def test_the_worked_example() -> None:
    """50:50 twice, then 60:40 twice, of 100 tokens: 4.1 times what chance makes."""
    before, since = np.full((2, 1, 2), 50.0), np.tile([60.0, 40.0], (2, 1, 1))
    assert load_change(before, since) == pytest.approx(0.02 / 0.0049)


@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize(("before", "since"), [(2, 1), (2, 14), (16, 1), (1, 4)])
def test_traffic_that_stays_is_within_chance(spread: float, before: int, since: int) -> None:
    """Also where windows scatter by much more than their counts do."""
    rng = np.random.default_rng(1)
    found = [
        load_change(windows(rng, SHARE_LE, before, spread), windows(rng, SHARE_LE, since, spread)) for _ in range(40)
    ]
    assert max(found) < 2.5
    assert np.mean(np.array(found) > 2) < 0.1
    assert np.mean(found) == pytest.approx(1.0, abs=0.25)


def test_other_traffic_is_told_apart_at_once_and_a_slow_change_in_time() -> None:
    """Other shares show in one window; shares that are off by less than a window's scatter show in many."""
    rng = np.random.default_rng(2)
    assert load_change(windows(rng, SHARE_LE, 2), windows(rng, SHARE_LE[::-1], 1)) > 50
    near_LE = SHARE_LE * np.exp(0.35 * rng.standard_normal(SHARE_LE.shape))
    before = windows(rng, SHARE_LE, 16, 0.5)
    assert load_change(before, windows(rng, near_LE, 1, 0.5)) < 2 < load_change(before, windows(rng, near_LE, 16, 0.5))


def test_what_counts_as_since() -> None:
    """Unknown before a decision, once it is forgotten, and with a window after one that settled nothing; 0 without newer windows; the newest alone can tell."""
    rng, change = np.random.default_rng(3), LoadChange()
    kept = [(at, load) for at, load in enumerate(windows(rng, SHARE_LE, 16).astype(np.int64))]
    assert change.since(kept) == math.inf
    change.decided(kept[:4], 5)
    assert change.since(kept[:6]) == 0.0
    assert 0 < change.since(kept) < 2
    odd = (16, windows(rng, SHARE_LE[::-1], 1)[0].astype(np.int64))
    assert change.since([*kept, odd]) > 50
    change.forget()
    assert change.since(kept) == math.inf
    assert change.stayed(20) == 0
    change.decided(kept[:4], 5)
    change.decided(kept[8:], 15)
    assert change.stayed(15) == 16
    change.changed()
    assert change.stayed(15) == 0
    change.undecided(15)
    assert change.since(kept) == 0.0
    assert change.since([*kept, odd]) == math.inf


def test_kept_up_window_by_window_it_is_the_same() -> None:
    """Windows come, and go once there are as many as are kept: the same number as from all of those that are left."""
    rng, change, kept = np.random.default_rng(4), LoadChange(), deque[Window](maxlen=6)
    before, decided_at = np.empty(0), 99
    for at, load in enumerate(windows(rng, SHARE_LE, 20, 0.3).astype(np.int64)):
        kept.append((at, load))
        if at in (3, 12):
            before = np.array([load_LE for _, load_LE in kept])
            change.decided(list(kept), decided_at := at)
        elif at > decided_at:
            new = np.array([load_LE for index, load_LE in kept if index > decided_at])
            expected = max(load_change(before, new), load_change(before, new[-1:]))
            assert change.since(kept) == pytest.approx(expected, rel=1e-9)

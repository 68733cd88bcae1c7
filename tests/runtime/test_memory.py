"""Windows that are stale are left out, and only those."""

import numpy as np
import pytest

from eplb_async.runtime.memory import fitted_memory, remembered

__all__: list[str] = []


def windows_of(*shares: list[float], tokens: int = 10_000, seed: int = 0) -> np.ndarray:
    """Poisson samples of two layers with these shares."""
    rng = np.random.default_rng(seed)
    return np.array([[rng.poisson(np.array(share) * tokens)] * 2 for share in shares], dtype=np.float64)


A, B = [0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]


@pytest.mark.parametrize("seed", range(5))
def test_traffic_that_stays_is_all_remembered(seed: int) -> None:
    """Windows that differ by sampling noise alone are all used, however few tokens they have."""
    for tokens in (30, 10_000):
        assert fitted_memory(windows_of(*[A] * 8, tokens=tokens, seed=seed)) == 8


def test_after_a_change_old_windows_are_left_out() -> None:
    """Two windows after a change the memory is one or two of them; the worked example of the module has 1."""
    assert fitted_memory(windows_of(A, A, A, A, A, A, B, B)) <= 2
    assert fitted_memory(np.array([[[5.0, 5]], [[5, 5]], [[9, 1]], [[9, 1]]])) == 1
    np.testing.assert_array_equal(remembered(windows_of(A, A, A, B, B), fitted=True)[-1], windows_of(A, A, A, B, B)[-1])


def test_the_first_window_after_a_change_is_seen() -> None:
    """The newest window was forecast far worse than the others were: it alone is planned on."""
    assert fitted_memory(windows_of(A, A, A, A, B)) == 1


def test_traffic_that_alternates_is_remembered() -> None:
    """Where the next window is never like the newest, a short memory forecasts worse than a long one."""
    assert fitted_memory(windows_of(A, B, A, B, A, B, A, B)) > 1


def test_windows_without_load_and_single_ones() -> None:
    """No load is no share; one window is all there is; without fitting all windows are planned on."""
    assert fitted_memory(np.zeros((3, 2, 4))) == 3
    assert fitted_memory(windows_of(A)) == 1
    assert len(remembered(windows_of(A, A, B), fitted=False)) == 3

"""Steps of a replay are samples of the recorded shares, the same for a seed, and count alike however few are measured."""

import numpy as np
import pytest

from eplb_async.core.errors import ConfigError
from eplb_async.runtime.replay_trace import Stretch, StretchedTrace, measured_every

__all__: list[str] = []

TRACE_TLE = np.array([[[6.0, 2.0, 0.0], [1.0, 1.0, 2.0]], [[0.0, 0.0, 0.0], [5.0, 0.0, 5.0]]])


def totals(stretch: Stretch) -> tuple[list[int], np.ndarray, np.ndarray]:
    """First steps of all pieces, and the loads of measured and of all steps, [spans, L, E]."""
    pieces = list(StretchedTrace(TRACE_TLE, stretch).spans())
    firsts = np.concatenate([piece.first_KLE for piece in pieces])
    return [piece.first_step for piece in pieces], firsts, np.concatenate([piece.total_KLE for piece in pieces])


def test_recorded_steps_are_left_as_they_are() -> None:
    """One step per window and no wish for tokens: the counts themselves."""
    _, firsts, sums = totals(Stretch())
    np.testing.assert_array_equal(firsts, TRACE_TLE)
    np.testing.assert_array_equal(sums, TRACE_TLE)


@pytest.mark.parametrize("every", [1, 5])
def test_samples_follow_the_shares(every: int) -> None:
    """Each layer of a step has as many tokens as asked for, in the recorded shares; a span has `every` times as many."""
    first_steps, firsts, sums = totals(Stretch(steps_per_window=200, tokens_per_step=800, every=every))
    assert first_steps[:2] == [0, min(200, 32 * every)]
    assert firsts.sum(axis=2)[0].tolist() == [800, 800]
    assert firsts.sum(axis=2)[-1].tolist() == [0, 800]  # no load was recorded
    assert (sums.sum(axis=2)[0] == 800 * every).all()
    np.testing.assert_allclose(sums[: 200 // every].sum(axis=0)[0] / 160_000, [0.75, 0.25, 0], atol=0.005)


def test_the_seed_decides() -> None:
    """Same seed, same steps; another seed, others."""
    one, same, other = (totals(Stretch(steps_per_window=40, seed=seed))[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_spans_fill_windows() -> None:
    """A span does not reach over the end of a window."""
    with pytest.raises(ConfigError, match="must divide 12"):
        StretchedTrace(TRACE_TLE, Stretch(steps_per_window=12, every=5))


def test_all_steps_are_measured_where_that_is_quick() -> None:
    """Else the most spans that fit the windows, and at most 10 steps each."""
    assert measured_every(1e6, [600]) == 1
    assert measured_every(1e9, [600, 1000]) == 10
    assert measured_every(1e9, [14]) == 7

"""The remembered PAR is the one that core/score.py gives."""

import numpy as np

from eplb_async.core.placement import initial_placement
from eplb_async.core.score import even_share, windows_par
from eplb_async.core.spec import MoESpec
from eplb_async.runtime.live_par import LivePar, mean_with_load

__all__: list[str] = []

SPEC = MoESpec(num_layers=3, num_experts=8, num_ranks=4, num_redundant=4)


def test_equals_windows_par_for_every_set_of_windows_and_placement() -> None:
    """Sliding windows, subsets and other placements give what windows_par gives; a layer without load is NaN."""
    rng, live = np.random.default_rng(1), LivePar(SPEC.topology, SPEC.num_layers)
    loads = [(index, rng.integers(0, 100, (3, 8))) for index in range(8)]
    for _, load_LE in loads:
        load_LE[1] = 0
    first_LP = initial_placement(SPEC)
    for rows_LP in (first_LP, rng.permuted(first_LP, axis=1)):
        for first, last in ((0, 3), (1, 4), (2, 3), (0, 8)):
            windows = loads[first:last]
            expected_L = windows_par(np.array([load for _, load in windows]), rows_LP, SPEC.topology)
            expected_L[1] = np.nan
            np.testing.assert_allclose(live.of(windows, rows_LP), expected_L)


def test_other_shares_are_another_placement() -> None:
    """The same windows and rows with weights, with other weights, and evenly again: never what was remembered before."""
    rng, live = np.random.default_rng(2), LivePar(SPEC.topology, SPEC.num_layers)
    windows, rows_LP = [(index, rng.integers(1, 100, (3, 8))) for index in range(3)], initial_placement(SPEC)
    load_TLE = np.array([load for _, load in windows])
    heavier_LP = even_share(rows_LP, SPEC.num_experts)
    heavier_LP[:, 0], heavier_LP[:, 8] = 0.9, 0.1  # the two slots of expert 0
    for share_LP in (heavier_LP, 1.0 * even_share(rows_LP, SPEC.num_experts), None, heavier_LP):
        expected_L = windows_par(load_TLE, rows_LP, SPEC.topology, share_LP)
        np.testing.assert_allclose(live.of(windows, rows_LP, share_LP), expected_L)
    assert not np.allclose(live.of(windows, rows_LP, heavier_LP), live.of(windows, rows_LP))


def test_window_of_the_same_index_but_other_load_is_looked_at_again() -> None:
    """After windows got another length their indices begin anew: what counts is the load."""
    live, rows_LP = LivePar(SPEC.topology, SPEC.num_layers), initial_placement(SPEC)
    even, skewed = np.ones((3, 8), dtype=np.int64), np.ones((3, 8), dtype=np.int64)
    skewed[:, 7] = 100
    assert (live.of([(0, skewed)], rows_LP) > live.of([(0, even)], rows_LP)).all()


def test_mean_leaves_layers_without_load_out() -> None:
    """NaN layers do not count; without any load the mean is 1."""
    assert mean_with_load(np.array([1.5, np.nan, 2.5])) == 2.0
    assert mean_with_load(np.full(3, np.nan)) == 1.0

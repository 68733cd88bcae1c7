"""Fitted dispatch: exact for one window, never worse than an even split, always valid rows, and each loop as its twin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.bench_dispatch import ReplayCase, interval_pairs, replay
from eplb_async.core.placement import initial_placement
from eplb_async.core.plan import PlanEntry, validate_entry
from eplb_async.core.score import even_share, rank_load, table_share, windows_par
from eplb_async.core.spec import MoESpec, Topology
from eplb_async.policies import _dispatch, _dispatch_descent
from eplb_async.policies.dispatch import fit_dispatch, split_options, wants_weights
from tests.core.placements import Case, cases
from tests.policies import dispatch_twins as twins
from tests.policies.dispatch_cases import draw_windows, take_apart

__all__: list[str] = []

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]
SLACK = 1e-5
"""For sums in another order, and the gap that counts as exact."""


def fit(
    case: Case, windows_TLE: FloatArray, strength: float = 1.0, *, rounded: bool = True
) -> tuple[FloatArray, IntArray, FloatArray]:
    """Shares, entries and bound of a case."""
    topology = case.spec.topology
    rows_LP = np.stack(case.rows)
    return _dispatch.fit_layers(
        windows_TLE, rows_LP, topology.num_ranks, topology.max_replicas, float(strength), rounded
    )


def mean_peak(case: Case, windows_TLE: FloatArray, share_LP: FloatArray | None) -> FloatArray:
    """Tokens of the busiest rank, mean over windows, [L]."""
    loads_TLR = rank_load(windows_TLE, np.stack(case.rows), case.spec.topology, share_LP)
    return np.asarray(loads_TLR.max(axis=-1).mean(axis=0))


wide = cases(layers=2, most_ranks=4, most_slots=4)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), case=wide)
def test_one_window_is_fitted_exactly(data: st.DataObject, case: Case) -> None:
    """The peak of the fitted shares is the least that any shares have, by linear programming duality; so is the bound."""
    windows_TLE = draw_windows(data, case, most=1)
    share_LP, _, bound_L = fit(case, windows_TLE, rounded=False)
    peak_L = mean_peak(case, windows_TLE, share_LP)
    for layer, row_P in enumerate(case.rows):
        parts = take_apart(windows_TLE[:, layer], row_P, case.spec.topology)
        fixed_RT, free_XT = parts.fixed_and_free
        least = twins.least_peak(fixed_RT[:, 0], free_XT[:, 0], parts.places)
        assert peak_L[layer] == pytest.approx(least, rel=SLACK)
        assert bound_L[layer] == pytest.approx(least, rel=SLACK)


def test_a_long_chain_is_fitted_exactly() -> None:
    """32 ranks in a row, each sharing an expert with the next, all load at one end: the sweeps reach the other end."""
    ranks = 32
    topology = Topology(num_ranks=ranks, slots_per_rank=2, max_replicas=1000)
    # expert e lives on ranks e and e + 1
    row_P = np.array([[max(rank - 1, 0), min(rank, ranks - 2)] for rank in range(ranks)], dtype=np.int32).ravel()
    load_TLE = np.ones((1, 1, ranks - 1))
    load_TLE[0, 0, :4] = 100
    share_LP, _, bound_L = _dispatch.fit_layers(load_TLE, row_P[None], ranks, topology.max_replicas, 1.0, False)
    peak = rank_load(load_TLE, row_P[None], topology, share_LP).max()
    # experts 0 to 3 can use ranks 0 to 4; each of their slots gets a thousandth at least, and so do those of expert 4
    assert peak == pytest.approx(400 / 5, rel=1e-2)
    assert peak == pytest.approx(bound_L[0], rel=1e-5)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), case=wide, strength=st.sampled_from([0.0, 0.3, 0.75, 1.0]))
def test_tables_are_valid_and_never_worse_than_even(data: st.DataObject, case: Case, strength: float) -> None:
    """Every slot of an expert stands in its row, ascending, in at most K entries; ranks accept the tables; the shares are
    those of the tables; and the mean peak over the windows, rounded, is not above the even split's, nor below the bound.
    """
    windows_TLE, rows_LP = draw_windows(data, case, most=4), np.stack(case.rows)
    fitted = fit_dispatch(windows_TLE, rows_LP, case.spec.topology, strength)
    for layer, row_P in enumerate(case.rows):
        table_EK, count_E = fitted.table_LEK[layer], fitted.count_LE[layer]
        for expert in range(case.spec.num_experts):
            row = table_EK[expert, : count_E[expert]].tolist()
            assert row == sorted(row)
            assert set(row) == set(np.flatnonzero(row_P == expert).tolist())
            assert (table_EK[expert, count_E[expert] :] == -1).all()
            if fitted.even_L[layer]:
                assert len(row) == len(set(row))
        entry = PlanEntry(layer, 0, row_P.tobytes(), b"", table_EK.tobytes(), count_E.tobytes())
        validate_entry(entry, row_P, case.spec, 1)
        np.testing.assert_allclose(fitted.share_LP[layer], table_share(table_EK, count_E, len(row_P)))
    even_L, peak_L = mean_peak(case, windows_TLE, None), mean_peak(case, windows_TLE, fitted.share_LP)
    assert (peak_L <= even_L * (1 + 1e-12)).all()
    assert (peak_L >= fitted.peak_bound_L * (1 - SLACK)).all()
    par_L = windows_par(windows_TLE, rows_LP, case.spec.topology, fitted.share_LP)
    assert (par_L <= windows_par(windows_TLE, rows_LP, case.spec.topology) * (1 + 1e-12)).all()


@settings(deadline=None, max_examples=150)
@given(data=st.data(), case=wide)
def test_rounding_costs_less_than_its_bound(data: st.DataObject, case: Case) -> None:
    """The mean peak grows by less than, on the rank where that is most, the sum of load / K over its slots of split experts."""
    windows_TLE = draw_windows(data, case, most=3)
    exact_LP, _, _ = fit(case, windows_TLE, rounded=False)
    share_LP, entries_LP, _ = fit(case, windows_TLE)
    rows_LP, topology = np.stack(case.rows), case.spec.topology
    arguments = case.spec.num_experts, topology.num_ranks, topology.max_replicas
    split_LP = [np.isin(row_P, twins.split_experts_twin(row_P.tolist(), *arguments)[0]) for row_P in rows_LP]
    most_TLR = rank_load(windows_TLE, rows_LP, topology, np.array(split_LP) / topology.max_replicas)
    grown_L = mean_peak(case, windows_TLE, share_LP) - mean_peak(case, windows_TLE, exact_LP)
    weighted_L = (entries_LP > 1).any(axis=1)  # a layer whose rows do not pay keeps the even split
    slack = 1e-9 * (1 + windows_TLE.max())
    assert (grown_L <= most_TLR.max(axis=-1).mean(axis=0) + slack)[weighted_L].all()


@settings(deadline=None, max_examples=60)
@given(data=st.data(), case=cases(layers=1, most_ranks=3, most_slots=2))
def test_bound_of_several_windows_holds_for_any_shares(data: st.DataObject, case: Case) -> None:
    """No shares, drawn at random, have a mean peak below the bound, if each slot has a share of 1 / K at least."""
    windows_TLE = draw_windows(data, case, most=4)
    _, _, bound_L = fit(case, windows_TLE)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    row_P, length = case.rows[0], case.spec.max_replicas
    for _ in range(50):
        share_P = np.zeros(len(row_P))
        for expert in range(case.spec.num_experts):
            slots = np.flatnonzero(row_P == expert)
            drawn = random.dirichlet(np.full(len(slots), 0.5))
            share_P[slots] = 1 / length + (1 - len(slots) / length) * drawn
        assert mean_peak(case, windows_TLE, share_P[None])[0] >= bound_L[0] * (1 - SLACK)


def test_several_windows_are_fitted_well() -> None:
    """One expert on two ranks, four windows: its share is within 3 % of the best one of a fine grid, by mean peak."""
    random, topology = np.random.default_rng(5), Topology(num_ranks=2, slots_per_rank=2, max_replicas=100)
    row_P = np.array([[0, 1, 0, 2]], dtype=np.int32)
    for _ in range(50):
        windows_TLE = random.gamma(1.0, 10.0, (4, 1, 3)) + 1
        share_LP, _, _ = _dispatch.fit_layers(windows_TLE, row_P, 2, 100, 1.0, False)

        def peak_of(share_LP: FloatArray, windows_TLE: FloatArray = windows_TLE) -> float:
            return float(rank_load(windows_TLE, row_P, topology, share_LP).max(axis=-1).mean())

        grid = [peak_of(np.array([[share, 1, 1 - share, 1]])) for share in np.linspace(0.01, 0.99, 99)]
        assert peak_of(share_LP) <= min(grid) * 1.03


def test_strength_goes_from_even_to_fitted() -> None:
    """0 is the even split, 1 the fit, and between them the peak of one window falls all the way."""
    windows_TLE, row_P = np.array([[[8.0, 4.0]]]), np.array([[0, 1, 0, -1]], dtype=np.int32)
    topology = Topology(num_ranks=2, slots_per_rank=2, max_replicas=1000)
    fits = [fit_dispatch(windows_TLE, row_P, topology, strength) for strength in (0.0, 0.25, 0.5, 1.0)]
    peaks = [rank_load(windows_TLE, row_P, topology, one.share_LP).max() for one in fits]
    assert fits[0].even_L.all()
    assert not any(one.even_L.any() for one in fits[1:])
    assert peaks == pytest.approx([8, 7.5, 7, 6], abs=0.01)


def test_where_there_is_nothing_to_choose_the_split_is_even() -> None:
    """Without load, with one slot per expert, with K slots of an expert, or all of them on one rank."""
    topology = Topology(num_ranks=2, slots_per_rank=2, max_replicas=2)
    load = np.array([[[9.0, 1.0]]])
    for row, windows_TLE in (
        ([0, 1, 0, 1], load),
        ([0, 0, 1, -1], load),
        ([1, -1, 0, -1], load),
        ([0, 1, 0, 1], 0 * load),
    ):
        fitted = fit_dispatch(windows_TLE, np.array([row], dtype=np.int32), topology)
        assert fitted.even_L.all()
        np.testing.assert_array_equal(fitted.share_LP, even_share(np.array([row], dtype=np.int32), 2))


def test_a_fit_that_does_not_lower_the_mean_peak_is_dropped() -> None:
    """Three windows whose squares and 8-norms are least at shares that have a higher mean peak than the even split."""
    windows_TLE = np.array([[[8.0, 0, 0, 0]], [[7, 8, 4, 0]], [[0, 2, 1, 0]]])
    topology, row_P = (
        Topology(num_ranks=3, slots_per_rank=2, max_replicas=8),
        np.array([[0, 1, 0, 2, 1, 3]], dtype=np.int32),
    )
    parts = take_apart(windows_TLE[:, 0], row_P[0], topology)
    _dispatch_descent.even_out(*(arguments := parts.arguments))
    _dispatch_descent.flatten_peaks(*arguments)
    assert _dispatch_descent.mean_peak(arguments[-1]) > 1.02 * _dispatch_descent.mean_peak(parts.load_RT)
    assert fit_dispatch(windows_TLE, row_P, topology).even_L.all()


def test_same_input_same_tables_whatever_was_fitted_between() -> None:
    """Layers do not influence each other, and neither does an earlier fit; inputs stay as they were."""
    spec = MoESpec(num_layers=3, num_experts=16, num_ranks=8, num_redundant=8)
    random = np.random.default_rng(1)
    windows_TLE, rows_LP = random.pareto(1.0, (4, 3, 16)) * 100, initial_placement(spec)
    windows_TLE.setflags(write=False)
    rows_LP.setflags(write=False)
    first = fit_dispatch(windows_TLE, rows_LP, spec.topology)
    fit_dispatch(windows_TLE[:1] * 2, rows_LP, spec.topology, 0.5)
    again = fit_dispatch(windows_TLE, rows_LP, spec.topology)
    alone = fit_dispatch(windows_TLE[:, 1:2], rows_LP[1:2], spec.topology)
    assert not first.even_L.any()
    for name in ("table_LEK", "count_LE", "share_LP", "peak_bound_L"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(first, name)[1:2], getattr(alone, name))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e15, 1e100])
def test_shares_do_not_depend_on_the_unit_of_load(scale: float) -> None:
    """Neither tiny nor huge loads under- or overflow."""
    spec = MoESpec(num_layers=1, num_experts=16, num_ranks=8, num_redundant=8)
    windows_TLE, rows_LP = np.random.default_rng(1).pareto(1.0, (3, 1, 16)) + 1, initial_placement(spec)
    for windows in (windows_TLE, windows_TLE[:1]):
        expected = fit_dispatch(windows, rows_LP, spec.topology).table_LEK
        np.testing.assert_array_equal(fit_dispatch(windows * scale, rows_LP, spec.topology).table_LEK, expected)


def test_planning_options_are_told_from_a_policys_own() -> None:
    """split_options takes out what every policy has; wants_weights looks at one of them."""
    options = {"dispatch": "weighted", "seed": 3, "dispatch_strength": 0.5}
    assert split_options(options) == ({"dispatch": "weighted", "dispatch_strength": 0.5}, {"seed": 3})
    assert wants_weights(options)
    assert not wants_weights({"dispatch": "even"})
    assert not wants_weights({})


def test_replay_scores_on_the_interval_after() -> None:
    """The benchmark: pairs stay inside their segment; a load that repeats is met as it was fitted, another one is not."""
    spec = MoESpec(num_layers=1, num_experts=4, num_ranks=2, num_redundant=2, table_length=32)
    hot = np.array([[[9.0, 3, 2, 1]]])
    repeated = ReplayCase("repeated", spec, np.repeat(hot, 8, axis=0), 4)
    assert interval_pairs(repeated, 1, 99) == [(0, 0), (1, 0), (2, 0), (4, 4), (5, 4), (6, 4)]
    assert interval_pairs(repeated, 2, 99) == [(0, 0), (4, 4)]
    assert interval_pairs(repeated, 1, 2) == [(0, 0), (6, 4)]
    assert interval_pairs(repeated, 3, 99) == []
    fresh, stale = replay(repeated, 1, interval_pairs(repeated, 1, 99), [0.5, 1.0])
    assert (fresh["pairs"], stale["pairs"]) == (6, 4)
    for row in (fresh, stale):
        assert row["fitted even"] == row["next even"]
        assert row["fitted 1"] == row["next 1"]
        assert 1 <= float(str(row["next 1"])) <= float(str(row["next even"]))
    changing = ReplayCase("changing", spec, np.concatenate([hot, hot[:, :, ::-1]]), 2)
    (row,) = replay(changing, 1, interval_pairs(changing, 1, 99), [1.0])
    assert float(str(row["next 1"])) > float(str(row["fitted 1"]))

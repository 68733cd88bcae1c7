"""Each loop that fits or rounds dispatch shares gives what its plain twin gives, and the numbers of its docstring."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_async.core.placement import weighted_dispatch_row
from eplb_async.core.spec import Topology
from eplb_async.policies import _dispatch, _dispatch_descent, _dispatch_rounding
from tests.core.placements import Case, cases
from tests.policies import dispatch_twins as twins
from tests.policies.dispatch_cases import take_apart

__all__: list[str] = []

wide = cases(layers=2, most_ranks=4, most_slots=4)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), case=wide, sweeps=st.integers(0, 2))
def test_round_shares_rounds_and_follows_the_loads(data: st.DataObject, case: Case, sweeps: int) -> None:
    """Rows are valid, the loads are those of the rows, and without sweeps each expert's row is the one of its own shares."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    windows_TE = random.gamma(0.7, 1.0, (2, case.spec.num_experts))
    length = case.spec.max_replicas
    parts = take_apart(windows_TE, case.rows[0], case.spec.topology)
    _dispatch_descent.even_out(*(arguments := parts.arguments))
    share_Q, fitted_RT = arguments[-2:]
    copies_Q = np.round(parts.low_Q * length).astype(np.int64)
    places, loads = (parts.rank_Q, copies_Q, parts.low_Q, share_Q), (fitted_RT, np.empty_like(fitted_RT))
    entries_Z = _dispatch_rounding.round_shares(parts.load_XT, parts.first_X, places, length, sweeps, loads)
    expected_RT, owner_Q = fitted_RT.copy(), np.repeat(np.arange(len(parts.places)), np.diff(parts.first_X))
    rank_Z, owner_Z = np.repeat(parts.rank_Q, copies_Q), np.repeat(owner_Q, copies_Q)
    share_Z = np.repeat(share_Q / copies_Q, copies_Q)
    for index in range(len(parts.places)):
        entries = entries_Z[owner_Z == index]
        assert (entries >= 1).all()
        assert entries.sum() <= length
        if not sweeps:
            slots = np.arange(len(entries), dtype=np.int32)
            row = weighted_dispatch_row(slots, share_Z[owner_Z == index], length)
            assert np.abs(entries / entries.sum() - share_Z[owner_Z == index]).max() == pytest.approx(
                np.abs(np.bincount(row) / len(row) - share_Z[owner_Z == index]).max()
            )
        change_Z = entries / entries.sum() - share_Z[owner_Z == index]
        np.add.at(expected_RT, rank_Z[owner_Z == index], change_Z[:, None] * parts.load_XT[index])
    np.testing.assert_allclose(loads[1], expected_RT)


def test_lighter_experts_make_up_for_what_rounding_does_to_heavier_ones() -> None:
    """The example of round_shares: with a sweep the rank loads are closer to the fitted ones."""
    load_XT, first_X = np.array([[6.0], [3.0]]), np.array([0, 2, 4])
    rank_Q, copies_Q = np.array([0, 1, 0, 1]), np.ones(4, dtype=np.int64)
    places, fitted_RT = (rank_Q, copies_Q, np.full(4, 1 / 3), np.array([0.4, 0.6] * 2)), np.array([[3.6], [5.4]])
    for sweeps, entries, loads in ((0, [1, 2, 1, 2], [3, 6]), (1, [1, 2, 1, 1], [3.5, 5.5])):
        rounded_RT = np.empty((2, 1))
        entries_Z = _dispatch_rounding.round_shares(load_XT, first_X, places, 3, sweeps, (fitted_RT, rounded_RT))
        assert entries_Z.tolist() == entries
        assert rounded_RT.ravel() == pytest.approx(loads)


@settings(deadline=None, max_examples=100)
@given(case=wide)
def test_split_experts_equals_its_twin(case: Case) -> None:
    """Experts with a choice, and their places, for rows with empty slots and several slots of an expert on a rank."""
    for row_P in case.rows:
        arguments = case.spec.num_experts, case.spec.num_ranks, case.spec.max_replicas
        expert_X, first_X, rank_Q, copies_Q = _dispatch.split_experts(row_P, *arguments)
        experts, places = twins.split_experts_twin(row_P.tolist(), *arguments)
        assert expert_X.tolist() == experts
        pairs = list(zip(rank_Q.tolist(), copies_Q.tolist(), strict=True))
        assert [pairs[a:b] for a, b in pairwise(first_X.tolist())] == places


@settings(deadline=None, max_examples=150)
@given(data=st.data(), num_places=st.integers(2, 5))
def test_water_fill_equals_its_twin(data: st.DataObject, num_places: int) -> None:
    """Closed-form levels equal bisection, with shares at their least among them."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    curvature_J, slope_J = random.random(num_places) + 0.1, random.normal(size=num_places)
    low_J = random.dirichlet(np.ones(num_places)) * data.draw(st.sampled_from([0.01, 0.5, 0.99]))
    share_J = np.empty(num_places)
    _dispatch_descent.water_fill(curvature_J, slope_J, low_J, 0, num_places, share_J)
    np.testing.assert_allclose(share_J, twins.water_fill_twin(curvature_J, slope_J, low_J), atol=1e-9)
    assert share_J.sum() == pytest.approx(1)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), case=cases(layers=1, most_ranks=4, most_slots=4), num_windows=st.integers(1, 3))
def test_descents_equal_their_twins(data: st.DataObject, case: Case, num_windows: int) -> None:
    """even_out, flatten_peaks and peak_bound, one after the other: the same rank loads and bounds as their plain twins."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    windows_TE = random.gamma(0.7, 1.0, (num_windows, case.spec.num_experts))
    parts = take_apart(windows_TE, case.rows[0], case.spec.topology)
    low, share, load_RT = parts.by_expert(parts.low_Q), parts.by_expert(parts.share_Q), parts.load_RT.copy()
    arguments = parts.arguments
    _dispatch_descent.even_out(*arguments)
    twins.even_out_twin(parts.load_XT, parts.places, low, share, load_RT)
    np.testing.assert_allclose(arguments[-1].max(axis=0), load_RT.max(axis=0), rtol=1e-4)
    # both go on from the same shares
    load_RT[:] = arguments[-1]
    share = parts.by_expert(arguments[-2])
    _dispatch_descent.flatten_peaks(*arguments)
    twins.flatten_peaks_twin(parts.load_XT, parts.places, low, share, load_RT)
    np.testing.assert_allclose(arguments[-1], load_RT, rtol=1e-6, atol=1e-9)
    bound = twins.peak_bound_twin(*parts.fixed_and_free, parts.places, arguments[-1])
    assert _dispatch_descent.peak_bound(*arguments) == pytest.approx(bound)
    assert _dispatch_descent.mean_peak(arguments[-1]) == pytest.approx(arguments[-1].max(axis=0).mean())


def test_flatten_peaks_keeps_the_best_shares_on_its_way() -> None:
    """Two windows in which the 8-norm falls on after the mean peak has begun to rise: as the twin, which keeps the best."""
    windows_TE, row_P = np.array([[0.0, 6, 4], [0, 0, 1]]), np.array([0, 1, 0, 2, 1, 2], dtype=np.int32)
    parts = take_apart(windows_TE, row_P, Topology(num_ranks=3, slots_per_rank=2, max_replicas=8))
    _dispatch_descent.even_out(*(arguments := parts.arguments))
    share, load_RT = parts.by_expert(arguments[-2]), arguments[-1].copy()
    _dispatch_descent.flatten_peaks(*arguments)
    twins.flatten_peaks_twin(parts.load_XT, parts.places, parts.by_expert(parts.low_Q), share, load_RT)
    np.testing.assert_allclose(arguments[-1], load_RT, rtol=1e-6)
    assert arguments[-1].max(axis=0).mean() == pytest.approx(2.096, abs=1e-3)


@settings(deadline=None, max_examples=200)
@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=7), extra=st.integers(0, 12))
def test_round_row_is_the_dispatch_row_of_core(weights: list[int], extra: int) -> None:
    """The same entries as core.placement.weighted_dispatch_row."""
    share_J = np.array(weights) / sum(weights)
    table_length = len(weights) + extra
    entries_J = np.zeros(len(weights), dtype=np.int64)
    _dispatch_rounding.round_row(share_J, len(weights), table_length, entries_J)
    slots = np.arange(len(weights), dtype=np.int32)
    # normalised there as it was here: shares that differ in the last bit may round to another row of the same error
    row = weighted_dispatch_row(slots, np.array(weights, dtype=np.float64), table_length)
    assert entries_J.tolist() == np.bincount(row).tolist()


@settings(deadline=None, max_examples=60)
@given(data=st.data(), case=cases(layers=1))
def test_tables_equal_their_twin(data: st.DataObject, case: Case) -> None:
    """Rows are the slots repeated, padded with -1."""
    row_P = case.rows[0]
    entries_P = [data.draw(st.integers(1, 2)) if expert >= 0 else 0 for expert in row_P.tolist()]
    length = 2 * len(row_P)
    table_LEK, count_LE = _dispatch_rounding.tables(
        row_P[None], np.array([entries_P], dtype=np.int32), case.spec.num_experts, length
    )
    rows = [row[:count].tolist() for row, count in zip(table_LEK[0], count_LE[0], strict=True)]
    assert rows == twins.tables_twin(row_P.tolist(), entries_P, case.spec.num_experts)
    assert (table_LEK[0][np.arange(length) >= count_LE[0][:, None]] == -1).all()


def test_worked_examples() -> None:
    """The docstrings' numbers."""
    row_P = np.array([[0, 1, 0, -1]], dtype=np.int32)
    share_LP, entries_LP, bound_L = _dispatch.fit_layers(np.array([[[8.0, 4.0]]]), row_P, 2, 4, 1.0, True)
    assert share_LP.tolist() == [[0.25, 1, 0.75, 0]]
    assert entries_LP.tolist() == [[1, 1, 3, 0]]
    assert bound_L == pytest.approx([6])
    table_LEK, count_LE = _dispatch_rounding.tables(row_P, entries_LP, 2, 4)
    assert table_LEK.tolist() == [[[0, 2, 2, 2], [1, -1, -1, -1]]]
    assert count_LE.tolist() == [[4, 1]]
    split = _dispatch.split_experts(np.array([0, 1, 0, 0, 2, 1], dtype=np.int32), 3, 3, 4)
    assert [part.tolist() for part in split] == [[0, 1], [0, 2, 4], [0, 1, 0, 2], [1, 2, 1, 1]]
    split = _dispatch.split_experts(np.array([0, 1, 0, 0, 2, 1], dtype=np.int32), 3, 3, 3)
    assert split[0].tolist() == [1]
    share_J = np.empty(2)
    _dispatch_descent.water_fill(np.ones(2), np.array([0, 0.4]), np.full(2, 0.25), 0, 2, share_J)
    assert share_J == pytest.approx([0.7, 0.3])
    _dispatch_descent.water_fill(np.ones(2), np.array([0, 2.0]), np.full(2, 0.25), 0, 2, share_J)
    assert share_J == pytest.approx([0.75, 0.25])
    entries_J = np.empty(2, dtype=np.int64)
    _dispatch_rounding.round_row(np.array([2 / 3, 1 / 3]), 2, 4, entries_J)
    assert entries_J.tolist() == [2, 1]


def test_worked_examples_of_the_descents() -> None:
    """The docstrings' numbers of even_out, peak_bound and flatten_peaks."""
    first_X, rank_Q = np.array([0, 2]), np.array([0, 1])
    share_Q, load_RT = np.full(2, 0.5), np.array([[8.0], [4.0]])
    _dispatch_descent.even_out(np.array([[8.0]]), first_X, rank_Q, np.full(2, 0.25), share_Q, load_RT)
    assert share_Q == pytest.approx([0.25, 0.75])
    assert load_RT.ravel() == pytest.approx([6, 6])
    three_RT = np.array([[6.0], [6.0], [1.0]])
    bound = _dispatch_descent.peak_bound(np.array([[8.0]]), first_X, rank_Q, np.full(2, 0.25), share_Q, three_RT)
    assert bound == pytest.approx(6)
    share_Q, load_RT = np.full(2, 0.5), np.array([[8.0, 2.0], [4.0, 6.0]])
    _dispatch_descent.flatten_peaks(np.array([[8.0, 4.0]]), first_X, rank_Q, np.full(2, 0.01), share_Q, load_RT)
    assert share_Q == pytest.approx([0.304, 0.696], abs=0.001)
    assert load_RT.max(axis=0) == pytest.approx([6.43, 6.78], abs=0.01)

"""Placements, their inverse maps and dispatch rows, against plain loops and brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_async.core.errors import PlacementError
from eplb_async.core.placement import (
    EMPTY,
    expert_to_slots,
    initial_placement,
    replica_count,
    validate_placement,
    weighted_dispatch_row,
)
from eplb_async.core.spec import MoESpec
from tests.core.placements import Case, cases

SPEC = MoESpec(num_layers=2, num_experts=4, num_redundant=2, num_ranks=3)


def test_initial_placement_example() -> None:
    """4 experts with 2 redundant: all in order, then 0 and 1 again, in every layer."""
    placement_LP = initial_placement(SPEC)
    assert placement_LP.tolist() == [[0, 1, 2, 3, 0, 1]] * 2
    assert placement_LP.dtype == np.int32


def test_inverse_examples() -> None:
    """The docstrings' numbers."""
    row = np.array([[0, 1, 0, -1]], dtype=np.int32)
    assert replica_count(row, 2).tolist() == [[2, 1]]
    table_LEK, count_LE = expert_to_slots(row, 2, 2)
    assert table_LEK.tolist() == [[[0, 2], [1, -1]]]
    assert count_LE.tolist() == [[2, 1]]


@given(cases(layers=3))
def test_inverse_leads_back_to_the_placement(case: Case) -> None:
    """Every row ascends, is padded with -1 after its length, and all rows together are the placement again."""
    rows_LP = np.stack(case.rows)
    table_LEK, count_LE = expert_to_slots(rows_LP, case.spec.num_experts, case.spec.max_replicas)
    assert count_LE.tolist() == replica_count(rows_LP, case.spec.num_experts).tolist()
    back_LP = np.full_like(rows_LP, EMPTY)
    for layer, expert in np.ndindex(count_LE.shape):
        row, count = table_LEK[layer, expert].tolist(), count_LE[layer, expert]
        assert row[:count] == sorted(set(row[:count]))
        assert row[count:] == [EMPTY] * (len(row) - count)
        back_LP[layer, row[:count]] = expert
    assert back_LP.tolist() == rows_LP.tolist()


def test_inverse_refuses_rows_that_are_too_short() -> None:
    """An expert with more slots than K is an error, not a cut row."""
    with pytest.raises(PlacementError, match="has 2 slots, but dispatch rows hold 1"):
        expert_to_slots(initial_placement(SPEC), 4, 1)


@given(cases())
def test_valid_placements_pass(case: Case) -> None:
    """Replicas, empty slots, any integer type and any number of rows are fine; what comes back is int32."""
    rows_LP = np.stack(case.rows)
    for given_LP in (rows_LP, rows_LP.astype(np.int64), rows_LP[:1], rows_LP[:0]):
        found_LP = validate_placement(given_LP, case.spec)
        assert found_LP.dtype == np.int32
        assert found_LP.tolist() == given_LP.tolist()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[0, 1, 2, 3, 0]], r"shape \[1, 5\].*P=6"),
        ([0, 1, 2, 3, 0, 1], r"shape \[6\]"),
        ([[0.0, 1, 2, 3, 0, 1]], "integers, not float64"),
        ([[True] * 6], "integers, not bool"),
        ([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 4]], r"layer 1 slot 5 names expert 4; experts are 0\.\.3"),
        ([[0, 1, 2, 3, -2, 1]], "layer 0 slot 4 names expert -2"),
        ([[0, 1, 2, 3, 1 << 32, 1]], "slot 4 names expert 4294967296"),
        ([[0, 1, 2, 3, 0, 1], [0, 1, 3, 3, 0, 1]], "layer 1 has no slot for expert 2"),
        ([[0, 1, 2, -1, 0, 1]], "no slot for expert 3"),
    ],
)
def test_invalid_placements_are_refused(rows: list[object], words: str) -> None:
    """Each fault is an error that names the first layer and expert."""
    with pytest.raises(PlacementError, match=words):
        validate_placement(np.array(rows), SPEC)


def test_more_replicas_than_a_dispatch_row_holds_are_refused() -> None:
    """K bounds the replicas of an expert."""
    spec = MoESpec(num_layers=2, num_experts=4, num_redundant=2, num_ranks=3, table_length=2)
    with pytest.raises(PlacementError, match="gives expert 3 3 slots; dispatch rows hold 2"):
        validate_placement(np.array([[0, 1, 2, 3, 3, 3]]), spec)


def test_weighted_row_example() -> None:
    """The docstring's numbers: two thirds and one third, exactly, in the shortest row that can."""
    row = weighted_dispatch_row(np.array([3, 7], dtype=np.int32), np.array([2.0, 1.0]), 4)
    assert row.tolist() == [3, 3, 7]


def least_error(share: list[float], table_length: int) -> dict[int, float]:
    """The least largest share error for every length, by trying every vector of counts."""
    found: dict[int, float] = {}
    for counts in itertools.product(range(1, table_length + 1), repeat=len(share)):
        if (length := sum(counts)) <= table_length:
            error = max(abs(count / length - part) for count, part in zip(counts, share, strict=True))
            found[length] = min(found.get(length, 2.0), error)
    return found


@given(
    weights=st.lists(st.floats(1e-3, 1e3) | st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=4),
    extra=st.integers(0, 4),
)
def test_weighted_row_is_the_best_there_is(weights: list[float], extra: int) -> None:
    """Every slot stands in the row, which has at most K entries, the least error of all counts, and no shorter equal."""
    slots = np.arange(len(weights), dtype=np.int32) * 3 + 1
    table_length = len(weights) + extra
    row = weighted_dispatch_row(slots, np.array(weights), table_length)
    counts = [int((row == slot).sum()) for slot in slots]
    assert min(counts) >= 1
    assert sum(counts) == len(row) <= table_length
    share = [weight / sum(weights) for weight in weights]
    error = max(abs(count / len(row) - part) for count, part in zip(counts, share, strict=True))
    errors = least_error(share, table_length)
    assert error <= min(errors.values()) + 1e-9
    assert all(shorter > error + 1e-13 for length, shorter in errors.items() if length < len(row))


@pytest.mark.parametrize(
    ("slots", "weights"),
    [([], []), ([1, 2, 3, 4, 5], [1] * 5), ([1, 2], [1]), ([1, 2], [1, 0]), ([1], [-1]), ([1], [np.nan])],
)
def test_weighted_row_refuses_what_makes_none(slots: list[int], weights: list[float]) -> None:
    """No slots, more than K, missing, zero, negative and undefined weights are errors."""
    with pytest.raises(PlacementError, match="do not make a dispatch row of at most 4"):
        weighted_dispatch_row(np.array(slots, dtype=np.int32), np.array(weights, dtype=np.float64), 4)

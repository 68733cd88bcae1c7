"""What a report says of balance and moves is what the definitions say, on cases small enough to do by hand."""

import numpy as np
import pytest

from eplb_async.core.placement import initial_placement
from eplb_async.core.score import windows_par
from eplb_async.core.spec import MoESpec
from eplb_async.policies.bounds import proven_peak_lower_bound
from eplb_async.runtime.offline_score import Compared, balance, gap_to_bound, moved_slots, moves, next_balance

__all__: list[str] = []

SPEC = MoESpec(num_layers=2, num_experts=4, num_ranks=2)
BEFORE = initial_placement(SPEC)
AFTER = np.array([[0, 2, 1, 3], [0, 1, 2, 3]], dtype=np.int32)
CHANGE = Compared(SPEC, BEFORE, AFTER)
WINDOWS = np.array([[[8, 2, 4, 2], [0, 0, 0, 0]], [[2, 6, 2, 6], [0, 0, 0, 0]]], dtype=np.float64)


def test_balance_by_hand() -> None:
    """PAR is the windows' mean, peak and bound are of their sum; a layer without load has PAR 1 and gap 0."""
    found = balance(WINDOWS, CHANGE)
    # before: rank loads 10 | 6 and 8 | 8; after: 12 | 4 and 4 | 12; the sums 18 | 14 and 16 | 16 of 32
    assert found["par_before_L"] == [(1.25 + 1.0) / 2, 1.0]
    assert found["par_L"] == [1.5, 1.0]
    assert (found["par"], found["par_max"]) == (1.25, 1.5)
    assert (found["max_load_L"], found["max_load"]) == ([16.0, 0.0], 16.0)
    assert (found["max_load_before_L"], found["max_load_before"]) == ([18.0, 0.0], 18.0)
    assert (found["bound_L"], found["bound"]) == ([16.0, 0.0], 16.0)
    assert (found["gap_L"], found["gap"], found["gap_max"]) == ([0.0, 0.0], 0.0, 0.0)
    assert (found["balancedness"], found["balancedness_before"]) == (1.0, 16 / 18)


def test_gap_is_the_mean_over_layers_and_bound_the_greatest() -> None:
    """`max_load` and `bound` are the worst layer's, `gap` is the mean of the layers' own."""
    load = np.array([[[9, 1, 1, 1], [2, 2, 0, 0]]], dtype=np.float64)
    found = balance(load, Compared(SPEC, BEFORE, BEFORE))
    bound_L = proven_peak_lower_bound(load[0], SPEC.topology)
    assert found["bound_L"] == bound_L.tolist() == [10.0, 2.0]
    assert found["max_load_L"] == [10.0, 4.0]
    assert found["gap_L"] == [0.0, 1.0]
    assert (found["gap"], found["gap_max"], found["bound"], found["max_load"]) == (0.5, 1.0, 10.0, 10.0)


def test_small_layers_are_compared_with_the_proven_optimum() -> None:
    """Where a placement is the best of its kind its gap is 0, though the cheap bound is lower."""
    spec = MoESpec(num_layers=1, num_experts=3, num_redundant=1, num_ranks=2)
    best = np.array([[0, 2, 1, 2]], dtype=np.int32)
    found = balance(np.array([[[3.0, 2.0, 1.0]]]), Compared(spec, initial_placement(spec), best))
    assert (found["max_load"], found["bound"], found["gap"]) == (3.5, 3.5, 0.0)


def test_other_kinds_of_placements_are_compared_with_the_cheap_bound() -> None:
    """An empty slot, an expert twice on a rank and a weighted split reach 3 and so beat 3.25: they get the mean, 2.75."""
    spec = MoESpec(num_layers=1, num_experts=3, num_redundant=1, num_ranks=2)
    load = np.array([[[3.0, 2.0, 0.5]]])
    full_LP = initial_placement(spec)
    assert balance(load, Compared(spec, full_LP, full_LP))["bound"] == 3.25
    for row, share in ([0, -1, 1, 2], None), ([0, 0, 1, 2], None), ([0, 2, 1, 2], [1.0, 0.0, 1.0, 1.0]):
        row_LP = np.array([row], dtype=np.int32)
        found = balance(load, Compared(spec, row_LP, row_LP, None if share is None else np.array([share])))
        assert (found["max_load"], found["bound"]) == (3.0, 2.75)


def test_gap_example() -> None:
    """The docstring's numbers; and what only rounding keeps apart is no gap."""
    assert gap_to_bound(np.array([232.0, 0.0]), np.array([200.0, 0.0])) == pytest.approx([0.16, 0.0])
    assert gap_to_bound(np.array([0.1 + 0.2]), np.array([0.3])).tolist() == [0.0]


def test_moved_slots_example() -> None:
    """The docstring's example, and a permutation inside ranks, which moves nothing."""
    spec = MoESpec(num_layers=1, num_experts=3, num_redundant=1, num_ranks=2)
    before = np.array([[0, 1, 2, 0]], dtype=np.int32)
    assert moved_slots(before, np.array([[1, 2, 0, 0]], dtype=np.int32), spec) == [2]
    permuted = np.array([[1, 0, 0, 2]], dtype=np.int32)
    assert moved_slots(before, permuted, spec) == [0]
    assert moves(Compared(spec, before, permuted), None)["slots_changed"] == 4


def test_moves_by_hand() -> None:
    """Counts per layer and in all, and bytes for those that come from another rank."""
    found = moves(CHANGE, 1000)
    assert found == {
        "moved": 2,
        "moved_share": 0.25,
        "moved_L": [2, 0],
        "slots_changed": 2,
        "slots_changed_L": [2, 0],
        "layers_changed": 1,
        "transfer_bytes": 2000,
    }
    assert moves(CHANGE, None)["transfer_bytes"] is None


def test_empty_slots_are_not_moved() -> None:
    """A slot that becomes empty changes, but nothing is sent for it; one that is filled again is."""
    spec = MoESpec(num_layers=1, num_experts=2, num_redundant=2, num_ranks=2)
    full, part = np.array([[0, 1, 0, 1]], dtype=np.int32), np.array([[0, -1, 1, -1]], dtype=np.int32)
    assert (moved_slots(full, part, spec), moved_slots(part, full, spec)) == ([0], [2])
    assert moves(Compared(spec, full, part), None)["slots_changed"] == 3


def test_next_windows() -> None:
    """Both placements are scored on the next windows; without any, every field is there and None."""
    found = next_balance(WINDOWS[1:], CHANGE)
    assert found["par_next_L"] == windows_par(WINDOWS[1:], AFTER, SPEC.topology).tolist() == [1.5, 1.0]
    assert (found["par_next_before"], found["par_next"], found["par_next_max"]) == (1.0, 1.25, 1.5)
    nothing = next_balance(None, CHANGE)
    assert nothing == dict.fromkeys(found)


def test_shares_count_after_and_not_before() -> None:
    """A weighted split is scored where it is used: after the change, on the planned and on the next windows."""
    spec = MoESpec(num_layers=1, num_experts=2, num_redundant=2, num_ranks=2)
    rows = np.array([[0, 1, 0, -1]], dtype=np.int32)
    load = np.array([[[8.0, 4.0]]])
    weighted = Compared(spec, rows, rows, np.array([[0.25, 1.0, 0.75, 0.0]]))
    found = balance(load, weighted) | next_balance(2 * load, weighted)
    assert (found["max_load_before"], found["max_load"], found["gap"]) == (8.0, 6.0, 0.0)
    assert found["par"] == found["par_next"] == found["balancedness"] == 1.0
    assert found["par_before"] == found["par_next_before"] == pytest.approx(8 / 6)

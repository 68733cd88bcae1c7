"""The exact search finds and proves the optimum, and says truly how far it came where it does not."""

import numpy as np
import pytest

from eplb_async.core.placement import replica_count, validate_placement
from eplb_async.core.score import rank_load
from eplb_async.core.spec import MoESpec, Topology
from eplb_async.policies._exact import packing_bound, solve
from eplb_async.policies._exact_start import descending, greedy, peak_of, simple_bound
from tests.policies import twins_exact

FLASHLB_LOAD = np.array([600.0, 560, 120, 120, 20, 10, 10, 10])
ENOUGH = 1_000_000


@pytest.mark.parametrize(("experts", "topology"), twins_exact.SHAPES)
def test_equals_exhaustive_search(experts: int, topology: Topology) -> None:
    """Peak and bound are the least peak of all placements, and the row is a placement of its kind that has that peak."""
    ranks, size = topology.num_ranks, topology.slots_per_rank
    for load_E in twins_exact.loads_to_try(experts, 40, seed=experts):
        row_P, peak, lower, _ = solve(load_E, ranks, size, topology.max_replicas, ENOUGH, np.inf)
        assert peak == pytest.approx(twins_exact.solve_twin(load_E, topology), rel=1e-9, abs=0)
        assert lower == peak
        assert rank_load(load_E[None], row_P[None], topology).max() == pytest.approx(peak, rel=1e-12, abs=0)
        assert all(len(set(held)) == size for held in row_P.reshape(ranks, size).tolist())
        assert replica_count(row_P[None], experts).min() >= 1
        assert replica_count(row_P[None], experts).max() <= topology.max_replicas


@pytest.mark.parametrize("budget", [0, 1, 5, 20, 100, 500])
def test_a_budget_that_ends_early(budget: int) -> None:
    """The peak is reached, the bound holds, and neither costs more nodes than allowed."""
    topology = Topology(num_ranks=4, slots_per_rank=2)
    proven = 0
    for load_E in twins_exact.loads_to_try(5, 20, seed=budget):
        row_P, peak, lower, nodes = solve(load_E, 4, 2, 4, budget, np.inf)
        least = twins_exact.solve_twin(load_E, topology)
        assert lower <= least * (1 + 1e-9) <= peak * (1 + 2e-9)
        assert rank_load(load_E[None], row_P[None], topology).max() == pytest.approx(peak)
        assert nodes <= budget
        proven += lower == peak
    assert (proven == 20) == (budget == 500)


def test_a_bound_is_raised_before_the_proof_is_reached() -> None:
    """More nodes prove more: the cheap bound, then by bisection more than it, then the optimum."""
    load_E = np.array([17.0, 193, 1, 193, 81, 43, 345, 29, 225, 388])
    found = [solve(load_E, 8, 2, 8, budget, np.inf)[1:3] for budget in (0, 300, 2_000, 20_000)]
    lower = [bound for _, bound in found]
    assert lower == sorted(set(lower))
    assert lower[0] == load_E.sum() / 8
    assert [bound == peak for peak, bound in found] == [False, False, False, True]


def test_published_example() -> None:
    """FlashLB's: 196.67 (590 / 3), which exhaustive search and an integer program found too, proven in a few nodes."""
    row_P, peak, lower, nodes = solve(FLASHLB_LOAD, 8, 2, 8, ENOUGH, np.inf)
    assert peak == lower == pytest.approx(590 / 3)
    assert nodes < 5_000
    spec = MoESpec(num_layers=1, num_experts=8, num_redundant=8, num_ranks=8)
    validate_placement(row_P[None], spec)
    # 600 has four replicas, not five, as greedy replication would give it
    assert replica_count(row_P[None], 8)[0, :2].tolist() == [4, 3]


def test_two_hot_experts() -> None:
    """Greedy replication splits each in five, of which two share a rank: 1.6 times the mean. In four it is the mean."""
    row_P, peak, lower, _ = solve(np.array([80.0, 80, 0, 0, 0, 0, 0, 0]), 8, 2, 8, ENOUGH, np.inf)
    assert peak == lower == 20
    assert replica_count(row_P[None], 8)[0, :2].tolist() == [4, 4]


def test_worked_example() -> None:
    """The docstring's: 3.5 by a second replica of the expert with 1."""
    row_P, peak, lower, _ = solve(np.array([3.0, 2, 1]), 2, 2, 2, ENOUGH, np.inf)
    assert (row_P.tolist(), peak, lower) == ([0, 2, 1, 2], 3.5, 3.5)


def test_a_known_peak() -> None:
    """From a peak that is possible: a better placement, or none and the proof that there is none."""
    row_P, peak, lower, _ = solve(FLASHLB_LOAD, 8, 2, 8, ENOUGH, 200.0)
    assert peak == lower == pytest.approx(590 / 3)
    assert row_P.min() == 0
    row_P, peak, lower, _ = solve(FLASHLB_LOAD, 8, 2, 8, ENOUGH, 590 / 3)
    assert peak == lower == pytest.approx(590 / 3)
    row_P, peak, lower, _ = solve(np.array([3.0, 2, 1]), 2, 2, 2, ENOUGH, 3.5)
    assert (set(row_P.tolist()), peak, lower) == ({-1}, 3.5, 3.5)


def test_scale_does_not_matter() -> None:
    """The same loads times a power of two give the same row and proof."""
    row_P, peak, lower, nodes = solve(FLASHLB_LOAD, 8, 2, 8, ENOUGH, np.inf)
    for exponent in (-900, -20, 20, 900):
        scaled = solve(np.ldexp(FLASHLB_LOAD, exponent), 8, 2, 8, ENOUGH, np.inf)
        assert scaled[0].tolist() == row_P.tolist()
        assert scaled[1:] == (np.ldexp(peak, exponent), np.ldexp(lower, exponent), nodes)


@pytest.mark.parametrize(("experts", "ranks", "size", "most"), [(2, 2, 3, 2), (5, 2, 2, 2), (3, 4, 2, 2)])
def test_shapes_without_a_placement(experts: int, ranks: int, size: int, most: int) -> None:
    """More slots on a rank than experts, fewer slots than experts, or too few replicas allowed to fill the slots."""
    with pytest.raises(ValueError, match="no placement fills every slot"):
        solve(np.ones(experts), ranks, size, most, 10, np.inf)


def test_packing_bound() -> None:
    """The docstring's example, and the plain definition on shares of many shapes."""
    assert packing_bound(np.array([6.0, 5, 4, 1]), 2) == 9
    random = np.random.default_rng(0)
    for _ in range(200):
        ranks, size = int(random.integers(1, 6)), int(random.integers(1, 5))
        share_P = -np.sort(-random.lognormal(sigma=1.5, size=ranks * size))
        assert packing_bound(share_P, ranks) == pytest.approx(twins_exact.packing_bound_twin(share_P.tolist(), ranks))


def test_where_the_search_starts() -> None:
    """The docstrings' examples; on loads of many kinds the first placement has the peak it says, not below the bound."""
    assert descending(np.array([1.0, 3, 1])).tolist() == [1, 0, 2]
    assert simple_bound(np.array([8.0, 1, 1, 1]), 4, 2, 2) == 8
    assert peak_of(np.array([3.0, 2, 1]), np.array([0, 2, 1, 2], dtype=np.int32), 2) == 3.5
    assert greedy(np.array([80.0, 80, 0, 0, 0, 0, 0, 0]), 8, 2, 8)[1] == 20
    for load_E in -np.sort(-twins_exact.loads_to_try(6, 30, seed=0), axis=1):
        assert descending(load_E).tolist() == np.argsort(-load_E, kind="stable").tolist()
        row_P, peak = greedy(load_E, 4, 2, 4)
        assert peak == peak_of(load_E, row_P, 4) >= simple_bound(load_E, 8, 4, 4) * (1 - 1e-12)
        assert all(len(set(held)) == 2 for held in row_P.reshape(4, 2).tolist())

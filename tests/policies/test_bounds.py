"""The lower bounds hold for every placement, and are reached where they should be."""

import numpy as np
import pytest

from eplb_async.core.placement import initial_placement
from eplb_async.core.score import par, rank_load
from eplb_async.core.spec import MoESpec, Topology
from eplb_async.policies.bounds import (
    par_lower_bound,
    peak_lower_bound,
    peak_lower_bound_with_moves,
    proven_peak_lower_bound,
)
from eplb_async.policies.registry import run_policy
from tests.policies import twins, twins_exact


@pytest.mark.parametrize(
    ("experts", "slots", "ranks", "table_length"),
    [
        (2, 4, 2, 0),
        (3, 4, 2, 0),
        (3, 6, 3, 0),
        (4, 4, 2, 0),
        (4, 6, 2, 2),
        (4, 6, 3, 0),
        (5, 6, 2, 0),
        (5, 6, 3, 0),
        (3, 6, 6, 2),
    ],
)
def test_no_placement_beats_the_bound(experts: int, slots: int, ranks: int, table_length: int) -> None:
    """Against the exact optimum of every small case: never above it, and on average within a tenth of it."""
    spec = MoESpec(
        num_layers=40, num_experts=experts, num_redundant=slots - experts, num_ranks=ranks, table_length=table_length
    )
    random = np.random.default_rng(slots)
    load_LE = random.lognormal(sigma=1.0, size=(40, experts))
    load_LE[::2] = random.integers(0, 10, size=(20, experts)) + np.eye(1, experts)
    placements = twins.all_placements(experts, spec.topology)
    optimum_L = np.array([twins.least_peak(load_E, placements, spec.topology) for load_E in load_LE])
    ratio_L = peak_lower_bound(load_LE, spec.topology) / optimum_L
    assert ratio_L.max() <= 1 + 1e-12
    assert ratio_L.mean() > 0.9


@pytest.mark.parametrize(
    ("load", "shape", "peak"),
    [
        # the worked example: no spare slot, so one rank has the 8 whole
        ([8, 1, 1, 1], {"num_ranks": 2, "slots_per_rank": 2}, 8),
        # an even load: the mean
        ([2, 2, 2, 2], {"num_ranks": 2, "slots_per_rank": 2}, 4),
        # 12 may be split in 3 at most (K), though 4 slots are spare
        ([12, 0, 0, 0], {"num_ranks": 4, "slots_per_rank": 2, "max_replicas": 3}, 4),
        # and in 2 at most on 2 ranks
        ([12, 0, 0, 0], {"num_ranks": 2, "slots_per_rank": 4}, 6),
        # three experts of 2 on two ranks without a spare slot: two of them meet
        ([2, 2, 2, 0], {"num_ranks": 2, "slots_per_rank": 2}, 4),
    ],
)
def test_each_bound_in_turn(load: list[float], shape: dict[str, int], peak: float) -> None:
    """Cases where one of the three bounds is the greatest, by hand."""
    assert peak_lower_bound(np.array([load], dtype=np.float64), Topology(**shape)).tolist() == [peak]


def test_par_bound() -> None:
    """The bound as a PAR: 1 without load, and never above what `default` reaches."""
    spec = MoESpec(num_layers=5, num_experts=32, num_redundant=4, num_ranks=4)
    load_LE = np.random.default_rng(0).lognormal(sigma=2.0, size=(5, 32))
    load_LE[0] = 0
    placement, _ = run_policy("default", load_LE[None], initial_placement(spec), spec, {})
    reached_L = par(rank_load(load_LE, placement, spec.topology))
    bound_L = par_lower_bound(load_LE, spec.topology)
    assert bound_L[0] == 1
    assert (bound_L >= 1).all()
    assert (bound_L <= reached_L + 1e-12).all()


@pytest.mark.parametrize(("experts", "topology"), twins_exact.SHAPES)
def test_proven_bound_is_the_optimum(experts: int, topology: Topology) -> None:
    """On small layers it is the least peak; with no node to spend it is the cheap bound."""
    load_LE = twins_exact.loads_to_try(experts, 12, seed=1)
    least_L = [twins_exact.solve_twin(load_E, topology) for load_E in load_LE]
    np.testing.assert_allclose(proven_peak_lower_bound(load_LE, topology), least_L, rtol=1e-9)
    cheap_L = peak_lower_bound(load_LE, topology)
    assert proven_peak_lower_bound(load_LE, topology, node_budget=0).tolist() == cheap_L.tolist()


def test_proven_bound_examples() -> None:
    """The docstring's: FlashLB's example, and a layer where an empty slot beats what is proven for full ones."""
    load_LE = np.array([[600.0, 560, 120, 120, 20, 10, 10, 10]])
    topology = Topology(num_ranks=8, slots_per_rank=2)
    assert peak_lower_bound(load_LE, topology) == pytest.approx([181.25])
    assert proven_peak_lower_bound(load_LE, topology) == pytest.approx([590 / 3])
    topology, load_LE = Topology(num_ranks=2, slots_per_rank=2), np.array([[3.0, 2, 1]])
    assert proven_peak_lower_bound(load_LE, topology).tolist() == [3.5]
    assert rank_load(load_LE, np.array([[0, -1, 1, 2]], dtype=np.int32), topology).max() == 3


@pytest.mark.parametrize(
    "topology",
    [
        Topology(num_ranks=4, slots_per_rank=8),  # P > 24
        Topology(num_ranks=2, slots_per_rank=7),  # more slots on a rank than experts
        Topology(num_ranks=4, slots_per_rank=3, max_replicas=1),  # no placement fills all slots
    ],
)
def test_layers_that_are_not_searched(topology: Topology) -> None:
    """Large ones, and ones without a placement of the kind, have the cheap bound."""
    load_LE = np.random.default_rng(0).lognormal(size=(2, 6))
    assert proven_peak_lower_bound(load_LE, topology).tolist() == peak_lower_bound(load_LE, topology).tolist()


@pytest.mark.parametrize(("experts", "topology"), twins_exact.SHAPES)
def test_no_moves_beat_the_bound_with_moves(experts: int, topology: Topology) -> None:
    """Never above the least peak of all placements that m moves reach, from live rows of every kind; exact without moves."""
    random = np.random.default_rng(experts)
    rows_NP = twins_exact.full_placements(experts, topology)
    distance = []
    for load_E in twins_exact.loads_to_try(experts, 12, seed=2):
        load_NR = rank_load(np.broadcast_to(load_E, (len(rows_NP), experts)), rows_NP, topology)
        any_P = random.integers(-1, experts, size=topology.num_slots).astype(np.int32)
        full_P = rows_NP[random.integers(len(rows_NP))]
        for live_P in (full_P, rows_NP[load_NR.max(axis=1).argmax()], any_P):
            moved_N = twins_exact.moves_from(live_P, rows_NP, topology)
            for moves in range(topology.num_slots + 1):
                if not (moved_N <= moves).any():
                    continue
                least = load_NR[moved_N <= moves].max(axis=1).min()
                bound = peak_lower_bound_with_moves(load_E, live_P, topology, moves)
                assert bound <= least * (1 + 1e-12)
                distance.append(bound / least if least else 1.0)
                if moves == 0:
                    assert bound == pytest.approx(least)
    assert np.mean(distance) > 0.85


def test_bound_with_moves_examples() -> None:
    """The docstring's: without a move, with one, with two; and more moves than slots, which leave the plain bound."""
    load_E = np.array([4.0] * 6 + [1.0] * 5)
    row_P = np.array([*range(11), 6], dtype=np.int32)
    topology = Topology(num_ranks=6, slots_per_rank=2)
    bounds = [peak_lower_bound_with_moves(load_E, row_P, topology, moves) for moves in (0, 1, 2, 100)]
    assert bounds == pytest.approx([8, 8, 29 / 6, 29 / 6])


def test_bound_with_moves_where_they_lead_nowhere() -> None:
    """A rank that holds an expert twice must receive one: without a move there is no placement, and the bound is the plain one."""
    topology, load_E = Topology(num_ranks=2, slots_per_rank=2), np.array([1.0, 2, 3])
    twice_P = np.array([0, 0, 1, 2], dtype=np.int32)
    assert peak_lower_bound_with_moves(load_E, twice_P, topology, 0) == 3
    wide = Topology(num_ranks=2, slots_per_rank=4)
    assert peak_lower_bound_with_moves(load_E, np.array([0, 1, 2, 0] * 2, dtype=np.int32), wide, 1) == 3


def test_bound_with_moves_says_how_far_few_moves_can_reach() -> None:
    """On a real shape few moves leave a rank alone, so the bound lies above the plain one, and falls with more moves."""
    spec = MoESpec(num_layers=1, num_experts=256, num_redundant=32, num_ranks=32)
    load_E = np.random.default_rng(3).lognormal(sigma=1.0, size=256)
    live_P = initial_placement(spec)[0]
    bounds = [peak_lower_bound_with_moves(load_E, live_P, spec.topology, moves) for moves in range(20)]
    plain = peak_lower_bound(load_E[None], spec.topology)[0]
    assert bounds[0] == pytest.approx(rank_load(load_E[None], live_P[None], spec.topology).max())
    assert bounds[0] > bounds[1] > bounds[2] > plain
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == plain

"""The lower bounds hold for every placement, and are reached where they should be."""

import numpy as np
import pytest

from eplb_async.core.placement import initial_placement
from eplb_async.core.score import par, rank_load
from eplb_async.core.spec import MoESpec, Topology
from eplb_async.policies.bounds import par_lower_bound, peak_lower_bound
from eplb_async.policies.registry import run_policy
from tests.policies import twins


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

"""The compiled loops of planning equal their plain twins, and the worked examples of their docstrings hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_async.core.spec import Topology
from eplb_async.policies import _kernels
from tests.policies import twins

# experts, topology (its max_replicas is the most that the kernel may use)
SHAPES = [
    (16, Topology(num_ranks=6, slots_per_rank=4, max_replicas=6)),
    (16, Topology(num_ranks=6, slots_per_rank=4, max_replicas=2)),
    (12, Topology(num_ranks=12, slots_per_rank=1, max_replicas=3)),
    (16, Topology(num_ranks=8, slots_per_rank=3, num_nodes=2, num_expert_groups=4, max_replicas=4)),
    (16, Topology(num_ranks=8, slots_per_rank=3, num_nodes=4, num_expert_groups=4, max_replicas=2)),
    (24, Topology(num_ranks=8, slots_per_rank=5, num_nodes=2, num_expert_groups=2, max_replicas=3)),
    (5, Topology(num_ranks=2, slots_per_rank=3, max_replicas=2)),
]


@settings(deadline=None, max_examples=100)
@given(weights=st.lists(st.integers(0, 9), max_size=40))
def test_heaviest_first_equals_a_stable_sort(weights: list[int]) -> None:
    """Equal weights keep their order, for any number of items."""
    weight_Q = np.array(weights, dtype=np.float64)
    assert _kernels.heaviest_first(weight_Q).tolist() == twins.heaviest_first_twin(weight_Q)


def test_worked_examples() -> None:
    """The numbers in the docstrings are right."""
    assert _kernels.heaviest_first(np.array([30.0, 40.0, 20.0, 30.0])).tolist() == [1, 0, 3, 2]
    experts, weights = _kernels.replicate(np.array([90.0, 40.0, 20.0]), np.arange(3), 5, 3)
    assert (experts.tolist(), weights.tolist()) == ([0, 1, 2, 0, 0], [30.0, 40.0, 20.0, 30.0, 30.0])
    bins, load = _kernels.pack(np.array([30.0, 40.0, 20.0, 30.0, 30.0, 10.0]), 2, 3)
    assert (bins.tolist(), load.tolist()) == ([1, 0, 1, 1, 0, 0], [80.0, 80.0])
    row, weight, bin_load = (
        np.array([0, 0, 1, 2], dtype=np.int32),
        np.array([5.0, 5.0, 6.0, 4.0]),
        np.array([10.0, 10.0]),
    )
    _kernels.separate(row, weight, bin_load, 3)
    assert (row.tolist(), bin_load.tolist()) == ([1, 0, 0, 2], [11.0, 9.0])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("experts", "topology"), SHAPES)
def test_plan_layers_equals_its_twin(experts: int, topology: Topology, ties: bool) -> None:
    """Whole plans agree slot for slot, with and without equal loads and idle experts."""
    random = np.random.default_rng(experts)
    if ties:
        load_LE = random.integers(0, 4, size=(6, experts)).astype(np.float64)
        load_LE[0] = 0
    else:
        load_LE = random.lognormal(sigma=2.0, size=(6, experts))
    ranks, nodes, most = topology.num_ranks, topology.num_nodes, topology.max_replicas
    planned_LP = _kernels.plan_layers(load_LE, ranks, topology.slots_per_rank, nodes, topology.num_expert_groups, most)
    np.testing.assert_array_equal(planned_LP, twins.plan_layers_twin(load_LE, topology, nodes, most))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_separate_leaves_no_duplicate_and_equals_its_twin(data: st.DataObject) -> None:
    """From any bins with at most R replicas of each expert and S <= E, in any order: the same swaps, and none left."""
    ranks, per_rank = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 4))
    num_experts = data.draw(st.integers(per_rank, ranks * per_rank))
    count_E = np.ones(num_experts, dtype=np.int64)
    for _ in range(ranks * per_rank - num_experts):
        room = np.flatnonzero(count_E < ranks).tolist()
        count_E[data.draw(st.sampled_from(room))] += 1
    row_Q = np.array(data.draw(st.permutations(np.repeat(np.arange(num_experts), count_E).tolist())), dtype=np.int32)
    weight_E = np.array(
        data.draw(st.lists(st.integers(0, 9), min_size=num_experts, max_size=num_experts)), dtype=np.float64
    )
    compiled = row_Q.copy(), weight_E[row_Q], weight_E[row_Q].reshape(ranks, per_rank).sum(axis=1)
    plain = compiled[0].copy(), compiled[1].copy(), compiled[2].copy()
    _kernels.separate(*compiled, num_experts)
    twins.separate_twin(*plain)
    for one, other in zip(compiled, plain, strict=True):
        np.testing.assert_array_equal(one, other)
    assert all(len(set(stretch)) == per_rank for stretch in compiled[0].reshape(ranks, per_rank).tolist())
    np.testing.assert_array_equal(np.sort(compiled[0]), np.sort(row_Q))
    np.testing.assert_allclose(compiled[2], compiled[1].reshape(ranks, per_rank).sum(axis=1))


def test_separate_gives_up_where_nothing_helps() -> None:
    """An expert with more replicas than ranks cannot be separated; the loop ends all the same."""
    row = np.array([0, 0, 0, 1], dtype=np.int32)
    _kernels.separate(row, np.ones(4), np.full(2, 2.0), 2)
    assert sorted(row.tolist()) == [0, 0, 0, 1]


def test_idle_experts_share_spare_slots_evenly() -> None:
    """Without load there is nothing to prefer an expert for: no expert gets a third replica before all have two."""
    experts, _ = _kernels.replicate(np.zeros(4), np.arange(4), 7, 4)
    assert experts.tolist() == [0, 1, 2, 3, 0, 1, 2]

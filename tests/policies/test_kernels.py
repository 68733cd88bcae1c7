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


def test_worked_examples() -> None:
    """The numbers in the docstrings are right."""
    group_load, order = np.array([[1.0, 5.0, 4.0, 3.0]]), np.array([[1, 2, 3, 0]])
    assert _kernels.order_in_nodes(group_load, order, 2, 1).tolist() == [[1, 0, 2, 3]]
    experts, weights = np.empty(5, dtype=np.int32), np.empty(5)
    _kernels.replicate(np.array([90.0, 40.0, 20.0]), np.arange(3), 3, experts, weights)
    assert (experts.tolist(), weights.tolist()) == ([0, 1, 2, 0, 0], [30.0, 40.0, 20.0, 30.0, 30.0])
    weights, kinds = np.array([30.0, 40.0, 20.0, 30.0, 30.0, 10.0]), np.array([0, 1, 2, 0, 0, 3], dtype=np.int32)
    order = np.array([1, 0, 3, 4, 2, 5])
    for apart, expected in ((False, [1, 4, 5, 0, 3, 2]), (True, [1, 3, 5, 0, 4, 2])):
        items, load = _kernels.pack(weights, kinds, order, 2, apart)
        assert (items.tolist(), load.tolist()) == (expected, [80.0, 80.0])
    heap = np.arange(3)
    _kernels.sink(heap, np.array([7.0, 5.0, 5.0]), 0)
    assert heap.tolist() == [1, 0, 2]
    row, weight, bin_load = (
        np.array([0, 0, 1, 2], dtype=np.int32),
        np.array([5.0, 5.0, 6.0, 4.0]),
        np.array([10.0, 10.0]),
    )
    _kernels.separate(row, weight, bin_load, 3)
    assert (row.tolist(), bin_load.tolist()) == ([1, 0, 0, 2], [11.0, 9.0])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("experts", "topology"), SHAPES)
def test_loops_equal_their_twins(experts: int, topology: Topology, ties: bool) -> None:
    """Groups on nodes, replicas and bins agree item for item, with and without equal loads and idle experts."""
    random = np.random.default_rng(experts)
    load_LE = random.integers(0, 4, size=(6, experts)) if ties else random.lognormal(sigma=2.0, size=(6, experts))
    load_LE = load_LE.astype(np.float64)
    load_LE[0] *= not ties
    nodes, groups, per_rank = topology.num_nodes, topology.num_expert_groups, topology.slots_per_rank
    group_load_LG = load_LE.reshape(6, groups, -1).sum(axis=2)
    order_LG = np.argsort(-group_load_LG, axis=1)
    member_LE = _kernels.order_in_nodes(group_load_LG, order_LG, nodes, experts // groups)
    members = [twins.order_in_nodes_twin(load_G, nodes, experts // groups) for load_G in group_load_LG]
    assert member_LE.reshape(6, nodes, -1).tolist() == members

    slots = topology.num_slots // nodes
    expert_XQ, weight_XQ = _kernels.replicate_all(load_LE, member_LE, nodes, slots, topology.max_replicas)
    layers = [(load_E, node) for load_E, of_layer in zip(load_LE, members, strict=True) for node in of_layer]
    items = [twins.replicate_twin(load_E, node, slots, topology.max_replicas) for load_E, node in layers]
    assert list(zip(expert_XQ.tolist(), weight_XQ.tolist(), strict=True)) == items

    order_XQ = np.argsort(-weight_XQ, axis=1)
    ranks = topology.num_ranks // nodes
    for apart in (False, True):
        for experts_Q, weight_Q, order_Q in zip(expert_XQ, weight_XQ, order_XQ, strict=True):
            item_Q, load_R = _kernels.pack(weight_Q, experts_Q, order_Q, ranks, apart)
            bins = twins.pack_twin(weight_Q.tolist(), experts_Q.tolist(), order_Q.tolist(), ranks, apart)
            assert (item_Q.reshape(ranks, per_rank).tolist(), load_R.tolist()) == bins
        planned_XQ = _kernels.pack_all(expert_XQ, weight_XQ, order_XQ, per_rank, experts, apart)
        most = topology.max_replicas if apart else 0
        if apart or topology.max_replicas >= slots:
            plain = [twins.plan_node_twin(load_E, node, ranks, per_rank, most) for load_E, node in layers]
            assert planned_XQ.tolist() == plain


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_sunk_entry_leaves_a_heap(data: st.DataObject) -> None:
    """Whatever grows, on top or in the middle, no child is before its parent: by key, then by index."""
    keys = st.integers(0, 5).map(float) | st.just(np.inf)
    key = np.array(data.draw(st.lists(keys, min_size=1, max_size=20)))
    heap = np.arange(len(key))
    for node in reversed(range(len(key))):
        _kernels.sink(heap, key, node)
    for _ in range(5):
        node = data.draw(st.integers(0, len(key) - 1))
        key[heap[node]] += data.draw(st.integers(0, 3))
        _kernels.sink(heap, key, node)
        entries = [(key[index], index) for index in heap.tolist()]
        assert sorted(heap.tolist()) == list(range(len(key)))
        assert all(entries[(child - 1) // 2] < entries[child] for child in range(1, len(entries)))


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

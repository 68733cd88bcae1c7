"""A spec holds only numbers that fit together, and says which do not."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_async.core.errors import SpecError
from eplb_async.core.placement import initial_placement, replica_count
from eplb_async.core.spec import MoESpec, Topology

DEEPSEEK = MoESpec(num_layers=58, num_experts=256, num_ranks=32, num_redundant=32, num_nodes=4, num_expert_groups=8)


def test_derived_numbers() -> None:
    """DeepSeek-V3 on 32 ranks: 288 slots, 9 a rank, K = 32 (a replica on every rank), 8 ranks a node."""
    assert (DEEPSEEK.num_slots, DEEPSEEK.slots_per_rank, DEEPSEEK.max_replicas) == (288, 9, 32)
    topology = DEEPSEEK.topology
    assert (topology.num_slots, topology.ranks_per_node, topology.num_expert_groups) == (288, 8, 8)
    assert topology.max_replicas == 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_redundant": 30}, ["286 slots", "num_redundant=32 or 0"]),
        ({"num_experts": 30, "num_redundant": 1, "num_expert_groups": 1}, ["use num_redundant=2"]),
        ({"num_nodes": 5}, ["32 ranks", "5 nodes"]),
        ({"num_nodes": 0}, ["num_nodes is 0"]),
        ({"num_expert_groups": 7}, ["256 experts", "7 expert groups"]),
        ({"num_expert_groups": 0}, ["0 expert groups"]),
        ({"num_layers": 0}, ["num_layers is 0"]),
        ({"num_experts": 0}, ["num_experts is 0"]),
        ({"num_ranks": 0}, ["num_ranks is 0"]),
        ({"num_redundant": -32}, ["num_redundant is -32"]),
        ({"table_length": -1}, ["table_length is -1"]),
        ({"table_length": 1}, ["table_length is 1", "need 2 replicas"]),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, int], words: list[str]) -> None:
    """Each contradiction raises SpecError with the numbers, and with what would be right where that is known."""
    with pytest.raises(SpecError) as caught:
        msgspec.structs.replace(DEEPSEEK, **changes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"num_ranks": 0}, "num_ranks is 0"), ({"slots_per_rank": 0}, "slots_per_rank"), ({"num_nodes": 3}, "3 nodes")],
)
def test_topology_refuses_too(changes: dict[str, int], word: str) -> None:
    """Policies get a topology that is right by itself."""
    with pytest.raises(SpecError, match=word):
        Topology(**{"num_ranks": 4, "slots_per_rank": 2, **changes})


@given(ranks=st.integers(1, 9), slots=st.integers(1, 9), experts=st.integers(1, 81), table_length=st.integers(0, 12))
def test_initial_placement_fits_every_spec(ranks: int, slots: int, experts: int, table_length: int) -> None:
    """A spec that is accepted has dispatch rows long enough for the placement that it starts from."""
    redundant = ranks * slots - experts
    try:
        spec = MoESpec(
            num_layers=1, num_experts=experts, num_ranks=ranks, num_redundant=redundant, table_length=table_length
        )
    except SpecError:
        assert redundant < 0 or 0 < table_length < -(-ranks * slots // experts)
        return
    assert replica_count(initial_placement(spec), experts).max() <= spec.max_replicas


def test_digest_differs_for_every_field() -> None:
    """Equal specs have one digest, and a change of any field another."""
    other = {"num_layers": 1, "num_experts": 224, "num_ranks": 16, "num_redundant": 64, "num_nodes": 2}
    other |= {"num_expert_groups": 4, "table_length": 9}
    digests = {msgspec.structs.replace(DEEPSEEK, **{name: value}).digest() for name, value in other.items()}
    assert set(other) == set(MoESpec.__struct_fields__)
    assert len(digests | {DEEPSEEK.digest()}) == len(other) + 1
    assert msgspec.structs.replace(DEEPSEEK).digest() == DEEPSEEK.digest()

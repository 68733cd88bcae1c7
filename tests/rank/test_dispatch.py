"""From experts to slots on the CPU; tests/gpu compares the kernel with this."""

import pytest
import torch

from eplb_async.core.errors import SpecError
from eplb_async.rank.dispatch import map_and_count, replica_hash

TABLE = torch.tensor([[0, 4], [2, 2]])
COUNT = torch.tensor([2, 1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_the_documented_example(dtype: torch.dtype) -> None:
    """Slots in the ids' type, padding is -1 and nobody's load."""
    logical, slots = torch.zeros(2, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    ids = torch.tensor([[0, 1], [1, -1]], dtype=dtype)
    found = map_and_count(ids, TABLE, COUNT, logical_load_E=logical, slot_load_P=slots)
    assert found.dtype == dtype
    assert found.tolist() == [[0, 2], [2, -1]]
    assert logical.tolist() == [1, 2]
    assert slots.tolist() == [1, 0, 2, 0, 0]


def test_ids_beyond_the_experts_are_padding() -> None:
    """As engines pad with E, too."""
    load = torch.zeros(2, dtype=torch.int32)
    assert map_and_count(torch.tensor([[2, 7]]), TABLE, COUNT, logical_load_E=load).tolist() == [[-1, -1]]
    assert not load.any()


def test_tokens_spread_over_replicas_by_their_place() -> None:
    """Evenly, the same at each call, and by the table's weights: [3, 3, 7] sends two thirds to slot 3."""
    table, count = torch.tensor([[3, 3, 7]]), torch.tensor([3])
    ids = torch.zeros(3000, 1, dtype=torch.int64)
    slots = map_and_count(ids, table, count)
    assert torch.equal(slots, map_and_count(ids, table, count))
    assert (slots == 3).float().mean().item() == pytest.approx(2 / 3, abs=0.02)
    # neighbours in every stride that a batch may have
    for stride in (2, 3, 4, 8, 64):
        assert (slots[::stride] == 3).float().mean().item() == pytest.approx(2 / 3, abs=0.07)


def test_the_hash_is_the_documented_one() -> None:
    """Engines that do it by themselves must find the same."""
    assert replica_hash(torch.tensor([0, 1])).tolist() == [0, 2654356951]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.zeros(2, 2), TABLE, COUNT), "topk_ids is torch.float32"),
        ((torch.zeros(2, dtype=torch.int32), TABLE, COUNT), r"shape \[2\]"),
        ((torch.zeros(2, 2, dtype=torch.int32), TABLE.int(), COUNT), "table_EK is torch.int32"),
        ((torch.zeros(2, 2, dtype=torch.int32), TABLE, COUNT[:1]), "table_EK"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(arguments: tuple[torch.Tensor, ...], text: str) -> None:
    """The message names the tensor and what was needed."""
    with pytest.raises(SpecError, match=text):
        map_and_count(*arguments)


def test_loads_that_do_not_fit_are_refused() -> None:
    """Of another type, or of another number of experts."""
    ids = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(SpecError, match=r"a load is torch\.int64"):
        map_and_count(ids, TABLE, COUNT, slot_load_P=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(SpecError, match="3 experts, the table 2"):
        map_and_count(ids, TABLE, COUNT, logical_load_E=torch.zeros(3, dtype=torch.int32))

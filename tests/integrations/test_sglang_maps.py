"""Where one rank sends each expert's tokens under SGLang's static dispatch."""

import torch

from eplb_async.integrations.sglang_maps import rank_slots


def test_the_docstrings_example() -> None:
    """Own slots first, then turns that begin at the expert's number."""
    table, count = torch.tensor([[0, 2], [1, -1], [3, 4]]), torch.tensor([2, 1, 2])
    slots = [rank_slots(table, count, rank, 2, 3).tolist() for rank in range(3)]
    assert slots == [[0, 1, 3], [2, 1, 3], [0, 1, 4]]


def test_ranks_without_a_slot_take_entries_by_turns() -> None:
    """Eight ranks, two of which hold the expert, in a row that gives one of them two thirds: six others split four to two."""
    table, count = torch.tensor([[2, 2, 5]]), torch.tensor([3])
    slots = [int(rank_slots(table, count, rank, 1, 8)) for rank in range(8)]
    assert (slots[2], slots[5]) == (2, 5)
    others = [slot for rank, slot in enumerate(slots) if rank not in (2, 5)]
    assert (others.count(2), others.count(5)) == (4, 2)

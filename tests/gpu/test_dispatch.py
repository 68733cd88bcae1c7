"""The fused map-and-count kernel is its torch twin."""

import pytest
import torch

from eplb_async.rank.dispatch import map_and_count

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 2, 3), (300, 8, 128, 5, 144), (1100, 3, 33, 4, 40), (8192, 8, 256, 32, 288)]
)
def test_kernel_and_twin_agree(dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    """Slots and both loads, with padding and unknown ids, added to what is there."""
    tokens, choices, experts, length, slots = shape
    random = torch.Generator().manual_seed(7)
    ids = torch.randint(-1, experts + 2, (tokens, choices), generator=random).to(dtype)
    table_EK = torch.randint(0, slots, (experts, length), generator=random)
    count_E = torch.randint(1, length + 1, (experts,), generator=random)
    loads = [torch.randint(0, 9, (size,), generator=random).to(torch.int32) for size in (experts, slots)]
    on_device = [load.cuda() for load in loads]
    expected = map_and_count(ids, table_EK, count_E, logical_load_E=loads[0], slot_load_P=loads[1])
    found = map_and_count(
        ids.cuda(), table_EK.cuda(), count_E.cuda(), logical_load_E=on_device[0], slot_load_P=on_device[1]
    )
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), expected)
    assert [load.cpu().tolist() for load in on_device] == [load.tolist() for load in loads]


def test_a_graph_may_contain_it() -> None:
    """Replays read the table and ids as they are then, and go on counting."""
    ids = torch.tensor([[0, 1], [1, 0]], device="cuda", dtype=torch.int32)
    table_EK, count_E = torch.tensor([[0], [1]], device="cuda"), torch.ones(2, dtype=torch.int64, device="cuda")
    load_E = torch.zeros(2, dtype=torch.int32, device="cuda")
    map_and_count(ids, table_EK, count_E, logical_load_E=load_E)
    load_E.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = map_and_count(ids, table_EK, count_E, logical_load_E=load_E)
    graph.replay()
    table_EK.copy_(torch.tensor([[3], [2]]))
    graph.replay()
    assert slots.tolist() == [[3, 2], [2, 3]]
    assert load_E.tolist() == [4, 4]

"""The steps of a layer: torch twins against plain loops, and on a GPU the Triton kernels against the twins."""

import importlib.util

import pytest
import torch

from benchmarks.engine import kernels
from benchmarks.engine.kernels import LocalPairs, order_pairs

__all__: list[str] = []

TOP_K, SLOTS, HIDDEN, WIDTH, TOKENS = 4, 6, 64, 32, 33


def some_pairs(device: str = "cpu", rank: int = 1) -> LocalPairs:
    """Pairs of random slots, two of which get none."""
    torch.manual_seed(0)
    slots_MK = torch.randint(0, 3 * SLOTS - 2, (TOKENS, TOP_K), device=device)
    slots_MK[slots_MK == SLOTS + 2] = 0
    return order_pairs(slots_MK, rank, SLOTS)


def test_order_of_the_worked_example() -> None:
    """The example at the top of kernels.py."""
    pairs = order_pairs(torch.tensor([[3], [0], [2], [3]]), 1, 2)
    assert pairs.order_Q.tolist() == [2, 0, 3, 1]
    assert pairs.place_Q.tolist() == [1, 3, 0, 2]
    assert (pairs.ends_S.tolist(), pairs.num_rows.tolist(), pairs.ends_S.dtype) == ([1, 3], [3], torch.int32)
    rows = kernels.expand_rows(torch.arange(1.0, 5.0)[:, None], pairs, "torch")
    assert rows.flatten().tolist() == [2.0, 0.0, 1.0, 3.0]


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_layer_equals_one_product_per_pair(rank: int) -> None:
    """Gather, experts and expand together give each local pair its expert's result, and zeros elsewhere."""
    torch.manual_seed(0)
    slots_MK = torch.randint(0, 3 * SLOTS, (TOKENS, TOP_K))
    pairs = order_pairs(slots_MK, rank, SLOTS)
    source = torch.randn(TOKENS, HIDDEN)
    weights = {"gate_up": torch.randn(SLOTS, 2 * WIDTH, HIDDEN), "down": torch.randn(SLOTS, HIDDEN, WIDTH)}
    rows = kernels.gather_rows(source, pairs, TOP_K, "torch")
    found = kernels.expand_rows(kernels.expert_rows(rows, weights, pairs, "torch", "grouped"), pairs, "torch")
    for pair, slot in enumerate(slots_MK.flatten().tolist()):
        expected = torch.zeros(HIDDEN)
        if slot // SLOTS == rank:
            both = weights["gate_up"][slot % SLOTS] @ source[pair // TOP_K]
            gate, up = both.chunk(2)
            expected = weights["down"][slot % SLOTS] @ (torch.nn.functional.silu(gate) * up)
        torch.testing.assert_close(found[pair], expected, rtol=1e-4, atol=1e-2)


def test_a_row_has_the_same_bits_in_any_group() -> None:
    """What else is in a group, and where a row stands, changes no bit of its result."""
    torch.manual_seed(0)
    weights = torch.randn(1, 40, HIDDEN).bfloat16()
    rows = torch.randn(50, HIDDEN).bfloat16()
    whole = kernels.grouped_product(rows, weights, order_pairs(torch.zeros(50, 1, dtype=torch.int64), 0, 1), "grouped")
    for count in (1, 7, 23):
        pairs = order_pairs(torch.zeros(count, 1, dtype=torch.int64), 0, 1)
        assert torch.equal(kernels.grouped_product(rows[-count:], weights, pairs, "grouped"), whole[-count:])


def test_combine_adds_in_the_order_of_k() -> None:
    """Float32, residual last."""
    hidden, rows, gates = torch.randn(5, HIDDEN), torch.randn(5, TOP_K, HIDDEN).bfloat16(), torch.rand(5, TOP_K)
    total = torch.zeros(5, HIDDEN)
    for k in range(TOP_K):
        total += gates[:, k : k + 1] * rows[:, k].float()
    assert torch.equal(kernels.combine(hidden, rows, gates, "torch"), hidden + total)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_kernels_equal_their_twins() -> None:
    """Copies bit for bit; arithmetic to the last places of bfloat16; grouped products of both kinds."""
    pairs = some_pairs("cuda")
    count = int(pairs.num_rows)
    source = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()
    gathered = [kernels.gather_rows(source, pairs, TOP_K, kind)[:count] for kind in ("torch", "triton")]
    assert torch.equal(*gathered)
    both = torch.randn(TOKENS * TOP_K, 2 * WIDTH, device="cuda").bfloat16()
    active = [kernels.silu_mul(both, pairs.num_rows, kind)[:count] for kind in ("torch", "triton")]
    torch.testing.assert_close(*active)
    rows = torch.randn(TOKENS * TOP_K, HIDDEN, device="cuda").bfloat16()
    assert torch.equal(*[kernels.expand_rows(rows, pairs, kind) for kind in ("torch", "triton")])
    hidden, gates = torch.randn(TOKENS, HIDDEN, device="cuda"), torch.rand(TOKENS, TOP_K, device="cuda")
    per_token = rows.view(TOKENS, TOP_K, HIDDEN)
    torch.testing.assert_close(*[kernels.combine(hidden, per_token, gates, kind) for kind in ("torch", "triton")])
    weights = torch.randn(SLOTS, 2 * WIDTH, HIDDEN, device="cuda").bfloat16()
    products = [kernels.grouped_product(rows, weights, pairs, kind)[:count] for kind in ("grouped", "triton")]
    torch.testing.assert_close(*products, rtol=2e-2, atol=5e-2)
    on_host = LocalPairs(
        order_Q=pairs.order_Q.cpu(),
        place_Q=pairs.place_Q.cpu(),
        ends_S=pairs.ends_S.cpu(),
        num_rows=pairs.num_rows.cpu(),
    )
    expected = kernels.grouped_product(rows.cpu(), weights.cpu(), on_host, "grouped")[:count]
    torch.testing.assert_close(products[0].cpu(), expected, rtol=2e-2, atol=5e-2)

"""What a layer does between its two collectives, as Triton kernels and as torch twins, and the experts' products.

    order_pairs     which (token, expert) pairs are this rank's, sorted by local slot
    gather_rows     the tokens of these pairs, in that order
    expert_rows     grouped products: gate and up, silu(gate) * up, down
    expand_rows     back to one row per pair of all ranks, zero where the pair is another rank's
    combine         at the token's home rank: residual + sum over k of gate * row, in the order of k

Nothing here waits for the device: the number of local pairs stays there, and kernels stop at it, so a rank's time follows its
load. The twins compute all rows instead; what they compute beyond the local pairs is never read.

Shapes beyond the project's: M tokens of all ranks, N of this rank, Q = M * k pairs, D hidden, F expert width, K experts per
token (here only).

Example, 2 ranks of 2 slots, rank 1, k = 1: pairs go to slots [3, 0, 2, 3]. Local slots are [1, -, 0, 1], the order is
[2, 0, 3, then 1], ends are [1, 3], so the local pairs are 3 and pair 1 is expanded to zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

__all__ = ["LocalPairs", "combine", "expand_rows", "expert_rows", "gather_rows", "order_pairs", "silu_mul"]

BLOCK_ROWS = 16
"""Rows of every product on the CPU, the last block filled up: kernels round differently for another number of rows."""
# public since torch 2.10
_GROUPED_MM: Callable[..., torch.Tensor] = getattr(functional, "grouped_mm", None) or torch._grouped_mm


@dataclass(frozen=True, kw_only=True)
class LocalPairs:
    """Pairs by local slot.

    Attributes:
        order_Q: int64, pair numbers: the local pairs sorted by slot, then all others.
        place_Q: int64, the inverse: where in that order each pair is.
        ends_S: int32, the end of each local slot's pairs in the order.
        num_rows: int32 [1], the number of local pairs.
    """

    order_Q: torch.Tensor
    place_Q: torch.Tensor
    ends_S: torch.Tensor
    num_rows: torch.Tensor


def order_pairs(slots_MK: torch.Tensor, rank: int, slots_per_rank: int) -> LocalPairs:
    """Sort the pairs of a layer.

    Args:
        slots_MK: int64, the slot of every pair.
        rank: whose slots are local.
        slots_per_rank: S.
    """
    local = slots_MK.reshape(-1) - rank * slots_per_rank
    # int16: a radix sort of two passes
    key = torch.where((local >= 0) & (local < slots_per_rank), local, slots_per_rank).to(torch.int16)
    ordered, order_Q = torch.sort(key, stable=True)
    numbers = torch.arange(len(key), device=key.device)
    place_Q = torch.empty_like(numbers).scatter_(0, order_Q, numbers)
    slots = torch.arange(slots_per_rank, dtype=torch.int16, device=key.device)
    ends_S = torch.searchsorted(ordered, slots, right=True, out_int32=True)
    return LocalPairs(order_Q=order_Q, place_Q=place_Q, ends_S=ends_S, num_rows=ends_S[-1:])


def gather_rows(source_MD: torch.Tensor, pairs: LocalPairs, top_k: int, kernels: str) -> torch.Tensor:
    """The token of every local pair, [Q, D]; rows beyond `num_rows` are undefined."""
    if kernels == "torch":
        return source_MD.index_select(0, pairs.order_Q // top_k)
    rows_QD = source_MD.new_empty((len(pairs.order_Q), source_MD.shape[1]))
    triton_kernels().gather(source_MD, pairs.order_Q, pairs.num_rows, rows_QD, top_k)
    return rows_QD


def silu_mul(gate_up: torch.Tensor, num_rows: torch.Tensor, kernels: str) -> torch.Tensor:
    """silu(gate) * up, computed in float32, [Q, 2F] -> [Q, F]; rows beyond `num_rows` are undefined."""
    if kernels == "torch":
        gate, up = gate_up.chunk(2, dim=1)
        return (functional.silu(gate.float()) * up.float()).to(gate_up.dtype)
    result = gate_up.new_empty((len(gate_up), gate_up.shape[1] // 2))
    triton_kernels().silu_mul(gate_up, num_rows, result)
    return result


def expand_rows(rows_QD: torch.Tensor, pairs: LocalPairs, kernels: str) -> torch.Tensor:
    """One row per pair, [Q, D]: its result where the pair is local, else zeros."""
    if kernels == "torch":
        local = (pairs.place_Q < pairs.num_rows)[:, None]
        return torch.where(local, rows_QD.index_select(0, pairs.place_Q), torch.zeros_like(rows_QD[:1]))
    result_QD = torch.empty_like(rows_QD)
    triton_kernels().expand(rows_QD, pairs.place_Q, pairs.num_rows, result_QD)
    return result_QD


def combine(hidden_ND: torch.Tensor, rows_NKD: torch.Tensor, gates_NK: torch.Tensor, kernels: str) -> torch.Tensor:
    """Float32 hidden + sum over k of gate * row, added one after the other; a new tensor."""
    if kernels == "torch":
        total = torch.zeros_like(hidden_ND)
        for k in range(rows_NKD.shape[1]):
            total = total + gates_NK[:, k, None] * rows_NKD[:, k].float()
        return hidden_ND + total
    result_ND = torch.empty_like(hidden_ND)
    triton_kernels().combine(hidden_ND, rows_NKD, gates_NK, result_ND)
    return result_ND


def expert_rows(
    rows_QD: torch.Tensor, weights: dict[str, torch.Tensor], pairs: LocalPairs, kernels: str, products: str
) -> torch.Tensor:
    """Every local pair's expert on its row, [Q, D]; rows beyond `num_rows` are undefined.

    Args:
        rows_QD: from `gather_rows`.
        weights: "gate_up" [S, 2F, D] and "down" [S, D, F].
        pairs: whose slots these are.
        kernels: of the activation.
        products: "grouped", "triton"; on the CPU a loop over slots.
    """
    gate_up = grouped_product(rows_QD, weights["gate_up"], pairs, products)
    active = silu_mul(gate_up, pairs.num_rows, kernels)
    return grouped_product(active, weights["down"], pairs, products)


def grouped_product(rows: torch.Tensor, weights_SOI: torch.Tensor, pairs: LocalPairs, products: str) -> torch.Tensor:
    """Rows [Q, I] times the transpose of each slot's [O, I], rows grouped by `ends_S`: [Q, O].

    The result of a row depends on the row and its expert alone: neither on its place in the group nor on the others. On CUDA the
    tile shape follows from Q and S, which do not change; on the CPU every product has BLOCK_ROWS rows.
    """
    if not rows.is_cuda:
        return _looped_product(rows, weights_SOI, pairs.ends_S)
    if products == "triton":
        result = rows.new_empty((len(rows), weights_SOI.shape[1]))
        triton_kernels().product(rows, weights_SOI, pairs.ends_S, result)
        return result
    # the stored layout [S, O, I] is the transposed operand that these kernels take as it is
    return _GROUPED_MM(rows, weights_SOI.transpose(1, 2), offs=pairs.ends_S)


def _looped_product(rows: torch.Tensor, weights_SOI: torch.Tensor, ends_S: torch.Tensor) -> torch.Tensor:
    result = rows.new_zeros((len(rows), weights_SOI.shape[1]))
    first = 0
    for slot, end in enumerate(ends_S.tolist()):
        for start in range(first, end, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, end)
            block = rows.new_zeros((BLOCK_ROWS, rows.shape[1]))
            block[: stop - start] = rows[start:stop]
            result[start:stop] = (block @ weights_SOI[slot].T)[: stop - start]
        first = end
    return result


def triton_kernels() -> Any:
    """The module with the kernels; imported when first needed, since machines without a GPU have no Triton."""
    from benchmarks.engine import triton_kernels as module

    return module

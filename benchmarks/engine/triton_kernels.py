"""The Triton kernels of kernels.py, each with the function that launches it. Importing this needs Triton.

Rows are shared among a fixed number of programs: program p takes rows p, p + programs, ... up to a number of rows that is
read on the device. Row numbers are int64 before they are multiplied: Q * D may exceed 31 bits.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["combine", "expand", "gather", "product", "silu_mul"]

PROGRAMS_PER_SM = 8
MAX_BLOCK = 2048


# size: the arguments of a kernel
@triton.jit
def _gather(source, order, num_rows, target, TOP_K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """target[row] = source[order[row] // TOP_K] for row < num_rows."""
    end = tl.load(num_rows)
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), end, tl.num_programs(0)):
        token = tl.load(order + row).to(tl.int64) // TOP_K
        to = tl.cast(row, tl.int64) * D
        for start in range(0, D, BLOCK):
            inside = start + columns < D
            value = tl.load(source + token * D + start + columns, mask=inside)
            tl.store(target + to + start + columns, value, mask=inside)


@triton.jit
def _silu_mul(source, num_rows, target, F: tl.constexpr, BLOCK: tl.constexpr):
    """target[row] = silu(source[row, :F]) * source[row, F:] for row < num_rows."""
    end = tl.load(num_rows)
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), end, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * F
        for start in range(0, F, BLOCK):
            inside = start + columns < F
            gate = tl.load(source + 2 * at + start + columns, mask=inside).to(tl.float32)
            up = tl.load(source + 2 * at + F + start + columns, mask=inside).to(tl.float32)
            value = gate / (1.0 + tl.exp(-gate)) * up
            tl.store(target + at + start + columns, value.to(target.dtype.element_ty), mask=inside)


# size: the arguments of a kernel
@triton.jit
def _expand(source, place, num_rows, target, num_pairs, D: tl.constexpr, BLOCK: tl.constexpr):
    """target[pair] = source[place[pair]] where place[pair] < num_rows, else zeros, for all pairs."""
    local = tl.load(num_rows)
    columns = tl.arange(0, BLOCK)
    for pair in range(tl.program_id(0), num_pairs, tl.num_programs(0)):
        row = tl.load(place + pair).to(tl.int64)
        to = tl.cast(pair, tl.int64) * D
        for start in range(0, D, BLOCK):
            inside = start + columns < D
            value = tl.load(source + row * D + start + columns, mask=inside & (row < local), other=0.0)
            tl.store(target + to + start + columns, value, mask=inside)


# size: the arguments of a kernel
@triton.jit
def _combine(hidden, rows, gates, target, TOP_K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """target[n] = hidden[n] + sum over k of gates[n, k] * rows[n, k], in the order of k; one program per (n, block)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(TOP_K):
        gate = tl.load(gates + token * TOP_K + k)
        row = tl.load(rows + (token * TOP_K + k) * D + columns, mask=inside, other=0.0).to(tl.float32)
        total += gate * row
    before = tl.load(hidden + token * D + columns, mask=inside)
    tl.store(target + token * D + columns, before + total, mask=inside)


# size: the arguments of a kernel
@triton.jit
def _product(
    rows, weights, ends, target, num_slots, OUT: tl.constexpr, IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """target[row] = weights[slot of row] @ rows[row]. Tiles of all slots are shared among the programs."""
    columns_of_tiles = tl.cdiv(OUT, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    first_row = 0
    first_tile = 0
    for slot in range(num_slots):
        end_row = tl.load(ends + slot)
        tiles = tl.cdiv(end_row - first_row, BLOCK_M) * columns_of_tiles
        # the first tile of this program that is not before first_tile
        programs = tl.num_programs(0)
        skip = (tl.program_id(0) - first_tile % programs + programs) % programs
        for tile in range(skip, tiles, programs):
            row = (first_row + (tile // columns_of_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
            column = (tile % columns_of_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            matrix = weights + tl.cast(slot, tl.int64) * OUT * IN
            for start in range(0, IN, BLOCK_K):
                left = tl.load(
                    rows + row[:, None] * IN + start + inner[None, :],
                    mask=(row[:, None] < end_row) & (start + inner[None, :] < IN), other=0.0,
                )  # fmt: skip
                right = tl.load(
                    matrix + column[None, :] * IN + start + inner[:, None],
                    mask=(column[None, :] < OUT) & (start + inner[:, None] < IN), other=0.0,
                )  # fmt: skip
                total = tl.dot(left, right, total)
            tl.store(
                target + row[:, None] * OUT + column[None, :], total.to(target.dtype.element_ty),
                mask=(row[:, None] < end_row) & (column[None, :] < OUT),
            )  # fmt: skip
        first_tile += tiles
        first_row = end_row


def gather(
    source_MD: torch.Tensor, order_Q: torch.Tensor, num_rows: torch.Tensor, rows_QD: torch.Tensor, top_k: int
) -> None:
    """See kernels.gather_rows."""
    width = source_MD.shape[1]
    _gather[(_programs(source_MD, len(rows_QD)),)](
        source_MD, order_Q, num_rows, rows_QD, TOP_K=top_k, D=width, BLOCK=_block(width)
    )


def silu_mul(gate_up: torch.Tensor, num_rows: torch.Tensor, result: torch.Tensor) -> None:
    """See kernels.silu_mul."""
    width = result.shape[1]
    _silu_mul[(_programs(gate_up, len(result)),)](gate_up, num_rows, result, F=width, BLOCK=_block(width))


def expand(rows_QD: torch.Tensor, place_Q: torch.Tensor, num_rows: torch.Tensor, result_QD: torch.Tensor) -> None:
    """See kernels.expand_rows."""
    pairs, width = result_QD.shape
    _expand[(_programs(rows_QD, pairs),)](rows_QD, place_Q, num_rows, result_QD, pairs, D=width, BLOCK=_block(width))


def combine(hidden_ND: torch.Tensor, rows_NKD: torch.Tensor, gates_NK: torch.Tensor, result_ND: torch.Tensor) -> None:
    """See kernels.combine."""
    tokens, width = hidden_ND.shape
    block = _block(width, 1024)
    _combine[(tokens, triton.cdiv(width, block))](
        hidden_ND, rows_NKD, gates_NK, result_ND, TOP_K=rows_NKD.shape[1], D=width, BLOCK=block
    )


def product(rows: torch.Tensor, weights_SOI: torch.Tensor, ends_S: torch.Tensor, result: torch.Tensor) -> None:
    """See kernels.grouped_product; tile shapes follow from the shapes alone, as the same bits in every placement need."""
    slots, outputs, inputs = weights_SOI.shape
    large = len(rows) // slots > 128
    blocks: dict[str, Any] = {"BLOCK_M": 128 if large else 64, "BLOCK_N": 128, "BLOCK_K": 64}
    tiles = triton.cdiv(len(rows), blocks["BLOCK_M"]) * triton.cdiv(outputs, blocks["BLOCK_N"])
    _product[(min(_programs(rows, tiles, 1), tiles),)](
        rows,
        weights_SOI,
        ends_S,
        result,
        slots,
        OUT=outputs,
        IN=inputs,
        **blocks,
        num_warps=8 if large else 4,
        num_stages=3,
    )


def _block(width: int, most: int = MAX_BLOCK) -> int:
    return min(int(triton.next_power_of_2(width)), most)


def _programs(tensor: torch.Tensor, rows: int, per_sm: int = PROGRAMS_PER_SM) -> int:
    return max(1, min(rows, _multiprocessors(tensor.device) * per_sm))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

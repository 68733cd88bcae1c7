"""The kernel of rank/cuda/fingerprint.py, which says what it computes.

Shape suffixes: N pieces, W words of a block, B blocks.
"""

import triton
import triton.language as tl

__all__ = ["fingerprint_pieces_kernel"]


@triton.jit
def _block_sum(words, place, coefficients_W, whole_words, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Sum over the words of a block at a multiple of 16 bytes, in STEP lanes."""
    lanes = tl.arange(0, STEP)
    value = tl.zeros([STEP], dtype=tl.int64)
    for first in tl.static_range(0, BLOCK, STEP):
        index = place + first + lanes
        word = tl.load(words + index, mask=index < whole_words, other=0)
        value += word * tl.load(coefficients_W + first + lanes)
    return value


@triton.jit
def _block_sum_of_bytes(chars, place, coefficients_W, whole_words, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The same of a block that starts anywhere."""
    lanes = tl.arange(0, STEP)
    value = tl.zeros([STEP], dtype=tl.int64)
    for first in range(0, BLOCK, STEP):
        index = place + first + lanes
        word = tl.zeros([STEP], dtype=tl.int64)
        for byte in tl.static_range(8):
            part = tl.load(chars + index * 8 + byte, mask=index < whole_words, other=0)
            word += part.to(tl.int64) << (8 * byte)
        value += word * tl.load(coefficients_W + first + lanes)
    return value


@triton.jit(do_not_specialize=["pieces", "results", "coefficients", "powers"])
def fingerprint_pieces_kernel(
    pieces: tl.int64,
    results: tl.int64,
    coefficients: tl.int64,
    powers: tl.int64,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Program (n, j) adds blocks j, j + programs, ... of piece n to its result.

    Piece of 20 bytes: one block, whole words 0 and 1, and word 2 of the 4 bytes left; with a single program its result is
    20 * M + w_0 * c_0 + w_1 * c_1 + w_2 * c_2.

    pieces, results, coefficients and powers are addresses of int64 tables [N, 2], [N], [W] and [B].
    """
    pieces_N2 = pieces.to(tl.pointer_type(tl.int64))
    results_N = results.to(tl.pointer_type(tl.int64))
    coefficients_W = tl.multiple_of(coefficients.to(tl.pointer_type(tl.int64)), 16)
    powers_B = powers.to(tl.pointer_type(tl.int64))
    piece = tl.program_id(0)
    start = tl.program_id(1)
    programs = tl.num_programs(1)
    address = tl.load(pieces_N2 + 2 * piece)
    num_bytes = tl.load(pieces_N2 + 2 * piece + 1)
    whole_words = num_bytes // 8
    num_blocks = ((num_bytes + 7) // 8 + BLOCK - 1) // BLOCK
    chars = address.to(tl.pointer_type(tl.uint8))
    total = tl.zeros([STEP], dtype=tl.int64)
    if address % 16 == 0:
        words = tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 16)
        for block in range(start, num_blocks, programs):
            value = _block_sum(words, block * BLOCK, coefficients_W, whole_words, BLOCK, STEP)
            total += value * tl.load(powers_B + num_blocks - 1 - block)
    else:
        for block in range(start, num_blocks, programs):
            value = _block_sum_of_bytes(chars, block * BLOCK, coefficients_W, whole_words, BLOCK, STEP)
            total += value * tl.load(powers_B + num_blocks - 1 - block)
    result = tl.sum(total)
    if start == 0:
        result += num_bytes * tl.load(powers_B + num_blocks)
        # the last word, of fewer than 8 bytes; it is in the last block, whose power is 1
        bytes_left = num_bytes - whole_words * 8
        some = tl.arange(0, 8)
        last = tl.load(chars + whole_words * 8 + some, mask=some < bytes_left, other=0).to(tl.int64) << (8 * some).to(
            tl.int64
        )
        result += tl.sum(last) * tl.load(coefficients_W + whole_words % BLOCK)
    tl.atomic_add(results_N + piece, result)

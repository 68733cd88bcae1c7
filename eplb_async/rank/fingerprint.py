"""Fingerprints: 64 bits of a row of bytes, the same on every device.

The row is read as 64-bit words w_i (zero-padded) in blocks of B words. A block's value is the sum of w_i * c_i mod 2^64
with fixed odd coefficients c, a multilinear hash (D. Lemire and O. Kaser, "Strongly universal string hashing is fast",
The Computer Journal 57(11), 2014); blocks are joined as h := h * M + value, and the length is added. Every c_i is odd,
so a change of one word always changes the value. It guards against mistakes and broken memory, not against an adversary.
"""

import functools

import torch

__all__ = ["BLOCK_WORDS", "MULTIPLIER", "coefficients", "fingerprint"]

BLOCK_WORDS = 8192
CHUNK_BLOCKS = 16
_MASK = (1 << 64) - 1
MULTIPLIER = 0x9E3779B97F4A7C15


@functools.cache
def coefficients() -> torch.Tensor:
    """Odd 64-bit numbers from the splitmix64 sequence (S. Vigna), as int64 [BLOCK_WORDS]."""
    values = []
    state = 0
    for _ in range(BLOCK_WORDS):
        state = (state + MULTIPLIER) & _MASK
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
        z = (z ^ (z >> 31)) | 1
        values.append(z - (1 << 64) if z >> 63 else z)
    return torch.tensor(values, dtype=torch.int64)


def fingerprint(row: torch.Tensor) -> int:
    """The fingerprint of a row.

    Args:
        row: uint8 [n], contiguous, on the CPU.

    Returns:
        A signed 64-bit number.
    """
    num_bytes = row.numel()
    value = num_bytes
    whole = num_bytes // (8 * BLOCK_WORDS)
    blocks = row[: whole * 8 * BLOCK_WORDS]
    aligned = blocks.data_ptr() % 8 == 0
    for first in range(0, whole, CHUNK_BLOCKS):
        chunk = blocks[first * 8 * BLOCK_WORDS : (first + CHUNK_BLOCKS) * 8 * BLOCK_WORDS]
        # the storage offset must be a multiple of 8 for a view as 64-bit words
        words = (chunk if aligned and chunk.storage_offset() % 8 == 0 else chunk.clone()).view(torch.int64)
        for block in (words.view(-1, BLOCK_WORDS) * coefficients()).sum(dim=1).tolist():
            value = (value * MULTIPLIER + block) & _MASK
    if rest := num_bytes - blocks.numel():
        padded = torch.zeros(-(-rest // 8) * 8, dtype=torch.uint8)
        padded[:rest] = row[blocks.numel() :]
        words = padded.view(torch.int64)
        tail = int((words * coefficients()[: words.numel()]).sum())
        value = (value * MULTIPLIER + tail) & _MASK
    return value - (1 << 64) if value >> 63 else value

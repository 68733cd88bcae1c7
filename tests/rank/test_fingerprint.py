"""Fingerprints: a function of the bytes alone, and another one after any change of a word."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_async.rank.fingerprint import BLOCK_WORDS, fingerprint

BLOCK = 8 * BLOCK_WORDS
SIZES = [1, 7, 8, 9, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 17 * BLOCK + 3]


def plain(row: torch.Tensor) -> int:
    """The definition in the module's docstring, word by word, in Python's integers."""
    mask, multiplier = (1 << 64) - 1, 0x9E3779B97F4A7C15
    coefficients, state = [], 0
    for _ in range(BLOCK_WORDS):
        state = (state + multiplier) & mask
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        coefficients.append((z ^ (z >> 31)) | 1)
    data, value = row.numpy().tobytes(), row.numel()
    for first in range(0, len(data), BLOCK):
        block = data[first : first + BLOCK]
        words = [int.from_bytes(block[i : i + 8], "little") for i in range(0, len(block), 8)]
        value = (value * multiplier + sum(w * c for w, c in zip(words, coefficients, strict=False))) & mask
    return value - (1 << 64) if value >> 63 else value


def row_of(size: int) -> torch.Tensor:
    """Random bytes, the same each time."""
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", SIZES)
def test_it_is_what_the_definition_says(size: int) -> None:
    """All sizes around words, blocks and chunks of blocks, against the definition in plain integers."""
    assert fingerprint(row_of(size)) == plain(row_of(size))


@pytest.mark.parametrize("offset", [1, 4, 7, 8])
def test_alignment_does_not_matter(offset: int) -> None:
    """A view that begins in the middle of a word has the fingerprint of its bytes."""
    row = row_of(3 * BLOCK + 5)
    moved = torch.zeros(len(row) + offset, dtype=torch.uint8)
    moved[offset:] = row
    assert fingerprint(moved[offset:]) == fingerprint(row)


@settings(max_examples=100, deadline=None)
@given(size=st.sampled_from(SIZES[:6]), place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_one_changed_byte_changes_it(size: int, place: float, mask: int) -> None:
    """Coefficients are odd, so no change within one word goes unseen."""
    row = row_of(size)
    changed = row.clone()
    changed[int(place * size)] ^= mask
    assert fingerprint(changed) != fingerprint(row)


def test_length_and_order_count() -> None:
    """Zeros behind the end, exchanged words and exchanged blocks are other rows."""
    row = row_of(2 * BLOCK)
    assert fingerprint(torch.zeros(8, dtype=torch.uint8)) != fingerprint(torch.zeros(16, dtype=torch.uint8))
    assert fingerprint(row) != fingerprint(torch.cat([row[BLOCK:], row[:BLOCK]]))
    assert fingerprint(row) != fingerprint(torch.cat([row[8:16], row[:8], row[16:]]))

"""Fingerprints on the device are those of the CPU."""

import pytest
import torch

from eplb_async.rank.fingerprint import BLOCK_WORDS, fingerprint

pytestmark = pytest.mark.gpu

BLOCK = 8 * BLOCK_WORDS
SIZES = [1, 7, 8, 9, 33, 120, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 13, 5_000_000]


@pytest.mark.parametrize("offset", [0, 16, 8, 3])
def test_device_and_cpu_agree(offset: int) -> None:
    """Any length, at addresses that are a multiple of 16, of 8, and odd ones."""
    from eplb_async.rank.cuda.fingerprint import fingerprint_pieces

    memory = torch.randint(
        0, 256, (max(SIZES) + offset,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    on_device = memory.cuda()
    found = fingerprint_pieces([on_device[offset : offset + size] for size in SIZES])
    assert found == [fingerprint(memory[offset : offset + size].clone()) for size in SIZES]


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_the_number_of_programs_does_not_matter(programs: int) -> None:
    """Blocks are summed in any order."""
    from eplb_async.rank.cuda.driver import load_driver
    from eplb_async.rank.cuda.fingerprint import DeviceFingerprints

    memory = torch.arange(7 * BLOCK + 5, device="cuda").to(torch.uint8)
    pieces_N2 = torch.tensor([[memory.data_ptr(), memory.numel()]], device="cuda")
    result_N = torch.zeros(1, dtype=torch.int64, device="cuda")
    DeviceFingerprints(memory.device, load_driver()).add(
        pieces_N2, result_N, programs, torch.cuda.current_stream().cuda_stream
    )
    assert result_N.tolist() == [fingerprint(memory.cpu())]


def test_one_changed_bit_is_seen() -> None:
    """In every eighth of a row."""
    from eplb_async.rank.cuda.fingerprint import fingerprint_pieces

    row = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    before = fingerprint_pieces([row])
    for place in range(0, row.numel(), row.numel() // 8):
        row[place] = 1
        assert fingerprint_pieces([row]) != before
        row[place] = 0
    assert fingerprint_pieces([row]) == before

"""Fingerprints on the device: the same 64 bits as rank/fingerprint.py, for many pieces of memory in one kernel launch.

    fingerprint = n * M^B + sum over blocks b of (sum over words i of w_bi * c_i) * M^(B - 1 - b)      mod 2^64

for n bytes in B blocks, which is what joining block by block gives: three blocks of values x, y, z are
((n * M + x) * M + y) * M + z = n * M^3 + x * M^2 + y * M + z. So blocks can be summed in any order, by atomic adds, by as many
programs as are wanted: few beside a forward, so that they take few multiprocessors from it, many when nothing else runs.

Pieces are given by a table of (address, bytes) on the device; any address and length will do, though pieces that do not start at a
multiple of 8 are read byte by byte.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from eplb_async.rank.cuda.kernels.fingerprints import fingerprint_pieces_kernel
from eplb_async.rank.fingerprint import BLOCK_WORDS, MULTIPLIER, coefficients

__all__ = ["MAX_BYTES", "DeviceFingerprints", "fingerprint_pieces"]

STEP_WORDS = 2048
"""Words that a program reads at once: 8 per thread at 8 warps. BLOCK_WORDS must be a multiple."""
ALL_PROGRAMS = 2048
"""Programs that fill a GPU."""
MAX_BLOCKS = 1 << 16
MAX_BYTES = MAX_BLOCKS * BLOCK_WORDS * 8
"""Largest piece, 4 GiB: powers of the multiplier are kept for so many blocks."""


@functools.cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients and powers of the multiplier, on a device."""
    powers, power = [], 1
    for _ in range(MAX_BLOCKS + 1):
        powers.append(power - (1 << 64) if power >> 63 else power)
        power = power * MULTIPLIER & ((1 << 64) - 1)
    return coefficients().to(device), torch.tensor(powers, dtype=torch.int64, device=device)


class DeviceFingerprints:
    """Launches the kernel on one device."""

    def __init__(self, device: torch.device) -> None:
        self._coefficients, self._powers = _tables(device)

    def add(self, pieces_N2: torch.Tensor, results_N: torch.Tensor, programs: int) -> None:
        """Add each piece's fingerprint to its result, on the current stream.

        Args:
            pieces_N2: int64 [N, 2] on the device, address and length in bytes of each piece; lengths 1 to MAX_BYTES.
            results_N: int64 [N] on the device; zero beforehand gives the fingerprints.
            programs: per piece.
        """
        grid = (pieces_N2.shape[0], programs)
        kernel: Any = fingerprint_pieces_kernel[grid]
        kernel(pieces_N2, results_N, self._coefficients, self._powers, BLOCK_WORDS, STEP_WORDS, num_warps=8)


def fingerprint_pieces(pieces: Sequence[torch.Tensor]) -> list[int]:
    """Fingerprints of contiguous uint8 tensors on one device, with all of the device; waits for it."""
    table = [(piece.data_ptr(), piece.numel()) for piece in pieces]
    table_N2 = torch.tensor(table, dtype=torch.int64, device=pieces[0].device)
    results_N = torch.zeros(len(pieces), dtype=torch.int64, device=pieces[0].device)
    DeviceFingerprints(pieces[0].device).add(table_N2, results_N, -(-ALL_PROGRAMS // len(pieces)))
    found: list[int] = results_N.tolist()
    return found

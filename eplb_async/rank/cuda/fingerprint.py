"""Fingerprints on the device: the same 64 bits as rank/fingerprint.py, for many pieces of memory in one kernel launch.

    fingerprint = n * M^B + sum over blocks b of (sum over words i of w_bi * c_i) * M^(B - 1 - b)      mod 2^64

for n bytes in B blocks, which is what joining block by block gives: three blocks of values x, y, z are
((n * M + x) * M + y) * M + z = n * M^3 + x * M^2 + y * M + z. So blocks can be summed in any order, by atomic adds, by as many
programs as are wanted: few beside a forward, so that they take few multiprocessors from it, many when nothing else runs.

Pieces are given by a table of (address, bytes) on the device; any address and length will do, though pieces that do not start at a
multiple of 16 are read byte by byte.
"""

import functools
import threading
from collections.abc import Sequence

import torch

from eplb_async.rank.cuda.driver import CudaDriver, load_driver
from eplb_async.rank.cuda.kernels.fingerprints import fingerprint_pieces_kernel
from eplb_async.rank.cuda.launch import Launcher
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

    def __init__(self, device: torch.device, driver: CudaDriver) -> None:
        """Compiles it, with that device current."""
        self._coefficients, self._powers = _tables(device)
        self._launch = Launcher(driver, fingerprint_pieces_kernel, 4, (BLOCK_WORDS, STEP_WORDS))
        self._launch.set(2, self._coefficients.data_ptr())
        self._launch.set(3, self._powers.data_ptr())

    def add(self, pieces_N2: torch.Tensor, results_N: torch.Tensor, programs: int, stream: int) -> None:
        """Add each piece's fingerprint to its result.

        Args:
            pieces_N2: int64 [N, 2] on the device, address and length in bytes of each piece; lengths 1 to MAX_BYTES.
            results_N: int64 [N] on the device; zero beforehand gives the fingerprints.
            programs: per piece.
            stream: handle of the stream.
        """
        self._launch.set(0, pieces_N2.data_ptr())
        self._launch.set(1, results_N.data_ptr())
        self._launch((pieces_N2.shape[0], programs), stream)


_LOCK = threading.Lock()
"""A launcher belongs to one thread at a time; transfer threads of several groups share those below."""


@functools.cache
def _on(device: torch.device) -> DeviceFingerprints:
    with torch.cuda.device(device):
        return DeviceFingerprints(device, load_driver())


def fingerprint_pieces(pieces: Sequence[torch.Tensor]) -> list[int]:
    """Fingerprints of contiguous uint8 tensors on one device, with all of the device; waits for it."""
    device = pieces[0].device
    table = [(piece.data_ptr(), piece.numel()) for piece in pieces]
    table_N2 = torch.tensor(table, dtype=torch.int64, device=device)
    results_N = torch.zeros(len(pieces), dtype=torch.int64, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    with _LOCK:
        _on(device).add(table_N2, results_N, -(-ALL_PROGRAMS // len(pieces)), stream)
    found: list[int] = results_N.tolist()
    return found

"""Checking what was pulled: the fingerprints of a batch's rows, computed behind their copies on the transfer stream.

A staging row belongs to at most one batch at a time, so the batch that starts with row r uses the r-th table and the r-th results.

    pinned    tables [rows, pieces, 2], zeros [pieces], results [rows, pieces]
    device    tables [rows, pieces, 2], sums [rows, pieces]
"""

import torch

from eplb_async.rank.cuda.driver import CudaDriver
from eplb_async.rank.cuda.fingerprint import DeviceFingerprints
from eplb_async.rank.transfer.base import Copy, StagingRows

__all__ = ["BatchChecker"]

PROGRAMS = 64
"""Programs of a batch beside the forward, over all its pieces: what they take of the multiprocessors is little, and lasts longer."""


class BatchChecker:
    """Tables and results of all batches. Methods belong to the thread that issues pulls."""

    def __init__(self, staging: StagingRows, driver: CudaDriver, stream: torch.cuda.Stream) -> None:
        rows, pieces = staging.num_rows, staging.num_rows * staging.most_tensors
        self._driver, self._stream = driver, stream
        self._kernel = DeviceFingerprints(stream.device, driver)
        self._tables_R = torch.empty((rows, pieces, 2), dtype=torch.int64, pin_memory=True)
        self._zeros = torch.zeros(pieces, dtype=torch.int64, pin_memory=True)
        self._results_R = torch.empty((rows, pieces), dtype=torch.int64, pin_memory=True)
        self._device_tables_R = torch.empty((rows, pieces, 2), dtype=torch.int64, device=stream.device)
        self._sums_R = torch.empty((rows, pieces), dtype=torch.int64, device=stream.device)
        self._num_R = [0] * rows

    def prepare(self, first: int, pieces: list[tuple[int, int]]) -> list[Copy]:
        """Write the table of the batch that starts with row `first`; returns the copies that bring it to the device."""
        number = self._num_R[first] = len(pieces)
        self._tables_R[first, :number] = torch.tensor(pieces, dtype=torch.int64)
        return [
            (self._device_tables_R[first].data_ptr(), self._tables_R[first].data_ptr(), 16 * number),
            (self._sums_R[first].data_ptr(), self._zeros.data_ptr(), 8 * number),
        ]

    def launch(self, first: int, number: int) -> None:
        """Compute the fingerprints behind what is on the stream, and bring them to the host."""
        stream = self._stream.cuda_stream
        self._kernel.add(self._device_tables_R[first, :number], self._sums_R[first], -(-PROGRAMS // number), stream)
        self._driver.copy(self._results_R[first].data_ptr(), self._sums_R[first].data_ptr(), 8 * number, stream)

    def results(self, first: int) -> list[int]:
        """The fingerprints of a batch that has ended, in the order of its pieces."""
        found: list[int] = self._results_R[first, : self._num_R[first]].tolist()
        return found

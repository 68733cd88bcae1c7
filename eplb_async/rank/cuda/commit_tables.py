"""What a commit copies, written by the host into pinned memory where the commit's kernel reads it.

    table of a layer   (target, source, bytes) per tensor and row, then one per row of the maps

Each layer has a table of its own. It is rewritten only by the layer's next commit, which comes when this one has ended (Transfer.commit).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_async.rank.cuda.driver import CudaDriver
from eplb_async.rank.cuda.kernels.copying import copy_pieces_kernel
from eplb_async.rank.cuda.launch import Launcher
from eplb_async.rank.transfer.base import Copy

__all__ = ["CommitTables"]

MAP_ROWS = 3
"""Rows of a layer's maps: slots, dispatch table, counts."""
BLOCK = 2048
PROGRAMS = 1056
"""Programs of a commit over all its pieces, at least: eight for each multiprocessor of a Hopper GPU."""
MOST_PROGRAMS = 256
"""Of one piece."""


class CommitTables:
    """Tables of all layers. Methods belong to the thread that commits."""

    def __init__(
        self,
        driver: CudaDriver,
        live: Sequence[Sequence[tuple[int, int]]],
        staged: Sequence[Sequence[Sequence[int]]],
        sizes: Sequence[Sequence[int]],
    ) -> None:
        """Compiles the kernel.

        Args:
            driver: of this process.
            live: per layer and tensor, address of slot 0 and distance of slots in bytes.
            staged: per layer, staging row and tensor, its address.
            sizes: per layer and tensor, bytes of a slot.
        """
        as_array = [np.array(rows, dtype=np.int64) for rows in live]
        self._address = [rows[:, 0] for rows in as_array]
        self._distance = [rows[:, 1] for rows in as_array]
        self._staged = [np.array(rows, dtype=np.int64) for rows in staged]
        self._sizes = [np.array(layer, dtype=np.int64) for layer in sizes]
        most = max(len(rows) * len(rows[0]) for rows in staged) + MAP_ROWS
        self._pinned_LN3 = torch.empty((len(live), most, 3), dtype=torch.int64, pin_memory=True)
        self._tables: list[NDArray[np.int64]] = [table.numpy() for table in self._pinned_LN3]
        self._addresses = [table.data_ptr() for table in self._pinned_LN3]
        self._launch = Launcher(driver, copy_pieces_kernel, 1, (BLOCK,))

    def launch(self, layer: int, rows: Sequence[tuple[int, int]], more: Sequence[Copy], stream: int) -> None:
        """Copy (staging row, own slot) pairs of a layer, and `more`."""
        table_N3, sizes_T = self._tables[layer], self._sizes[layer]
        number = len(rows) * len(sizes_T)
        if rows:
            staged_N, slots_N = np.array(rows, dtype=np.int64).T
            targets_NT = self._address[layer] + slots_N[:, None] * self._distance[layer]
            table_N3[:number, 0] = targets_NT.reshape(-1)
            table_N3[:number, 1] = self._staged[layer][staged_N].reshape(-1)
            table_N3[:number, 2] = np.tile(sizes_T, len(rows))
        if more:
            table_N3[number : number + len(more)] = more
            number += len(more)
        if number:
            programs = min(MOST_PROGRAMS, -(-PROGRAMS // number))
            self._launch.set(0, self._addresses[layer])
            self._launch((number, programs), stream)

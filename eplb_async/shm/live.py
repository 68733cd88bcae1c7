"""The live placement: the committed row of each layer, so that a new daemon adopts the running state without asking.

    data   0  sequence       i64: odd while the writer writes
          64  layers         L x (version i64, then the row int32 [P]), each padded to 64 bytes

Written by the lowest rank of the node whenever it commits a row; all ranks commit the same rows at the same step. A
version is the packed counter right after the commit of that row, 0 for the initial one. The sequence works as the
board's: odd, fence, row, even.
"""

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.placement import IntArray
from eplb_async.core.spec import MoESpec
from eplb_async.shm.atomics import CLOSED, atomics
from eplb_async.shm.layout import segment_name
from eplb_async.shm.segment import Segment

__all__ = ["LivePlacement"]

LAYOUT = "live: sequence 64; layer version 8, row int32"
_SEQUENCE, _LAYERS = 0, 64


class LivePlacement:
    """The mapped live placement of one incarnation."""

    def __init__(self, segment: Segment, spec: MoESpec) -> None:
        self.segment, self.spec = segment, spec
        self._atomics, self._address = atomics(), segment.address
        layers = segment.array(np.uint8, (spec.num_layers, _layer_bytes(spec)), _LAYERS)
        self._version_L = layers[:, :8].view(np.int64)[:, 0]
        self._row_LP = layers[:, 8 : 8 + 4 * spec.num_slots].view(np.int32)

    @classmethod
    def create(cls, group: str, spec: MoESpec, placement_LP: IntArray, incarnation: int) -> "LivePlacement":
        """A new one that starts from `placement_LP`, int32 [L, P].

        Raises:
            NoSharedMemory: see Segment.create.
        """
        size = _LAYERS + spec.num_layers * _layer_bytes(spec)
        segment = Segment.create(segment_name(group, "live"), LAYOUT, size, incarnation=incarnation)
        live = cls(segment, spec)
        live._row_LP[:] = placement_LP
        segment.publish()
        return live

    @classmethod
    def open(cls, group: str, spec: MoESpec, incarnation: int) -> "LivePlacement":
        """Map the live placement of an incarnation.

        Raises:
            SegmentMissing, SegmentRefused: see Segment.open.
        """
        segment = Segment.open(segment_name(group, "live"), LAYOUT, incarnation)
        return cls(segment, spec)

    def commit(self, layer: int, row_P: IntArray, version: int) -> None:
        """Write one row; the writing rank only."""
        odd = self._atomics.load_acquire(self._address + _SEQUENCE) | 1
        self._atomics.store_then_fence(self._address + _SEQUENCE, odd)
        self._row_LP[layer] = row_P
        self._version_L[layer] = version
        self._atomics.store_release(self._address + _SEQUENCE, odd + 1)

    def read(self) -> tuple[IntArray, NDArray[np.int64]] | None:
        """Rows int32 [L, P] and versions int64 [L] of one moment; None if the writer was in the middle each time."""
        for _ in range(64):
            before = self._atomics.load_acquire(self._address + _SEQUENCE)
            rows_LP, version_L = self._row_LP.copy(), self._version_L.copy()
            if self._atomics.fence_then_load(self._address + _SEQUENCE) == before and not before & 1:
                return rows_LP, version_L
        return None

    def close(self) -> None:
        """Drop the mapping."""
        self._atomics = CLOSED
        self._version_L, self._row_LP = np.empty(0, dtype=np.int64), np.empty((0, 0), dtype=np.int32)
        self.segment.close()


def _layer_bytes(spec: MoESpec) -> int:
    return -(-(8 + 4 * spec.num_slots) // 64) * 64

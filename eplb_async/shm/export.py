"""What a rank shows its peers at attach: how to reach its weights, and the fingerprints of what is in its slots.

    text   JSON: ExportInfo
    data   fingerprints, int64 [L, S, most tensors of a layer]; 0 where a layer has fewer tensors or a slot is empty

Written once, before the rank is READY, and never changed: after a move an expert's fingerprint is still the same, only
its slot is another, so readers look it up by expert and not by slot.
"""

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.shm.layout import decode_text, segment_name
from eplb_async.shm.segment import Segment

__all__ = ["ExportInfo", "RankExport"]

LAYOUT = "export: fingerprints int64 [L, S, tensors]"


class ExportInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The text of the segment.

    Fields:
        transfer: name of the transfer backend.
        exported: what that backend's `connect` needs, as it gave it.
        shape: of the fingerprints.
    """

    transfer: str
    exported: bytes
    shape: tuple[int, int, int]


class RankExport:
    """A mapped export segment.

    Attributes:
        info: see ExportInfo.
        fingerprints: int64 [L, S, tensors], a view.
    """

    def __init__(self, segment: Segment, info: ExportInfo) -> None:
        self.segment, self.info = segment, info
        self.fingerprints: NDArray[np.generic] = segment.array(np.int64, info.shape)

    @classmethod
    def create(
        cls, group: str, rank: int, incarnation: int, info: ExportInfo, fingerprints: NDArray[np.int64]
    ) -> "RankExport":
        """Publish the own export.

        Raises:
            NoSharedMemory: see Segment.create.
        """
        name = segment_name(group, f"export.{rank}")
        text = msgspec.json.encode(info)
        segment = Segment.create(name, LAYOUT, fingerprints.nbytes, text=text, incarnation=incarnation)
        export = cls(segment, info)
        export.fingerprints[:] = fingerprints
        segment.publish()
        return export

    @classmethod
    def open(cls, group: str, rank: int, incarnation: int) -> "RankExport":
        """Map the export of a peer.

        Raises:
            SegmentMissing, SegmentRefused: see Segment.open.
        """
        segment = Segment.open(segment_name(group, f"export.{rank}"), LAYOUT, incarnation)
        return cls(segment, decode_text(segment.name, segment.header.text, ExportInfo))

    def close(self) -> None:
        """Drop the mapping."""
        self.fingerprints = np.empty((0, 0, 0), dtype=np.int64)
        self.segment.close()

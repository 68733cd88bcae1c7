"""The load ring: one rank writes a record per step, one daemon reads them. The writer never waits.

    data   0  reserved       i64: records ever begun; then how the rank paces its transfers, for people: 8 budget in bytes,
                             16 pauses, 24 slow-downs, each written by itself
          64  published      i64: records ever finished
         128  taken          i64: records ever read; written by the reader, so that its successor goes on from there
         192  records        N records: 0 step, 8 phase, 16 version, 24 tokens, 32 previous_us, 40 pulled, then at 64 the
                             counts, int32 [L, width]

Record i lives in place i mod N. A full ring overwrites the oldest record:

    writer   reserved := i + 1; fence; the record; published := i + 1 (release)
    reader   published (acquire); copy records; fence; reserved ?  -- a copied record i is whole if i + N >= reserved

How long a step takes is known when the next begins: so a record tells it of the step before its own, and what was
pulled of the steps up to its own.

Without `reserved` a reader could not know that a record it copied was being overwritten; written after the record instead
of before, it would come too late. What the reader finds overwritten is counted as lost.
"""

import ctypes
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.load import LoadKind, Phase
from eplb_async.shm.atomics import CLOSED, atomics
from eplb_async.shm.layout import decode_text, segment_name
from eplb_async.shm.segment import Segment

__all__ = ["Batch", "LoadRing", "RingInfo"]

LAYOUT = "ring 2: reserved pace 64, published 64, taken 64; record step phase version tokens previous_us pulled 64, counts int32"
_RESERVED, _PUBLISHED, _TAKEN, _RECORDS = 0, 64, 128, 192
_PACE = (8, 16, 24)
_COUNTS = 64
_NUM_FIELDS = 6
PHASES = tuple(Phase)
_PHASE_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}


class RingInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The text of a ring's segment: its writer, what it counts, and how many records it holds."""

    group: str
    rank: int
    kind: LoadKind
    num_layers: int
    width: int
    num_records: int

    @property
    def record_bytes(self) -> int:
        """Bytes of one record, a multiple of 64."""
        return -(-(_COUNTS + 4 * self.num_layers * self.width) // 64) * 64


@dataclass(frozen=True)
class Batch:
    """Records read at once, oldest first, n of them; copies, safe to keep.

    Attributes:
        step, version, tokens: int64 [n]; version is the packed counter of the placement they were counted under.
        previous_us: how long the step before took, int64 [n]; 0: not known.
        pulled: bytes whose copies were issued since the record before, int64 [n].
        phase: index into `PHASES`, int64 [n].
        counts: int32 [n, L, width].
        lost: records overwritten before they could be read, before the first of these.
    """

    step: NDArray[np.int64]
    phase: NDArray[np.int64]
    version: NDArray[np.int64]
    tokens: NDArray[np.int64]
    counts: NDArray[np.int32]
    lost: int
    previous_us: NDArray[np.int64]
    pulled: NDArray[np.int64]

    def part(self, which: "slice | NDArray[np.bool_]") -> "Batch":
        """Some of its records; nothing was lost before them."""
        return Batch(
            self.step[which],
            self.phase[which],
            self.version[which],
            self.tokens[which],
            self.counts[which],
            0,
            self.previous_us[which],
            self.pulled[which],
        )


class LoadRing:
    """A mapped ring. The rank uses begin and publish, the daemon read; never both in one object's life.

    Attributes:
        published_address: where the number of published records is, an aligned 64-bit word.
    """

    def __init__(self, segment: Segment, info: RingInfo) -> None:
        self.segment, self.info = segment, info
        self._atomics, self._address = atomics(), segment.address
        size = info.record_bytes
        self._bytes: NDArray[np.generic] = segment.array(np.uint8, (info.num_records, size), _RECORDS)
        self._fields = self._bytes[:, : 8 * _NUM_FIELDS].view(np.int64)
        last = _COUNTS + 4 * info.num_layers * info.width
        counts = self._bytes[:, _COUNTS:last].view(np.int32)
        self._counts = counts.reshape(info.num_records, info.num_layers, info.width)
        self._written = self._atomics.load_acquire(self._address + _PUBLISHED)
        self.published_address = self._address + _PUBLISHED
        first = self._address + _RECORDS
        self._block = (ctypes.c_int64 * (5 + _NUM_FIELDS))(
            self._address + _RESERVED, first, size, info.num_records, self._written
        )
        self._block_address = ctypes.addressof(self._block)

    @classmethod
    def create(cls, info: RingInfo, incarnation: int) -> "LoadRing":
        """A new, empty ring.

        Raises:
            NoSharedMemory: see Segment.create.
        """
        size = _RECORDS + info.num_records * info.record_bytes
        name = segment_name(info.group, f"ring.{info.rank}")
        segment = Segment.create(name, LAYOUT, size, text=msgspec.json.encode(info), incarnation=incarnation)
        return cls(segment.publish(), info)

    @classmethod
    def open(cls, group: str, rank: int, incarnation: int) -> "LoadRing":
        """Map a rank's ring for reading.

        Raises:
            SegmentMissing, SegmentRefused: see Segment.open.
        """
        segment = Segment.open(segment_name(group, f"ring.{rank}"), LAYOUT, incarnation)
        return cls(segment, decode_text(segment.name, segment.header.text, RingInfo))

    @property
    def num_published(self) -> int:
        """Records ever finished."""
        return self._atomics.load_acquire(self._address + _PUBLISHED)

    def begin(
        self, step: int, phase: Phase, version: int, tokens: int, previous_us: int = 0, pulled: int = 0
    ) -> NDArray[np.int32]:
        """Claim the next record, overwriting the oldest of a full ring. Only the rank's own thread calls this.

        Args:
            step, phase, version, tokens, previous_us, pulled: see Batch.

        Returns:
            Where to write the counts, int32 [L, width], until `publish`.
        """
        self.claim(step, phase, version, tokens, previous_us, pulled)
        counts: NDArray[np.int32] = self._counts[self._written % self.info.num_records]
        return counts

    def publish(self) -> None:
        """Finish the record that `begin` claimed, once its counts are there."""
        self.finish()
        self.publish_finished()

    def claim(self, step: int, phase: Phase, version: int, tokens: int, previous_us: int = 0, pulled: int = 0) -> int:
        """As `begin`, for a device that writes the counts and publishes by itself: the address to write them to.

        The record of `finish`, which must follow, is published when the number that it returns is at `published_address`. A
        device may be behind by several records, if it publishes them in order.
        """
        self._block[5:] = [step, _PHASE_NUMBERS[phase], version, tokens, previous_us, pulled]
        return self._atomics.claim_record(self._block_address) + _COUNTS

    def finish(self) -> int:
        """The number to publish for the record that was claimed last."""
        self._written += 1
        self._block[4] = self._written
        return self._written

    def publish_finished(self) -> None:
        """Publish all finished records, on behalf of a device that has written them."""
        self._atomics.store_release(self.published_address, self._written)

    def show_pace(self, budget_bytes: int, num_pauses: int, num_slowdowns: int) -> None:
        """For `eplb-async status`; only the rank's own thread calls this."""
        for place, value in zip(_PACE, (budget_bytes, num_pauses, num_slowdowns), strict=True):
            self._atomics.store_release(self._address + place, value)

    @property
    def pace(self) -> tuple[int, int, int]:
        """What was last shown."""
        budget, pauses, slowdowns = (self._atomics.load_acquire(self._address + place) for place in _PACE)
        return budget, pauses, slowdowns

    def read(self, most: int = 1 << 30) -> Batch:
        """All records since the last read, at most `most`. Only the daemon calls this; it never blocks the writer."""
        load, size = self._atomics.load_acquire, self.info.num_records
        published = load(self._address + _PUBLISHED)
        taken = load(self._address + _TAKEN)
        if not 0 <= published <= load(self._address + _RESERVED):
            # damaged: the next record sets both right
            published = taken = max(0, taken)
        if not 0 <= taken <= published:
            # damaged: old records come once more
            taken = max(0, published - size)
        first = max(taken, published - size)
        last = min(published, first + most)
        places = np.arange(first, last) % size
        fields, counts = self._fields[places], self._counts[places]
        reserved = self._atomics.fence_then_load(self._address + _RESERVED)
        # records below reserved - size may have been overwritten while they were copied
        whole = min(max(first, reserved - size), last)
        self._atomics.store_release(self._address + _TAKEN, last)
        step, phase, version, tokens, previous_us, pulled = fields[whole - first :].T
        return Batch(step, phase, version, tokens, counts[whole - first :], whole - taken, previous_us, pulled)

    def close(self) -> None:
        """Drop the mapping."""
        self._atomics = CLOSED
        self._bytes = np.empty(0, dtype=np.uint8)
        self._fields, self._counts = np.empty(0, dtype=np.int64), np.empty((0, 0, 0), dtype=np.int32)
        self.segment.close()

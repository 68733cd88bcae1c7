"""The plan board: one daemon writes, the ranks of its node read. A reader sees the newest whole plan, or nothing.

    data   0  sequence       i64: odd while the daemon writes, even else
          64  abort          i64: plans of this generation and below are to be dropped; only grows
         128  generation, length, digest, checksum of these three and of the plan, i64 each
         192  the plan       `length` bytes

    writer   sequence := odd; fence; generation ... plan; sequence := even (release)
    reader   sequence even ? (acquire); copy; fence; sequence the same still ?; checksum

A daemon that dies while it writes leaves the sequence odd: ranks then see nothing, and the next daemon goes on from that
number. The plan before is not needed then, since the board is rewritten only when every rank of this node has committed
(or dropped) the plan in it. The checksum is not for torn reads, which the sequence finds, but for damaged bytes.
The abort word lies outside the sequence, so that a plan can be aborted without being rewritten.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np

from eplb_async.core.errors import PlanInvalid
from eplb_async.core.plan import plan_digest
from eplb_async.core.spec import MoESpec
from eplb_async.shm.atomics import CLOSED, atomics
from eplb_async.shm.layout import segment_name
from eplb_async.shm.segment import Segment

__all__ = ["PlanBoard", "Posted", "plan_capacity"]

LAYOUT = "board: sequence 64, abort 64, generation length digest checksum 64, plan"
_CHECKED = struct.Struct("<3q")
_SEQUENCE, _ABORT, _FIELDS, _PLAN = 0, 64, 128, 192


class Posted(NamedTuple):
    """A whole plan as it stood on the board."""

    generation: int
    digest: int
    data: bytes


def plan_capacity(spec: MoESpec) -> int:
    """Least bytes of a plan that a new board has room for: two commits of every layer with weighted dispatch rows."""
    per_layer = 16 * spec.num_slots + 4 * spec.num_experts * (spec.max_replicas + 1) + 64
    return (64 << 10) + 2 * spec.num_layers * per_layer


class PlanBoard:
    """A mapped board."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._atomics, self._address = atomics(), segment.address
        self.capacity = segment.header.size - segment.header.data_offset - _PLAN
        self._fields = segment.array(np.int64, (4,), _FIELDS)
        self._plan = segment.array(np.uint8, (self.capacity,), _PLAN)

    @classmethod
    def create(cls, group: str, spec: MoESpec, incarnation: int) -> "PlanBoard":
        """A new, empty board with room for two commits of every layer with weighted dispatch rows.

        Raises:
            NoSharedMemory: see Segment.create.
        """
        size = _PLAN + plan_capacity(spec)
        segment = Segment.create(segment_name(group, "board"), LAYOUT, size, incarnation=incarnation)
        return cls(segment.publish())

    @classmethod
    def open(cls, group: str, incarnation: int) -> "PlanBoard":
        """Map the board of an incarnation.

        Raises:
            SegmentMissing, SegmentRefused: see Segment.open.
        """
        segment = Segment.open(segment_name(group, "board"), LAYOUT, incarnation)
        return cls(segment)

    @property
    def sequence(self) -> int:
        """Changes with every write; cheap to poll."""
        return self._atomics.load_acquire(self._address + _SEQUENCE)

    @property
    def abort(self) -> int:
        """Highest generation that a daemon wants dropped."""
        return self._atomics.load_acquire(self._address + _ABORT)

    def post(self, generation: int, data: bytes) -> int:
        """Write a plan; daemon only, and only when the ranks are done with the one before. Returns its digest.

        Raises:
            PlanInvalid: it does not fit.
        """
        if len(data) > self.capacity:
            raise PlanInvalid(
                f"a plan of {len(data):,} bytes does not fit a board of {self.capacity:,}; move fewer layers at once"
            )
        digest = plan_digest(data)
        odd = self.sequence | 1
        self._atomics.store_then_fence(self._address + _SEQUENCE, odd)
        self._fields[:] = (generation, len(data), digest, _checksum(generation, digest, data))
        self._plan[: len(data)] = np.frombuffer(data, dtype=np.uint8)
        self._atomics.store_release(self._address + _SEQUENCE, odd + 1)
        return digest

    def order_abort(self, generation: int) -> None:
        """Ask all ranks to drop plans up to this generation; daemon only. Has no effect on finished ones."""
        if generation > self.abort:
            self._atomics.store_release(self._address + _ABORT, generation)

    def repair_abort(self, generation: int) -> None:
        """Set the abort word back to what a daemon can have written; the daemon only, of generations that are over."""
        self._atomics.store_release(self._address + _ABORT, generation)

    def read(self) -> Posted | None:
        """The plan on the board; None if there is none, or it is being written.

        Raises:
            PlanInvalid: its bytes are damaged.
        """
        before = self.sequence
        if before == 0 or before & 1:
            return None
        generation, length, digest, checksum = self._fields.tolist()
        data = self._plan[: max(0, min(length, self.capacity))].tobytes()
        if self._atomics.fence_then_load(self._address + _SEQUENCE) != before:
            return None
        if length != len(data) or _checksum(generation, digest, data) != checksum:
            raise PlanInvalid(f"plan of generation {generation} on {self.segment.name} is damaged (checksum)")
        return Posted(generation, digest, data)

    def close(self) -> None:
        """Drop the mapping."""
        self._atomics = CLOSED
        self._fields = self._plan = np.empty(0)
        self.segment.close()


def _checksum(generation: int, digest: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(_CHECKED.pack(generation, len(data), digest)))

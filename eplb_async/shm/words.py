"""The group segment: who is in the group, and the agreement words of its ranks.

    data   0  ended          i64: not 0 once a rank left or was replaced; this incarnation is over
          64  members        R lines of 64 bytes: 0 state, 8 pid, 16 start, 24 newest step
    64+64 R  words           R x H records of 64 bytes: 0 step, 8 staged, 16 committed, 24 error generation, 32 digest

Rank r alone writes member line r and words r. It writes its word for step s into record s mod H:

    writer   step := invalid; fence; staged, committed, error, digest; step := s (release); newest := s (release)
    reader   step = s ? (acquire); fields; fence; step = s still ?

A reader on the critical path asks for step s - lag, when every rank is at s - lag or later and, by the invariant that no
rank is more than lag + 1 steps ahead, at most at s + lag + 1. Records are reused after H >= 2 lag + 2 steps, so the record
is there and stays. The second look at the step turns a broken invariant (a rank that stepped without the others) into an
error instead of a wrong decision. The order "step first, then fields" would let a reader see the new step with old
counters; the release store forbids that, the invalid step and its fence forbid the reverse for slow readers.
"""

import ctypes
from enum import IntEnum
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.errors import SegmentRefused
from eplb_async.core.plan import FIRST_COUNTER, NO_PLAN
from eplb_async.core.spec import MoESpec
from eplb_async.shm.atomics import CLOSED, WORD_RECORD, atomics
from eplb_async.shm.layout import decode_text, owner_alive, process_start, segment_name
from eplb_async.shm.segment import Segment

__all__ = ["AgreementWords", "GroupInfo", "Member", "MemberState", "Reduced", "Word"]

LINE = WORD_RECORD
LAYOUT = "group: ended 64; member state pid start newest 64; word step staged committed error digest 64"
INVALID = -(2**63)
_STATE, _PID, _START, _NEWEST = 0, 8, 16, 24


class GroupInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all ranks of a group must agree on; the text of the group segment.

    Fields:
        group: its name.
        spec: the model.
        lag, history, staging_rows: see HookSettings, staging_rows with its default filled in.
        slot_bytes: per layer, bytes of one slot over all its tensors.
        tensors: digest of names, types and shapes of the tensors of all layers.
        num_nodes, node: sets of segments that the group has, one per node, and which of them this is; 1 and 0: all ranks on
            one host, however many nodes the spec names.
        reduce_every, one_peer_at_a_time: see HookSettings; of groups on several nodes.
    """

    group: str
    spec: MoESpec
    lag: int
    history: int
    staging_rows: int
    slot_bytes: list[int]
    tensors: str
    num_nodes: int = 1
    node: int = 0
    reduce_every: int = 1
    one_peer_at_a_time: bool = True

    @property
    def ranks(self) -> range:
        """The ranks that use this set of segments."""
        width = self.spec.num_ranks // self.num_nodes
        return range(self.node * width, (self.node + 1) * width)

    def differences(self, other: "GroupInfo") -> list[str]:
        """What differs between two descriptions, for people."""
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in self.__struct_fields__ if name != "spec"]
        pairs += [(name, getattr(self.spec, name), getattr(other.spec, name)) for name in self.spec.__struct_fields__]
        return [
            f"{name} is {ours!r} here and {theirs!r} in the group" for name, ours, theirs in pairs if ours != theirs
        ]


class MemberState(IntEnum):
    """A rank's way through one incarnation: FREE -> JOINING -> READY -> LEFT. Moved by that rank only."""

    FREE = 0
    JOINING = 1
    READY = 2
    LEFT = 3


class Member(NamedTuple):
    """One line of the member table."""

    state: MemberState
    pid: int
    start: int
    newest_step: int

    @property
    def alive(self) -> bool:
        """True if it joined, has not left, and its process runs."""
        return self.state in (MemberState.JOINING, MemberState.READY) and owner_alive(self.pid, self.start)


class Word(NamedTuple):
    """What one rank published for one step; counters packed as in core/plan.py."""

    step: int
    staged: int
    committed: int
    error: int
    digest: int


class Reduced(NamedTuple):
    """The words of all ranks for one step, reduced; the only thing decisions are made from."""

    staged: int
    committed: int
    error: int
    least_digest: int
    greatest_digest: int


class AgreementWords:
    """The mapped group segment of one incarnation."""

    def __init__(self, segment: Segment, info: GroupInfo) -> None:
        self.segment, self.info = segment, info
        self.num_ranks, self.history = info.spec.num_ranks, info.history
        self._members = segment.address + LINE
        self._words = self._members + LINE * self.num_ranks
        self._stride = LINE * self.history
        self._atomics = atomics()
        self._block = (ctypes.c_int64 * 17)(
            0, 0, self.history, 0, 0, 0, 0, 0, self._words, self.num_ranks, self._stride
        )
        self._block_address = ctypes.addressof(self._block)
        self._bound_rank = -1

    @classmethod
    def create(cls, info: GroupInfo, incarnation: int) -> "AgreementWords":
        """A new incarnation without members; words of the `lag` steps before step 0 are there.

        Raises:
            NoSharedMemory: see Segment.create.
        """
        size = LINE + LINE * info.spec.num_ranks * (1 + info.history)
        text = msgspec.json.encode(info)
        segment = Segment.create(segment_name(info.group, "group"), LAYOUT, size, text=text, incarnation=incarnation)
        words = cls(segment, info)
        for rank in range(words.num_ranks):
            for step in range(-info.history, 0):
                counters = (FIRST_COUNTER, FIRST_COUNTER, 0, NO_PLAN)
                # records older than the lag hold no word: a reader that asks for one sees a wrong step
                words._publish(rank, step if step >= -info.lag else INVALID, step, counters)
            atomics().store_release(words._member(rank) + _NEWEST, -1)
        segment.publish()
        return words

    @classmethod
    def open(cls, group: str) -> "AgreementWords":
        """Map the current incarnation of a group.

        Raises:
            SegmentMissing, SegmentRefused: see Segment.open.
        """
        segment = Segment.open(segment_name(group, "group"), LAYOUT)
        words = cls(segment, decode_text(segment.name, segment.header.text, GroupInfo))
        # the words are read by address, which nothing checks later
        segment.array(np.uint8, (LINE * (1 + words.num_ranks * (1 + words.history)),))
        return words

    @property
    def incarnation(self) -> int:
        """Number of this incarnation; later ones are greater."""
        return self.segment.header.incarnation

    @property
    def ended(self) -> bool:
        """True once a rank left or was replaced."""
        return self._atomics.load_acquire(self.segment.address) != 0

    def end(self) -> None:
        """Declare the incarnation over."""
        self._atomics.store_release(self.segment.address, 1)

    def member(self, rank: int) -> Member:
        """The line of one rank; for any process.

        Raises:
            SegmentRefused: the line is damaged.
        """
        load, line = self._atomics.load_acquire, self._member(rank)
        state = load(line + _STATE)
        if not MemberState.FREE <= state <= MemberState.LEFT:
            raise SegmentRefused(self.segment.name, f"state {state} of rank {rank}", "an undamaged member table")
        return Member(MemberState(state), load(line + _PID), load(line + _START), load(line + _NEWEST))

    def join(self, rank: int, pid: int) -> None:
        """Enter this process as a rank; the caller holds the group's lock."""
        store, line = self._atomics.store_release, self._member(rank)
        store(line + _PID, pid)
        store(line + _START, process_start(pid))
        store(line + _STATE, MemberState.JOINING)

    def set_state(self, rank: int, state: MemberState) -> None:
        """Move the own state on."""
        self._atomics.store_release(self._member(rank) + _STATE, state)

    def publish(self, rank: int, step: int, counters: tuple[int, int, int, int]) -> None:
        """Write the own word for a step >= 0: (staged, committed, error, digest)."""
        block = self._block
        if rank != self._bound_rank:
            block[0], block[1] = self._words + self._stride * rank, self._members + LINE * rank + _NEWEST
            self._bound_rank = rank
        block[3:8] = [step, *counters]
        self._atomics.publish_step(self._block_address)

    def reduce(self, step: int) -> Reduced | tuple[int, int]:
        """The reduced words of all ranks for a step, or (rank, step found in its record) of the first that has none."""
        block = self._block
        block[11] = step
        missing = self._atomics.reduce_step(self._block_address)
        if missing >= 0:
            return missing, block[12]
        return Reduced(*block[12:17])

    def repeat(self, step: int, collected: int) -> bool:
        """Publish the counters of the last `publish` again, for another step; true if the reduced words of `collected`
        are these, both digests alike."""
        block = self._block
        block[3], block[11] = step, collected
        return self._atomics.repeat_step(self._block_address) == 1

    def newest(self, rank: int) -> Word | None:
        """The newest word of a rank, for daemons; None if none can be read whole (it steps too fast, or never did)."""
        for _ in range(16):
            step = self._atomics.load_acquire(self._member(rank) + _NEWEST)
            record = self._record(rank, step)
            if self._atomics.load_acquire(record) != step:
                continue
            offset = record - self.segment.address
            fields: NDArray[np.generic] = self.segment.array(np.int64, (5,), offset)
            word = Word(*fields.tolist())
            if self._atomics.fence_then_load(record) == step:
                return word
        return None

    def close(self) -> None:
        """Drop the mapping."""
        self._atomics = CLOSED
        self.segment.close()

    def _member(self, rank: int) -> int:
        return self._members + LINE * rank

    def _record(self, rank: int, step: int) -> int:
        return self._words + self._stride * rank + LINE * (step % self.history)

    def _publish(self, rank: int, step: int, place: int, counters: tuple[int, int, int, int]) -> None:
        self._atomics.publish_word(self._record(rank, place), step, *counters)

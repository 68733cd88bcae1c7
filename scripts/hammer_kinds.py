"""What the hammer writes and checks: one class for each kind of segment that is read while it is written.

All that a writer publishes follows from the number of the publication, so a reader can tell whole from torn by itself:

    ring     record i holds i in every field and count; none twice, in order, and lost ones counted exactly
    board    the plan is the generation's bytes, over and over, of a length that follows from it
    words    staged, committed, error and digest follow from the step, for a rank alone and reduced over all
    live     version v is in layer v mod L, its row follows from v, and all layers are of one moment

A writer that was killed is followed by one that goes on from what it finds, an odd sequence included.
"""

import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.errors import PlanInvalid
from eplb_async.core.load import LoadKind, Phase
from eplb_async.core.spec import MoESpec
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.live import LivePlacement
from eplb_async.shm.ring import LoadRing, RingInfo
from eplb_async.shm.segment import Segment
from eplb_async.shm.words import AgreementWords, GroupInfo, Reduced

__all__ = ["KINDS", "BoardHammer", "Hammer", "LiveHammer", "RingHammer", "Tally", "WordsHammer"]

INCARNATION = 1
CHUNK = 64
"""Publications or reads between two looks at whether to stop."""


@dataclass
class Tally:
    """What a reader saw.

    Fields:
        reads: attempts.
        whole: records, plans or words that were read and right; `distinct` of them with another number than before.
        nothing: attempts that found nothing that can be read whole.
        lost: ring records that were overwritten before they were read.
        torn: what was read and not right. `example` describes the first.
    """

    reads: int = 0
    whole: int = 0
    distinct: int = 0
    nothing: int = 0
    lost: int = 0
    torn: int = 0
    example: str = ""
    last: int = field(default=-1, repr=False)

    def see(self, number: int, right: bool, found: object) -> None:
        """Count one thing that was read, whose number must be no less than that of the one before."""
        if not right or number < self.last:
            self.torn += 1
            self.example = self.example or f"{found} after number {self.last}"
            return
        self.whole += 1
        self.distinct += number != self.last
        self.last = number


@dataclass(frozen=True)
class Hammer(ABC):
    """One kind; copies of it are sent to the processes."""

    group: str

    name = ""

    @abstractmethod
    def create(self) -> Segment:
        """Make the segment that all share; the caller unlinks it."""

    @abstractmethod
    def progress(self) -> int:
        """Publications so far, by all writers; for any process."""

    @abstractmethod
    def write(self, target: int) -> None:
        """Publish at full speed until there are `target` publications."""

    @abstractmethod
    def read(self, stop_path: str, deadline_s: float) -> Tally:
        """Read at full speed until the file at `stop_path` is gone."""


@dataclass(frozen=True)
class RingHammer(Hammer):
    """Load ring of so few records that the writer laps the reader all the time."""

    ring: type[LoadRing] = LoadRing
    num_records: int = 32

    name = "ring"

    def create(self) -> Segment:
        """See Hammer."""
        info = RingInfo(
            group=self.group, rank=0, kind=LoadKind.LOGICAL, num_layers=4, width=64, num_records=self.num_records
        )
        return LoadRing.create(info, INCARNATION).segment

    def _open(self) -> LoadRing:
        return self.ring.open(self.group, 0, INCARNATION)

    def progress(self) -> int:
        """See Hammer."""
        return self._open().num_published

    def write(self, target: int) -> None:
        """See Hammer."""
        ring, phases = self._open(), tuple(Phase)
        for number in range(ring.num_published, target):
            place = ring.begin(number, phases[number % len(phases)], 3 * number, 5 * number, 7 * number, 9 * number)
            place[:] = number & 0x7FFFFFFF
            ring.publish()

    def read(self, stop_path: str, deadline_s: float) -> Tally:
        """See Hammer."""
        ring, tally, watch = self._open(), Tally(), _Watch(stop_path, deadline_s)
        expected = 0
        while watch.goes_on():
            for most in (1, 2, 1 << 30) * (CHUNK // 3):
                batch = ring.read(most)
                tally.reads += 1
                tally.lost += batch.lost
                expected += batch.lost
                tally.nothing += not len(batch.step)
                for place, number in enumerate(range(expected, expected + len(batch.step))):
                    fields = batch.step, batch.phase, batch.version, batch.tokens, batch.previous_us, batch.pulled
                    found = [int(values[place]) for values in fields]
                    right = found == [number, number % 5, 3 * number, 5 * number, 7 * number, 9 * number]
                    right = right and bool((batch.counts[place] == number & 0x7FFFFFFF).all())
                    tally.see(number, right, f"record {number}: {found}")
                expected += len(batch.step)
        if ring.num_published != expected + _rest(ring):
            tally.torn += 1
            tally.example = tally.example or f"{ring.num_published} published, {expected} read or lost"
        return tally


def _rest(ring: LoadRing) -> int:
    batch = ring.read()
    return batch.lost + len(batch.step)


@dataclass(frozen=True)
class BoardHammer(Hammer):
    """Plan board with plans of changing length."""

    board: type[PlanBoard] = PlanBoard

    name = "board"

    def create(self) -> Segment:
        """See Hammer."""
        return PlanBoard.create(self.group, _SPEC, INCARNATION).segment

    def _open(self) -> PlanBoard:
        return self.board.open(self.group, INCARNATION)

    def progress(self) -> int:
        """See Hammer."""
        return self._open().sequence // 2

    def write(self, target: int) -> None:
        """See Hammer."""
        board = self._open()
        for number in range(board.sequence // 2 + 1, target + 1):
            board.post(number, _plan(number))

    def read(self, stop_path: str, deadline_s: float) -> Tally:
        """See Hammer."""
        board, tally, watch = self._open(), Tally(), _Watch(stop_path, deadline_s)
        while watch.goes_on():
            for _ in range(CHUNK):
                tally.reads += 1
                try:
                    posted = board.read()
                except PlanInvalid as error:
                    tally.see(-1, False, error)
                    continue
                if posted is None:
                    tally.nothing += 1
                else:
                    right = posted.data == _plan(posted.generation)
                    tally.see(posted.generation, right, f"generation {posted.generation}: {len(posted.data)} bytes")
        return tally


def _plan(number: int) -> bytes:
    return number.to_bytes(8, "little") * (8 + number * 37 % 120)


@dataclass(frozen=True)
class WordsHammer(Hammer):
    """Agreement words of two ranks with a history of two, so that records are overwritten all the time."""

    words: type[AgreementWords] = AgreementWords

    name = "words"

    def create(self) -> Segment:
        """See Hammer."""
        info = GroupInfo(
            group=self.group, spec=_SPEC, lag=1, history=2, staging_rows=1, slot_bytes=[1] * 4, tensors="none"
        )
        return AgreementWords.create(info, INCARNATION).segment

    def progress(self) -> int:
        """See Hammer."""
        words = self.words.open(self.group)
        return sum(words.member(rank).newest_step + 1 for rank in range(words.num_ranks))

    def write(self, target: int) -> None:
        """See Hammer."""
        words = self.words.open(self.group)
        # a writer killed between two ranks has left the second one a step behind
        first = min(words.member(rank).newest_step for rank in range(words.num_ranks)) + 1
        for step in range(first, -(-target // words.num_ranks)):
            for rank in range(words.num_ranks):
                if step > first or words.member(rank).newest_step < step:
                    words.publish(rank, step, _counters(step, rank))

    def read(self, stop_path: str, deadline_s: float) -> Tally:
        """See Hammer."""
        words, tally, watch = self.words.open(self.group), Tally(), _Watch(stop_path, deadline_s)
        newest = [-1] * words.num_ranks
        while watch.goes_on():
            for turn in range(CHUNK):
                rank = turn % words.num_ranks
                tally.reads += 2
                word = words.newest(rank)
                if word is None:
                    tally.nothing += 1
                elif word.step >= 0:
                    right = word[1:] == _counters(word.step, rank) and word.step >= newest[rank]
                    newest[rank] = max(newest[rank], word.step)
                    tally.see(max(word.step, tally.last), right, word)
                # also the step after: ranks wait for words that are just being written
                self._reduce(words, min(newest) + turn % 3, tally)
        return tally

    @staticmethod
    def _reduce(words: AgreementWords, step: int, tally: Tally) -> None:
        reduced = words.reduce(step)
        if not isinstance(reduced, Reduced):
            tally.nothing += 1
        elif step >= 0:
            each = [_counters(step, rank) for rank in range(words.num_ranks)]
            staged, committed, error, digest = zip(*each, strict=True)
            right = reduced == (min(staged), min(committed), max(error), min(digest), max(digest))
            tally.see(max(step, tally.last), right, f"step {step}: {reduced}")


def _counters(step: int, rank: int) -> tuple[int, int, int, int]:
    return 3 * step + rank, 2 * step - rank, 7 * step + rank, 11 * step - rank


@dataclass(frozen=True)
class LiveHammer(Hammer):
    """Live placement whose layers are committed in turn."""

    live: type[LivePlacement] = LivePlacement

    name = "live"

    def create(self) -> Segment:
        """See Hammer."""
        rows_LP = np.stack([_row(0)] * _SPEC.num_layers)
        return LivePlacement.create(self.group, _SPEC, rows_LP, INCARNATION).segment

    def _open(self) -> LivePlacement:
        return self.live.open(self.group, _SPEC, INCARNATION)

    def _sequence(self) -> NDArray[np.generic]:
        return self._open().segment.array(np.int64, (1,))

    def progress(self) -> int:
        """See Hammer."""
        return int(self._sequence()[0]) // 2

    def write(self, target: int) -> None:
        """See Hammer."""
        live = self._open()
        # a writer killed in the middle has left this version undone, or done without telling
        for number in range(self.progress() + 1, target + 1):
            live.commit(number % _SPEC.num_layers, _row(number), number)

    def read(self, stop_path: str, deadline_s: float) -> Tally:
        """See Hammer."""
        live, tally, watch = self._open(), Tally(), _Watch(stop_path, deadline_s)
        layers = np.arange(_SPEC.num_layers)
        while watch.goes_on():
            for _ in range(CHUNK):
                tally.reads += 1
                found = live.read()
                if found is None:
                    tally.nothing += 1
                    continue
                rows_LP, version_L = found
                newest = int(version_L.max())
                expected_L = np.maximum(newest - (newest - layers) % _SPEC.num_layers, 0)
                right = np.array_equal(version_L, expected_L) and bool((rows_LP == _rows(version_L)).all())
                tally.see(newest, right, version_L.tolist())
        return tally


_SPEC = MoESpec(num_layers=4, num_experts=60, num_redundant=4, num_ranks=2)
_BASE_P = np.arange(_SPEC.num_slots, dtype=np.int32)


def _row(number: int) -> NDArray[np.int32]:
    return _BASE_P + np.int32(number & 0x3FFFFFFF)


def _rows(version_L: NDArray[np.int64]) -> NDArray[np.int64]:
    return _BASE_P + (version_L & 0x3FFFFFFF)[:, None]


class _Watch:
    """Tells a reader when to stop, at the cost of one look at a directory entry for each chunk."""

    def __init__(self, stop_path: str, deadline_s: float) -> None:
        self._path, self._end = stop_path, time.monotonic() + deadline_s

    def goes_on(self) -> bool:
        return os.path.exists(self._path) and time.monotonic() < self._end


KINDS: dict[str, type[Hammer]] = {kind.name: kind for kind in (RingHammer, BoardHammer, WordsHammer, LiveHammer)}

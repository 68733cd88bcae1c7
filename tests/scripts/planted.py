"""Rings, boards, words and live placements that leave out one step of their protocol; the hammer must catch each."""

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.load import Phase
from eplb_async.core.placement import IntArray
from eplb_async.core.plan import plan_digest
from eplb_async.shm.board import PlanBoard, Posted
from eplb_async.shm.live import LivePlacement
from eplb_async.shm.ring import PHASES, Batch, LoadRing
from eplb_async.shm.words import AgreementWords, Word

__all__ = [
    "BlindBoard",
    "BlindLive",
    "BlindRing",
    "BlindWords",
    "HastyWords",
    "LateRing",
    "QuietBoard",
    "QuietLive",
]

RING_RESERVED, RING_PUBLISHED, RING_TAKEN = 0, 64, 128


class BlindRing(LoadRing):
    """The reader does not look at `reserved` after it has copied."""

    def read(self, most: int = 1 << 30) -> Batch:
        """As LoadRing's, without the second look."""
        published = self.num_published
        taken = self._atomics.load_acquire(self._address + RING_TAKEN)
        first = max(taken, published - self.info.num_records)
        last = min(published, first + most)
        places = np.arange(first, last) % self.info.num_records
        fields, counts = self._fields[places], self._counts[places]
        self._atomics.store_release(self._address + RING_TAKEN, last)
        step, phase, version, tokens, previous_us, pulled = fields.T
        return Batch(step, phase, version, tokens, counts, first - taken, previous_us, pulled)


class LateRing(LoadRing):
    """The writer says that it overwrites a record only when it has."""

    def begin(
        self, step: int, phase: Phase, version: int, tokens: int, previous_us: int = 0, pulled: int = 0
    ) -> NDArray[np.int32]:
        """As LoadRing's, without the announcement."""
        place = self._written % self.info.num_records
        self._fields[place] = (step, PHASES.index(phase), version, tokens, previous_us, pulled)
        counts: NDArray[np.int32] = self._counts[place]
        return counts

    def publish(self) -> None:
        """Announce, and publish."""
        self._atomics.store_release(self._address + RING_RESERVED, self._written + 1)
        super().publish()


class BlindBoard(PlanBoard):
    """The reader does not look at the sequence again after it has copied."""

    def read(self) -> Posted | None:
        """As PlanBoard's, without the second look and the checksum."""
        before = self.sequence
        if before == 0 or before & 1:
            return None
        generation, length, digest, _ = self._fields.tolist()
        return Posted(generation, digest, self._plan[: max(0, min(length, self.capacity))].tobytes())


class QuietBoard(PlanBoard):
    """The writer does not make the sequence odd while it writes; readers have no checksum."""

    def post(self, generation: int, data: bytes) -> int:
        """As PlanBoard's, without the odd sequence."""
        digest = plan_digest(data)
        self._fields[:] = (generation, len(data), digest, 0)
        self._plan[: len(data)] = np.frombuffer(data, dtype=np.uint8)
        self._atomics.store_release(self._address, self.sequence + 2)
        return digest

    def read(self) -> Posted | None:
        """As PlanBoard's, without the checksum."""
        before = self.sequence
        generation, length, digest, _ = self._fields.tolist()
        data = self._plan[: max(0, min(length, self.capacity))].tobytes()
        whole = before and self._atomics.fence_then_load(self._address) == before
        return Posted(generation, digest, data) if whole else None


class BlindWords(AgreementWords):
    """The reader of the newest word does not look at its step again after it has copied."""

    def newest(self, rank: int) -> Word | None:
        """As AgreementWords', without the second look."""
        step = self._atomics.load_acquire(self._member(rank) + 24)
        record = self._record(rank, step)
        if self._atomics.load_acquire(record) != step:
            return None
        fields = self.segment.array(np.int64, (5,), record - self.segment.address)
        return Word(*fields.tolist())._replace(step=step)


class HastyWords(AgreementWords):
    """The writer publishes the step before what belongs to it."""

    def publish(self, rank: int, step: int, counters: tuple[int, int, int, int]) -> None:
        """Step first, then the fields."""
        store, record = self._atomics.store_release, self._record(rank, step)
        for place, value in enumerate((step, *counters)):
            store(record + 8 * place, value)
        store(self._member(rank) + 24, step)


class BlindLive(LivePlacement):
    """The reader does not look at the sequence at all."""

    def read(self) -> tuple[IntArray, NDArray[np.int64]] | None:
        """A copy, whatever is going on."""
        return self._row_LP.copy(), self._version_L.copy()


class QuietLive(LivePlacement):
    """The writer does not make the sequence odd while it writes."""

    def commit(self, layer: int, row_P: IntArray, version: int) -> None:
        """As LivePlacement's, without the odd sequence."""
        self._row_LP[layer] = row_P
        self._version_L[layer] = version
        self._atomics.store_release(self._address, 2 * version)

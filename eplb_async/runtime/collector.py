"""From the rings of a node's ranks to windows of logical load, summed over ranks.

    records --(validated)--> groups of one window and version --(folded)--> open windows --> complete windows

Window w holds steps w * window_steps to (w + 1) * window_steps - 1. It is complete once every ring whose rank lives has
passed its end. A window whose beginning some ring did not show (the daemon came later) is left out, and so is one
without traffic. Dummy and profile steps move a ring on but do not count; how the others do, is in phase_load.py.

Cost matters here: 8 ranks x 200 steps/s of [58, 256] int32 are 95 MB/s. Hence whole batches, and sums in int32 when the
largest count times the number of records cannot overflow.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.daemon_settings import DaemonSettings
from eplb_async.core.load import LoadKind, Phase, fold_slots
from eplb_async.core.placement import IntArray
from eplb_async.core.spec import MoESpec
from eplb_async.runtime.group_view import LiveView
from eplb_async.runtime.messages import PhaseStatus
from eplb_async.runtime.phase_load import PhaseLoads, weights_of
from eplb_async.runtime.row_history import RowHistory
from eplb_async.runtime.step_times import StepTimes
from eplb_async.runtime.windows import LoadWindows
from eplb_async.shm.ring import PHASES, Batch, LoadRing

__all__ = ["READ_AT_ONCE", "Collector", "RingStatistics"]

logger = logging.getLogger(__name__)

READ_AT_ONCE = 64
"""Records per read: a few megabytes, so that the event loop is held for a millisecond or two."""
_COUNTS = np.array([phase.counts for phase in PHASES])
_INT32_MAX = (1 << 31) - 1


class RingStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What came from one ring: whole records, those overwritten before they were read, before the daemon looked for the
    first time (missed), nonsense (damaged), and records of which some layer could not be folded; newest step seen; LoadRing.pace."""

    rank: int
    num_records: int
    num_lost: int
    num_missed: int
    num_damaged: int
    num_unfolded: int
    newest_step: int
    pace: tuple[int, int, int]


class _Reader:
    """One ring and what was seen of it.

    `waiting` holds records whose placement is not certain yet, `largest` bounds the counts in it.
    """

    def __init__(self, ring: LoadRing) -> None:
        self.ring, self.rank, self.kind = ring, ring.info.rank, ring.info.kind
        self.read_step = self.folded_step = -1
        self.first_step: int | None = None
        self.waiting: deque[Batch] = deque()
        self.records = self.lost = self.missed = self.damaged = self.unfolded = 0
        self.started = False
        self.largest = 0


class Collector:
    """Reads the rings of one group. Used by one task only.

    Attributes:
        load: the complete windows with traffic that placement serves.
        phases: the same by phase, and what a token of each counts.
        num_completed: windows ever completed, with traffic or not.
        unfolded_L: records per layer that could not be folded, int64 [L].
    """

    def __init__(
        self, spec: MoESpec, rings: Mapping[int, LoadRing], rows: RowHistory, steps_and_windows: tuple[int, int]
    ) -> None:
        """`steps_and_windows`: steps per window, and windows kept."""
        self._spec, self._rows = spec, rows
        self._readers = {rank: _Reader(ring) for rank, ring in rings.items()}
        self.load = LoadWindows((spec.num_layers, spec.num_experts), *steps_and_windows)
        self.num_completed = 0
        self._times = StepTimes()
        self.unfolded_L = np.zeros(spec.num_layers, dtype=np.int64)
        self.phases = PhaseLoads(spec, steps_and_windows, weights_of(DaemonSettings()))
        self._next_window = 0

    def resize(self, window_steps: int, num_windows: int) -> None:
        """Other windows from now on; those collected are forgotten if their length changes."""
        self.phases.resize(window_steps, num_windows)
        if self.load.resize(window_steps, num_windows):
            self._begin_anew()

    def serve(self, weights: Mapping[Phase, float]) -> None:
        """What a token of each phase counts from now on, see `weights_of`; windows of other load are forgotten."""
        if weights != self.phases.weights:
            self.phases.weights = dict(weights)
            self.load.clear()
            self._begin_anew()

    @property
    def _timed(self) -> NDArray[np.bool_]:
        """Phases whose steps windows tell the time of, by their number: those that placement serves."""
        return np.array([self.phases.weights.get(phase, 0.0) > 0 for phase in PHASES])

    def phase_status(self, live: LiveView) -> tuple[PhaseStatus, ...]:
        """Steps, tokens and live PAR of each phase."""
        return self.phases.status(live, self._next_window - 1)

    @property
    def windows(self) -> deque[tuple[int, NDArray[np.int64]]]:
        """See LoadWindows.kept."""
        return self.load.kept

    def drain(self, rank: int, newest_step: Callable[[], int]) -> int:
        """Read what one rank has recorded, up to READ_AT_ONCE records; how many: READ_AT_ONCE if more may be there.

        Args:
            rank: whose ring.
            newest_step: reads that of its words; called after the records were read. A word is published before its
                step's forward, so a record of a later step is damaged.
        """
        reader = self._readers[rank]
        # records may wait for a placement that does not become certain: then rather leave new ones in the ring
        room = reader.ring.info.num_records - sum(len(batch.step) for batch in reader.waiting)
        if room <= 0:
            # nor for ever: a version that was damaged never comes, and no plan is made without this rank's load
            reader.unfolded += (given_up := len(reader.waiting[0].step))
            reader.folded_step = int(reader.waiting.popleft().step[-1])
            room = given_up
        batch = reader.ring.read(max(0, min(READ_AT_ONCE, room)))
        num_read = len(batch.step)
        self._count_lost(reader, batch.lost)
        if len(batch.step):
            batch = self._valid(reader, batch, newest_step())
            if len(batch.step):
                reader.read_step = int(batch.step[-1])
                self._times.add(rank, batch, self.load.steps, self._timed)
                self.phases.seen(batch)
                if reader.first_step is None:
                    reader.first_step = int(batch.step[0])
                reader.waiting.append(batch)
        self._fold_waiting(reader)
        return num_read

    def complete(self, gone: Collection[int]) -> int:
        """Close the windows that every ring has passed, not counting those of ranks that are gone; how many."""
        readers = [reader for rank, reader in self._readers.items() if rank not in gone]
        if not readers or any(reader.first_step is None for reader in readers):
            return 0
        # the first window that all rings show from its first step on
        first = max(-(-(reader.first_step or 0) // self.load.steps) for reader in readers)
        end = min(reader.folded_step + 1 for reader in readers) // self.load.steps
        closed = 0
        for window in self.phases.open:
            if window >= end:
                break
            times = self._times.close(window)
            if window < first:
                self.phases.drop(window)
            elif self.load.add(window, self.phases.close(window), times):
                closed += 1
        self.num_completed += max(0, end - max(self._next_window, first))
        self._next_window = max(self._next_window, end)
        return closed

    def statistics(self) -> list[RingStatistics]:
        """See RingStatistics; by rank."""
        return [
            RingStatistics(
                rank=rank,
                num_records=reader.records,
                num_lost=reader.lost,
                num_missed=reader.missed,
                num_damaged=reader.damaged,
                num_unfolded=reader.unfolded,
                newest_step=reader.read_step,
                pace=reader.ring.pace,
            )
            for rank, reader in sorted(self._readers.items())
        ]

    def close(self) -> None:
        """Drop the rings' mappings."""
        for reader in self._readers.values():
            reader.waiting.clear()
            reader.ring.close()

    def _begin_anew(self) -> None:
        """Windows begin with the next records."""
        self.phases.begin_anew()
        self._times.clear()
        for reader in self._readers.values():
            reader.first_step = reader.folded_step + 1 if reader.first_step is not None else None
        self._next_window = 0

    def _count_lost(self, reader: _Reader, lost: int) -> None:
        if not reader.started:
            # recorded while no daemon ran, or by the time of an earlier one
            reader.missed, reader.started = lost, True
        elif lost:
            if not reader.lost:
                logger.warning("rank %d: %d records of load were overwritten before they were read", reader.rank, lost)
            reader.lost += lost

    def _valid(self, reader: _Reader, batch: Batch, newest_step: int) -> Batch:
        """The batch without nonsense: steps that do not grow or lie in the future, unknown phases, negative counts."""
        reader.records += len(batch.step)
        previous = np.concatenate([[reader.read_step], np.maximum.accumulate(batch.step)[:-1]])
        bad = (batch.step <= previous) | (batch.step > newest_step)
        bad |= (batch.phase < 0) | (batch.phase >= len(PHASES)) | (batch.version < 0)
        # seen as unsigned, a negative count is a huge one: one pass finds both
        largest = int(batch.counts.view(np.uint32).max())
        if largest > _INT32_MAX:
            bad |= batch.counts.min(axis=(1, 2)) < 0
            largest = _INT32_MAX
        reader.largest = max(largest, reader.largest) if reader.waiting else largest
        if not bad.any():
            return batch
        if not reader.damaged:
            step = int(batch.step[bad][0])
            logger.error(
                "rank %d: a damaged record (step %d after %d); not counted", reader.rank, step, reader.read_step
            )
        reader.damaged += int(bad.sum())
        good = ~bad
        return batch.part(good)

    def _fold_waiting(self, reader: _Reader) -> None:
        while reader.waiting:
            batch = reader.waiting[0]
            window = batch.step // self.load.steps
            counts = _COUNTS[batch.phase]
            keys = np.stack([window, batch.version, counts])
            cuts = [0, *(np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(axis=0)) + 1).tolist(), len(batch.step)]
            for first, last in pairwise(cuts):
                if counts[first] and not self._add(reader, batch, first, last):
                    reader.waiting[0] = batch.part(slice(first, None))
                    return
                reader.folded_step = int(batch.step[last - 1])
            reader.waiting.popleft()

    def _add(self, reader: _Reader, batch: Batch, first: int, last: int) -> bool:
        """Add records of one window and version; false if it cannot be told yet under which placement they were counted."""
        window, placement = int(batch.step[first]) // self.load.steps, None
        if reader.kind is not LoadKind.LOGICAL:
            placement = self._rows.placement_at(int(batch.version[first]))
            if placement is None:
                return False
        kind = np.int32 if reader.largest * (last - first) <= _INT32_MAX else np.int64
        for phase, n, load in _by_phase(batch.counts[first:last], batch.phase[first:last], kind):
            if placement is not None:
                load = self._folded(reader, load, placement, n)
            # else of a rank that was taken for gone: its window is closed
            if window >= self._next_window:
                self.phases.add(window, PHASES[phase], load)
        return True

    def _folded(
        self, reader: _Reader, load: NDArray[np.signedinteger], placement: tuple[IntArray, NDArray[np.bool_]], n: int
    ) -> NDArray[np.int64]:
        rows_LP, known_L = placement
        if reader.kind is LoadKind.LOCAL_SLOTS:
            width = self._spec.slots_per_rank
            rows_LP = rows_LP[:, reader.rank * width : (reader.rank + 1) * width]
        if not known_L.all():
            self.unfolded_L[~known_L] += n
            reader.unfolded += n
        # rows of unknown layers are empty slots: what was counted there belongs to nobody
        return fold_slots(load.astype(np.int64), rows_LP, self._spec.num_experts)


def _by_phase(
    counts: NDArray[np.int32], phases: NDArray[np.int64], kind: type[np.signedinteger]
) -> list[tuple[int, int, NDArray[np.signedinteger]]]:
    """Each phase that there is, its number of records, and their sum."""
    found, rest = [], np.add.reduce(counts, axis=0, dtype=kind)
    number = np.bincount(phases)
    *few, most = np.flatnonzero(number)[np.argsort(number[number > 0])].tolist()
    for phase in few:
        # picking records copies them; so the most common phase is what the others leave
        load = np.add.reduce(counts[phases == phase], axis=0, dtype=kind)
        rest -= load
        found.append((phase, int(number[phase]), load))
    return [*found, (most, int(number[most]), rest)]

"""Windows hold what the ranks counted: no more, no less, and under the right placement."""

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Literal

import numpy as np
import pytest

from eplb_async.core.clock import SystemClock
from eplb_async.core.daemon_settings import DaemonSettings
from eplb_async.core.load import LoadKind, Phase
from eplb_async.core.plan import Plan, PlanEntry, counter
from eplb_async.core.score import par, rank_load
from eplb_async.core.spec import MoESpec
from eplb_async.runtime.collector import Collector
from eplb_async.runtime.phase_load import weights_of
from eplb_async.runtime.publisher import Publisher
from eplb_async.runtime.row_history import RowHistory
from eplb_async.shm.ring import LoadRing
from eplb_async.shm.words import Word
from tests.runtime.stand_in import StandInGroup

__all__: list[str] = []

Make = Callable[..., StandInGroup]


class Watched:
    """A collector and a publisher on a stand-in group, as a session has them."""

    def __init__(self, ranks: StandInGroup, window_steps: int = 5, num_windows: int = 4) -> None:
        self.ranks, info = ranks, ranks.info
        self.publisher = Publisher(ranks.board, ranks.live, self.words(), SystemClock())
        rings = {rank: LoadRing.open(info.group, rank, 1) for rank in range(info.spec.num_ranks)}
        self.collector = Collector(info.spec, rings, self.publisher.rows, (window_steps, num_windows))

    def words(self) -> list[Word]:
        """The newest of every rank."""
        found = [self.ranks.words.newest(rank) for rank in range(self.ranks.words.num_ranks)]
        return [word for word in found if word is not None]

    def look(self, gone: tuple[int, ...] = ()) -> int:
        """One look as a session does it; windows closed."""
        self.publisher.observe(self.words())
        for rank in range(self.ranks.words.num_ranks):
            while self.collector.drain(rank, lambda: self.ranks.step_number):
                pass
        return self.collector.complete(gone)


@pytest.fixture
def watch(stand_in: Make) -> Iterator[Callable[..., Watched]]:
    """Makes watched groups; their ring mappings are closed afterwards."""
    made: list[Watched] = []

    def make(window_steps: int = 5, num_windows: int = 4, **options: object) -> Watched:
        made.append(Watched(stand_in(**options), window_steps, num_windows))
        return made[-1]

    yield make
    for one in made:
        one.collector.close()


def per_step(ranks: StandInGroup) -> np.ndarray:
    """Load of one step, summed over ranks."""
    return sum((ranks.load_LE(rank) for rank in range(ranks.words.num_ranks)), start=np.zeros(1, dtype=np.int64))


def test_window_is_the_sum_over_steps_and_ranks(watch: Callable[..., Watched]) -> None:
    """A complete window of 5 steps is 5 times a step's load over all ranks; a ring that wraps around changes nothing."""
    watched = watch(ring_records=7)
    closed = 0
    for _ in range(8):
        for _ in range(3):
            watched.ranks.step()
        closed += watched.look()
    assert closed == 24 // 5
    assert [window for window, _ in watched.collector.windows] == [0, 1, 2, 3]
    for _, load_LE in watched.collector.windows:
        np.testing.assert_array_equal(load_LE, 5 * per_step(watched.ranks))
    assert all(ring.num_lost == ring.num_damaged == 0 for ring in watched.collector.statistics())


def test_lost_records_are_counted_per_rank(watch: Callable[..., Watched]) -> None:
    """Records overwritten before they were read are lost; those from before the first look are missed, not lost."""
    watched = watch(ring_records=4)
    for _ in range(6):
        watched.ranks.step()
    watched.look()
    assert {(ring.num_missed, ring.num_lost) for ring in watched.collector.statistics()} == {(2, 0)}
    for _ in range(9):
        watched.ranks.step()
    watched.look()
    assert {(ring.num_missed, ring.num_lost) for ring in watched.collector.statistics()} == {(2, 5)}


def test_window_whose_beginning_was_not_seen_is_left_out(watch: Callable[..., Watched]) -> None:
    """A daemon that comes at step 2 of a window begins with the next one."""
    watched = watch(ring_records=4)
    for _ in range(6):
        watched.ranks.step()
    watched.look()
    for _ in range(4):
        watched.ranks.step()
    assert watched.look() == 1
    assert [window for window, _ in watched.collector.windows] == [1]


def test_dummy_and_profile_steps_do_not_count(watch: Callable[..., Watched]) -> None:
    """Their loads are not traffic, but they move windows on; a window of nothing else is not kept."""
    watched = watch()
    for phase in (Phase.DECODE, Phase.DUMMY, Phase.PROFILE, Phase.PREFILL, Phase.MIXED, *[Phase.DUMMY] * 5):
        watched.ranks.step(phase)
    assert watched.look() == 1
    np.testing.assert_array_equal(watched.collector.windows[0][1], 3 * per_step(watched.ranks))
    assert watched.collector.num_completed == 2


def test_rank_that_is_gone_does_not_hold_windows_up(watch: Callable[..., Watched]) -> None:
    """A window waits for the slowest living rank only."""
    watched = watch()
    for _ in range(4):
        watched.ranks.step()
    silent = watched.ranks.rings.pop()
    for _ in range(2):
        watched.ranks.step()
    watched.ranks.rings.append(silent)
    assert watched.look() == 0
    assert watched.look(gone=(3,)) == 1


@pytest.mark.parametrize("kind", [LoadKind.GLOBAL_SLOTS, LoadKind.LOCAL_SLOTS])
def test_slot_counts_are_folded_across_commits(watch: Callable[..., Watched], spec: MoESpec, kind: LoadKind) -> None:
    """Slot counts fold to the logical load under the row of their own step, while a plan of three commits goes through."""
    watched = watch(kind=kind, num_windows=20)
    ranks = watched.ranks
    for _ in range(7):
        ranks.step()
    watched.look()
    entries, row_P = [], ranks.rows_LP[0].copy()
    for position in range(3):
        row_P = np.roll(row_P, 1)
        base = counter(1, position) if position else 0
        entries.append(PlanEntry(layer=0, base_version=base, slots=row_P.tobytes(), moves=b""))
    watched.publisher.publish(Plan(incarnation=1, generation=1, entries=entries), watched.words())
    for _ in range(33):
        ranks.step()
        watched.look()
    assert watched.publisher.active is None
    # records carry `decided`, which runs ahead of `committed`: the last may wait for one more look
    expected = per_step(ranks) if kind is LoadKind.GLOBAL_SLOTS else ranks.load_LE(0)
    assert len(watched.collector.windows) == 8
    for _, load_LE in watched.collector.windows:
        if kind is LoadKind.GLOBAL_SLOTS:
            np.testing.assert_array_equal(load_LE, 5 * expected)
        else:
            # each expert's load is counted by the one rank that has its last slot
            assert (np.abs(load_LE - 5 * expected) <= 5 * spec.num_ranks).all()
    assert not watched.collector.unfolded_L.any()


def test_records_that_cannot_be_folded_are_counted_per_layer(stand_in: Make, spec: MoESpec) -> None:
    """Layers whose row at a record's version is unknown get nothing of it; the others do."""
    ranks = stand_in(kind=LoadKind.GLOBAL_SLOTS)
    versions = np.array([counter(1, 3), 0, 0])
    rows = RowHistory(ranks.rows_LP, versions, counter(2, 0))
    collector = Collector(spec, {0: LoadRing.open(ranks.info.group, 0, 1)}, rows, (5, 4))
    for _ in range(5):
        ranks.step()
    collector.drain(0, lambda: 100)
    collector.complete(())
    assert collector.unfolded_L.tolist() == [5, 0, 0]
    assert collector.windows[0][1].sum(axis=1).tolist() == [0, *2 * [5 * ranks.load_LE(0)[0].sum()]]
    collector.close()


@pytest.mark.parametrize("damage", ["negative", "backwards", "future", "phase"])
def test_nonsense_is_counted_and_said_once(
    watch: Callable[..., Watched], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """Negative counts, steps that go back or lie in the future and unknown phases are damaged, never loads."""
    watched = watch()
    ring, ranks = watched.ranks.rings[2], watched.ranks
    for _ in range(3):
        ranks.step()
    counts = ring.begin({"backwards": 1, "future": 99}.get(damage, 3), Phase.DECODE, 0, 1)
    counts[:] = -1 if damage == "negative" else 10**6
    if damage == "phase":
        ring._fields[3, 1] = 77
    ring.publish()
    ranks.step_number = 4
    with caplog.at_level(logging.ERROR):
        watched.look()
        watched.look()
    assert [ring.num_damaged for ring in watched.collector.statistics()] == [0, 0, 1, 0]
    assert caplog.text.count("damaged record") == 1
    found = [load.max() for loads in watched.collector.phases._open.values() for load in loads.values()]
    assert 0 < max(found) < 10**5


def test_other_window_length_forgets_the_old_windows(watch: Callable[..., Watched]) -> None:
    """Windows of two lengths are not mixed; collection goes on with the first whole new one."""
    watched = watch()
    for _ in range(12):
        watched.ranks.step()
    watched.look()
    watched.collector.resize(4, 2)
    assert len(watched.collector.windows) == 0
    for _ in range(13):
        watched.ranks.step()
    watched.look()
    np.testing.assert_array_equal(watched.collector.load.windows_TLE, [4 * per_step(watched.ranks)] * 2)


def test_records_of_a_placement_that_never_comes_are_given_up(watch: Callable[..., Watched]) -> None:
    """A damaged version holds a ring up for as many records as it has, not for ever; other windows are right."""
    watched = watch(kind=LoadKind.GLOBAL_SLOTS, ring_records=8, num_windows=20)
    watched.ranks.step()
    watched.look()
    ranks = watched.ranks
    ring = ranks.rings[1]
    for _ in range(40):
        ranks.step()
        if ranks.step_number == 7:
            ring._fields[(ring.num_published - 1) % 8, 2] |= 1 << 50
        watched.look()
    assert watched.collector.statistics()[1].num_unfolded > 0
    assert max(window for window, _ in watched.collector.windows) >= 6
    last = watched.collector.windows[-1][1]
    np.testing.assert_array_equal(last, 5 * per_step(ranks))


@pytest.mark.parametrize(
    ("serve", "steps"), [("all", [3, 3, 3]), ("prefill", [2, 3]), ("decode", [2, 2])], ids=["all", "prefill", "decode"]
)
def test_windows_hold_the_phases_that_are_served(
    watch: Callable[..., Watched], serve: Literal["all", "prefill", "decode"], steps: list[int]
) -> None:
    """Mixed steps are of both, dummy and profile ones of none; all are told. A window without such a step is left out."""
    watched = watch(num_windows=8)
    watched.collector.serve(weights_of(DaemonSettings(serve=serve)))
    windows = [
        [Phase.PREFILL, Phase.DECODE, Phase.MIXED, Phase.DUMMY, Phase.PROFILE],
        [Phase.PREFILL, Phase.PREFILL, Phase.PREFILL, Phase.DUMMY, Phase.DUMMY],
        [Phase.DECODE, Phase.DECODE, Phase.DUMMY, Phase.PROFILE, Phase.DUMMY],
    ]
    if serve == "all":
        windows[2][2] = Phase.DECODE
    for phase in chain.from_iterable(windows):
        watched.ranks.step(phase)
    watched.ranks.step()
    watched.look()
    found = [load_LE // per_step(watched.ranks) for _, load_LE in watched.collector.windows]
    assert [int(times.max()) for times in found] == steps
    assert watched.collector.phases.steps["prefill"] == 4 * watched.ranks.words.num_ranks
    assert watched.collector.phases.steps["profile"] == 2 * watched.ranks.words.num_ranks


def test_other_phases_begin_new_windows(watch: Callable[..., Watched]) -> None:
    """What was collected of other steps is forgotten; asking for the same again forgets nothing."""
    watched = watch(num_windows=8)
    for _ in range(10):
        watched.ranks.step(Phase.DECODE)
    watched.look()
    watched.collector.serve(weights_of(DaemonSettings()))
    assert watched.collector.windows
    watched.collector.serve(weights_of(DaemonSettings(serve="decode")))
    assert not watched.collector.windows
    for _ in range(12):
        watched.ranks.step(Phase.DECODE)
    assert watched.look() >= 1
    np.testing.assert_array_equal(watched.collector.windows[0][1], 5 * per_step(watched.ranks))


def test_windows_know_how_long_their_steps_took(watch: Callable[..., Watched]) -> None:
    """Mean over the served steps whose time was told; times go with their window, and are forgotten with it."""
    watched = watch(num_windows=2)
    for step in range(16):
        watched.ranks.step(Phase.DECODE, 1000 * step)
    watched.look()
    assert list(watched.collector.load.times) == [1, 2]
    times = watched.collector.load.times[2]
    # of step 10 the record of step 11 tells
    assert (times.num_steps, times.num_timed, times.step_us) == (5, 5, 13_000.0)
    watched.collector.serve(weights_of(DaemonSettings(serve="decode")))
    assert not watched.collector.load.times


@pytest.mark.parametrize("kind", [LoadKind.LOGICAL, LoadKind.GLOBAL_SLOTS])
def test_a_mix_of_phases_and_each_of_them(watch: Callable[..., Watched], kind: LoadKind) -> None:
    """Prefill counts a quarter, decode and mixed steps whole; each phase has its own steps, tokens, windows and PAR."""
    watched = watch(num_windows=2, prefill_times=8.0, kind=kind)
    ranks, loads = watched.ranks, watched.collector.phases
    watched.collector.serve(weights_of(DaemonSettings(prefill_weight=0.25)))
    for phase in (Phase.PREFILL, Phase.DECODE, Phase.DECODE, Phase.PREFILL, Phase.MIXED) * 4:
        ranks.step(phase)
    watched.look()
    of_prefill, of_decode = (
        np.sum([ranks.load_LE(rank, phase=phase) for rank in range(ranks.words.num_ranks)], axis=0)
        for phase in (Phase.PREFILL, Phase.DECODE)
    )
    expected_LE = 0.25 * 2 * of_prefill + 3 * of_decode
    for _, load_LE in watched.collector.windows:
        assert np.abs(load_LE - expected_LE).max() < 1
    found = {status.phase: status for status in watched.collector.phase_status(watched.publisher)}
    assert [(status.steps, status.windows) for status in found.values()] == [(32, 2), (32, 2), (16, 2)]
    assert found["prefill"].tokens == 8 * found["decode"].tokens == 32 * 8000
    assert [status.weight for status in found.values()] == [0.25, 1.0, 1.0]
    assert found["decode"].par_live == found["mixed"].par_live
    assert found["prefill"].par_live == pytest.approx(par_of(ranks, of_prefill))
    assert found["decode"].par_live == pytest.approx(par_of(ranks, of_decode))
    assert found["prefill"].par_live != pytest.approx(found["decode"].par_live)
    # a phase that stops is not live any more
    for _ in range(15):
        ranks.step(Phase.DECODE)
    watched.look()
    assert {status.phase: status.windows for status in watched.collector.phase_status(watched.publisher)} == {
        "prefill": 0,
        "decode": 2,
        "mixed": 0,
    }
    assert loads.steps["prefill"] == 32


def par_of(ranks: StandInGroup, load_LE: np.ndarray) -> float:
    """Mean PAR under the initial placement."""
    return float(par(rank_load(load_LE, ranks.rows_LP, ranks.info.spec.topology)).mean())

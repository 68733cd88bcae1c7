"""Step times go to the step that they are of, pauses are not counted, and ranks are not added up."""

import numpy as np

from eplb_async.core.load import Phase
from eplb_async.runtime.step_times import StepTimes, WindowTimes
from eplb_async.shm.ring import PHASES, Batch

ALL = np.array([phase.counts for phase in PHASES])
DECODE = np.array([phase is Phase.DECODE for phase in PHASES])


def batch(
    first: int, previous_us: list[int], phases: str = "", versions: tuple[int, ...] = (), pulled: int = 0
) -> Batch:
    """Records from step `first` on; phases by their first letter (u: dummy), decode by default."""
    num = len(previous_us)
    letters = {"p": Phase.PREFILL, "d": Phase.DECODE, "u": Phase.DUMMY}
    return Batch(
        step=np.arange(first, first + num),
        phase=np.array([PHASES.index(letters[letter]) for letter in phases or "d" * num]),
        version=np.array(versions or [5] * num),
        tokens=np.ones(num, dtype=np.int64),
        counts=np.zeros((num, 1, 1), dtype=np.int32),
        lost=0,
        previous_us=np.array(previous_us),
        pulled=np.full(num, pulled),
    )


def test_the_example_of_the_module() -> None:
    """A time is that of the record before, also over the end of a window and of a batch."""
    times = StepTimes()
    times.add(0, batch(8, [0, 10_000, 11_000], "ddp"), 10, DECODE)
    times.add(0, batch(11, [90_000]), 10, DECODE)
    assert times.close(0) == WindowTimes(num_steps=2, num_timed=2, step_us=10_500.0, versions=((0, 5),))
    assert times.close(1) == WindowTimes(num_steps=1, versions=((0, 5),))


def test_pauses_are_left_out() -> None:
    """One wait of a second among steps of 10 ms is no step; prompts are told from it by their phase."""
    times = StepTimes()
    times.add(0, batch(0, [0, *[10_000] * 8, 1_000_000, 10_000, 200_000, 0], "ddddddddddpdd"), 13, ALL)
    found = times.close(0)
    assert (found.num_steps, found.num_timed, found.step_us) == (13, 10, (9 * 10_000 + 200_000) / 10)


def test_ranks_count_once() -> None:
    """The slowest rank's mean, the sum of what all pulled, one commit for all; a rank that served less counts for less."""
    times = StepTimes()
    times.add(0, batch(0, [0, 100, 100, 100], versions=(5, 5, 6, 7), pulled=3), 4, ALL)
    times.add(1, batch(0, [0, 120, 120, 120], "dddu", versions=(5, 5, 6, 7), pulled=2), 4, ALL)
    versions = ((0, 5), (2, 6), (3, 7))
    assert times.close(0) == WindowTimes(
        num_steps=4, num_timed=3, step_us=120.0, pulled_bytes=20, num_commits=2, versions=versions
    )


def test_placements_are_told_with_their_steps() -> None:
    """From which step of the window on each was live, over the ends of batches and windows."""
    times = StepTimes()
    times.add(0, batch(0, [0, 1, 1], versions=(5, 5, 6)), 4, ALL)
    times.add(0, batch(3, [1, 1, 1, 1], versions=(7, 8, 8, 9)), 4, ALL)
    assert times.close(0).versions == ((0, 5), (2, 6), (3, 7))
    assert times.close(1).versions == ((0, 8), (0, 8), (2, 9))
    assert times.close(2).versions == ()


def test_what_is_unknown_or_damaged_has_no_time() -> None:
    """No time was told, the record before is missing, or the number is nonsense; bytes that are nonsense are none."""
    times = StepTimes()
    times.add(0, batch(0, [0, 0, -5, 1 << 60], pulled=1 << 50), 10, ALL)
    times.add(0, batch(6, [100, 200], pulled=-1), 10, ALL)
    found = times.close(0)
    assert (found.num_steps, found.num_timed, found.step_us, found.pulled_bytes) == (6, 1, 200.0, 0)


def test_steps_of_phases_that_are_not_served_have_no_time() -> None:
    """A prompt among decode steps, told within one batch."""
    times = StepTimes()
    times.add(0, batch(0, [0, 100, 900, 100, 100], "dpddd"), 5, DECODE)
    found = times.close(0)
    assert (found.num_steps, found.num_timed, found.step_us) == (4, 3, 100.0)


def test_a_record_that_is_missing_takes_its_time_with_it() -> None:
    """Within a batch, too: damaged records are left out before."""
    times, whole = StepTimes(), batch(0, [0, 100, 100, 300, 100])
    times.add(0, whole.part(np.array([True, True, False, True, True])), 5, ALL)
    found = times.close(0)
    assert (found.num_timed, found.step_us) == (2, 100.0)


def test_closed_windows_stay_closed() -> None:
    """The time of a window's last step that comes too late is not counted elsewhere; nothing is kept over a new beginning."""
    times = StepTimes()
    times.add(0, batch(0, [0, 100]), 2, ALL)
    assert times.close(0).num_timed == 1
    times.add(0, batch(2, [100, 100]), 2, ALL)
    assert times.close(1).num_timed == 1
    times.add(0, batch(4, [100]), 2, ALL)
    times.clear()
    assert times.close(2) == WindowTimes()

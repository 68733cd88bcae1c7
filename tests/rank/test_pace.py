"""Slow steps are noticed, and what lasts becomes the usual."""

from eplb_async.core.load import Phase
from eplb_async.rank.pace import StepClock, StepPace

MS = 1_000_000


def calm(pace: StepPace, steps: list[tuple[Phase, int]]) -> list[bool]:
    """What is said at the beginning of each step, given (phase, milliseconds) of the steps, and at the end."""
    now, said = 0, []
    for phase, took_ms in steps:
        said.append(pace.step(phase, now))
        now += took_ms * MS
    said.append(pace.step(Phase.DECODE, now))
    return said


def test_a_slow_step_is_told_from_usual_ones() -> None:
    """The step after it is not calm, the next one is again."""
    steps = [(Phase.DECODE, 10), (Phase.DECODE, 11), (Phase.DECODE, 20), (Phase.DECODE, 10)]
    assert calm(StepPace(1.5), steps) == [True, True, True, False, True]


def test_phases_have_usual_steps_of_their_own() -> None:
    """A long prefill among decode steps is as usual."""
    steps = [(Phase.DECODE, 10), (Phase.PREFILL, 90), (Phase.DECODE, 10), (Phase.PREFILL, 95), (Phase.DECODE, 10)]
    assert all(calm(StepPace(1.5), steps))


def test_what_lasts_becomes_usual() -> None:
    """Steps twice as long for good hold transfers up for a while, not for ever."""
    said = calm(StepPace(1.5), [(Phase.DECODE, 10)] * 3 + [(Phase.DECODE, 20)] * 30)
    assert said[5:8] == [False] * 3
    assert all(said[15:])


def test_zero_ratio_never_waits() -> None:
    """Switched off."""
    assert all(calm(StepPace(0.0), [(Phase.DECODE, 10), (Phase.DECODE, 1000), (Phase.DECODE, 1)]))


def test_a_step_is_timed_from_its_begin_to_the_next() -> None:
    """The first has none before it; what the engine says goes before the clock, also that it is not to be counted."""
    clock = StepClock()
    begins = [(5 * MS, None), (15 * MS, None), (40 * MS, 9_000.7), (41 * MS, 0.0), (43 * MS, None)]
    assert [clock.begin(at, measured) for at, measured in begins] == [0, 10_000, 9_000, 0, 2_000]

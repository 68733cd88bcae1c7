"""When a decision is due."""

import dataclasses

import pytest

from eplb_async.runtime.trigger import TriggerState, decide

__all__: list[str] = []

DUE = TriggerState(steps=100, interval_steps=100, num_windows=1, par_live=1.2, par_threshold=1.1)


def test_due_names_the_numbers() -> None:
    """After the interval, with a window and PAR above the threshold, the reason says what was seen."""
    assert decide(DUE) == "PAR 1.200 > 1.1 after 100 steps"


@pytest.mark.parametrize("change", [{"steps": 99}, {"num_windows": 0}, {"par_live": 1.1}, {"paused": True}])
def test_each_condition_is_needed(change: dict[str, float]) -> None:
    """Too early, no complete window, PAR not above the threshold, or paused: no decision."""
    assert decide(dataclasses.replace(DUE, **change)) is None  # type: ignore[arg-type]


def test_operator_always_fires() -> None:
    """An operator's request needs none of it, not even a daemon that is not paused."""
    state = TriggerState(
        requested="operator", paused=True, steps=0, interval_steps=9, num_windows=0, par_live=1, par_threshold=2
    )
    assert decide(state) == "operator"

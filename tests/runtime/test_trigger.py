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


DRIFTED = dataclasses.replace(DUE, steps=50, min_gap_steps=50, par_newest=1.3, par_reached=1.15, par_drift=0.1)


def test_drift_fires_before_the_interval_is_over() -> None:
    """PAR of the newest window well above the least since the last decision, after the minimum gap."""
    assert decide(DRIFTED) == "PAR rose from 1.150 to 1.300 in 50 steps"


@pytest.mark.parametrize(
    "change", [{"steps": 49}, {"par_newest": 1.26}, {"par_threshold": 1.31}, {"par_reached": 1e9}, {"paused": True}]
)
def test_drift_needs_each_condition(change: dict[str, float]) -> None:
    """Within the gap, risen too little (hysteresis), still below the threshold, nothing to compare with, or paused: no decision."""
    assert decide(dataclasses.replace(DRIFTED, **change)) is None  # type: ignore[arg-type]


def test_operator_always_fires() -> None:
    """An operator's request needs none of it, not even a daemon that is not paused."""
    state = TriggerState(
        requested="operator", paused=True, steps=0, interval_steps=9, num_windows=0, par_live=1, par_threshold=2
    )
    assert decide(state) == "operator"


@pytest.mark.parametrize("due", [DUE, DRIFTED])
def test_load_that_has_not_changed_is_not_decided_on_again(due: TriggerState) -> None:
    """Neither by schedule nor for a rise of PAR, which is noise then; an operator still gets a decision."""
    same = dataclasses.replace(due, load_change=1.1, least_change=2.0)
    assert decide(same) is None
    assert decide(dataclasses.replace(same, load_change=2.1)) is not None
    assert decide(dataclasses.replace(same, requested="operator")) == "operator"

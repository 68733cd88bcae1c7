"""The life of a gain is what past plans still brought, window after window."""

from typing import Any

import numpy as np
import pytest

from eplb_async.runtime.gain_life import AGES, GainLife, PastPlan

__all__: list[str] = []

WINDOW_STEPS = 50


def par_of(load_NE: Any, rows_NP: Any, share_NP: Any) -> Any:
    """PAR is the first number of the load for old rows (0) and 1 for new ones."""
    return np.where(rows_NP[:, 0] == 0, load_NE[:, 0], 1.0)


def plan(predicted: float, layers: list[int]) -> PastPlan:
    before = np.zeros((len(layers), 2), dtype=np.int32)
    return PastPlan(layers=layers, predicted=predicted, before_NP=before, after_NP=before + 1)


def life_after(gains: list[float], plans: int) -> float:
    """Plans one after the other, each bringing these shares of what was predicted in the windows after it."""
    life = GainLife(par_of, WINDOW_STEPS)
    for _ in range(plans):
        life.follow(plan(2 * 0.5, [0, 2]))
        for gain in gains:
            life.window(np.array([[1 + 0.5 * gain], [9.0], [1 + 0.5 * gain]]))
    return life.windows


def test_the_worked_example() -> None:
    """All of the gain, half of it, a quarter, then nothing: 1.75 windows, once there were many plans."""
    gains = [1.0, 0.5, 0.25] + [0.0] * (AGES - 3)
    assert life_after(gains, 60) == pytest.approx(1.75, abs=0.1)


def test_gains_that_stay_live_long_and_lost_ones_not_at_all() -> None:
    """What is still all there after all ages lives for longer than those; a plan that brings nothing, or harm, has no life."""
    assert life_after([1.0] * AGES, 60) > 2 * AGES
    assert life_after([0.0] * AGES, 80) < 0.1
    assert life_after([-1.0] * AGES, 80) == 0


def test_nothing_known_yet() -> None:
    """Before the first plan there is a guess, which one plan moves but does not replace."""
    prior = GainLife(par_of, WINDOW_STEPS).windows
    assert 8 < prior < 10
    assert 0.1 * prior < life_after([0.0] * AGES, 1) < 0.6 * prior
    assert life_after([], 1) == prior


@pytest.mark.parametrize("window_steps", [30, 50, 100, 1000])
def test_what_is_guessed_is_the_same_for_all_windows(window_steps: int) -> None:
    """Some 450 steps, whatever steps are summed into a window; of very short ones, what 16 of them can tell."""
    assert GainLife(par_of, window_steps).windows * window_steps == pytest.approx(450, rel=0.01)
    assert 30 < GainLife(par_of, 10).windows < 45


def test_plans_that_gain_nothing_are_not_followed() -> None:
    """A plan made for its tables alone has no gain to compare with."""
    life = GainLife(par_of, WINDOW_STEPS)
    life.follow(plan(0.0, [0]))
    before = life.windows
    life.window(np.array([[5.0]]))
    assert life.windows == before

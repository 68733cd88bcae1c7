"""The fit finds what windows were made of, says how sure it is, and is not led astray by odd ones."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_async.core.cost import FIRST, CostFit, StepCost, _solve

__all__: list[str] = []

TRUE = (4.0, 4e-6, 2e-9, 0.3, 4e-6)
"""Of a step of 10 ms with a million tokens on the busiest rank and half of that on each; a GiB takes 2 ms, a commit 0.3."""


def fitted(
    num: int, noise: float = 0.0, true: Sequence[float] = TRUE, seed: int = 0, moving: float = 0.3, vary: float = 0.1
) -> CostFit:
    """Windows of these costs: batches that differ by a fifth, balance that varies, and a share of windows in which something moves."""
    random, fit = np.random.default_rng(seed), CostFit()
    for _ in range(num):
        even, moves = 5e5 * (0.8 + 0.4 * random.random()), random.random() < moving
        tokens = 2 * even * (1 + vary * random.standard_normal())
        num_bytes, commits = (1e8 * random.random(), random.random()) if moves else (0.0, 0.0)
        time_ms = true[0] + true[1] * tokens + true[2] * num_bytes + true[3] * commits + true[4] * even
        fit.add(tokens, even, num_bytes, commits, time_ms * (1 + noise * random.standard_normal()))
    return fit


def cost_of(fit: CostFit) -> StepCost:
    """There is one."""
    assert fit.cost is not None
    return fit.cost


def test_the_example_of_the_module() -> None:
    """Three windows, four times; bytes and commits were never seen."""
    fit = CostFit()
    for _ in range(4):
        for tokens, step_ms in ((1000, 10.0), (1200, 10.4), (1400, 10.8)):
            fit.add(tokens, 500, 0, 0, step_ms)
    cost = cost_of(fit)
    assert (cost.fixed_ms, cost.token_ms) == pytest.approx((8.0, 0.002), rel=1e-4)
    assert cost.errors[2:] == (np.inf, np.inf, np.inf)
    assert (cost.byte_ms, cost.commit_ms, cost.even_ms) == (0, 0, 0)
    assert cost.parts_ms == pytest.approx((8.0, 2.4, 0, 0, 0), rel=1e-2)
    assert cost.known


@given(seed=st.integers(0, 1000), true=st.tuples(*[st.floats(0.2, 5)] * 5))
def test_what_windows_are_made_of_is_found(seed: int, true: tuple[float, ...]) -> None:
    """Without noise, to a thousandth."""
    true = tuple(np.array(TRUE) * true)
    cost = cost_of(fitted(100, true=true, seed=seed))
    found = (cost.fixed_ms, cost.token_ms, cost.byte_ms, cost.commit_ms, cost.even_ms)
    assert found == pytest.approx(true, rel=1e-3)


def test_standard_errors_are_what_estimates_scatter_by() -> None:
    """Over 80 fits on other noise, of 2 %: each coefficient within two of its errors in nineteen of twenty."""
    found = [cost_of(fitted(250, 0.02, seed=seed)) for seed in range(80)]
    values = np.array([(one.fixed_ms, one.token_ms, one.byte_ms, one.commit_ms, one.even_ms) for one in found])
    errors = np.array([one.errors for one in found])
    within = (np.abs(values - TRUE) < 2 * errors).mean(axis=0)
    assert (within > 0.9).all(), within
    assert np.median(errors, axis=0) == pytest.approx(values.std(axis=0), rel=0.35)


def test_nothing_is_negative() -> None:
    """Commits that seem to make steps shorter cost nothing."""
    cost = cost_of(fitted(200, 0.01, true=(6.0, 4e-6, 0.0, -0.5, 0.0)))
    assert cost.commit_ms == 0.0
    assert min(cost.fixed_ms, cost.token_ms, cost.byte_ms) >= 0


def test_of_coefficients_that_are_not_negative_the_best_are_found() -> None:
    """Against all choices of which are zero, by their squared distance; random inputs whose best are mostly negative somewhere."""
    random = np.random.default_rng(0)
    for _ in range(100):
        inputs, time = random.standard_normal((20, 5)) + np.eye(5)[0] * 3, 5 + random.standard_normal(20)
        found = _solve(inputs.T @ inputs, inputs.T @ time)
        rests = []
        for number in range(1, 32):
            at = [index for index in range(5) if number >> index & 1]
            part = np.zeros(5)
            part[at] = np.linalg.lstsq(inputs[:, at], time, rcond=None)[0]
            if (part >= 0).all():
                rests.append(float(((time - inputs @ part) ** 2).sum()))
        assert (found >= 0).all()
        assert float(((time - inputs @ found) ** 2).sum()) == pytest.approx(min(rests), rel=1e-6)


def test_tokens_that_do_not_vary_are_unknown() -> None:
    """Their share of a step cannot be told then, whatever the number of windows; batches that differ, and a little variation within noise do not help."""
    assert not cost_of(fitted(300, 0.01, vary=0.0)).known
    assert not cost_of(fitted(300, 0.05, vary=0.002)).known
    assert cost_of(fitted(300, 0.01)).known


def test_nothing_is_said_of_a_few_windows() -> None:
    """Before the first fit there is none."""
    assert fitted(FIRST - 1).cost is None
    assert fitted(FIRST - 1).num_windows == FIRST - 1
    assert cost_of(fitted(FIRST)).num_windows == FIRST


@pytest.mark.parametrize("first", [True, False])
def test_odd_windows_do_little(first: bool) -> None:
    """One in twelve is five times as long as it should be, also among the first: the fit stays within 10 %."""
    random, fit = np.random.default_rng(3), CostFit()
    for number in range(240):
        tokens = 1e6 * (1 + 0.2 * random.standard_normal())
        odd = number % 12 == (5 if first else 11)
        fit.add(tokens, 5e5, 0, 0, (6 + 4e-6 * tokens) * (5 if odd else 1) * (1 + 0.01 * random.standard_normal()))
    cost = cost_of(fit)
    assert (cost.fixed_ms, cost.token_ms) == pytest.approx((6, 4e-6), rel=0.1)


def test_what_changes_is_followed() -> None:
    """Steps are 3 ms longer from now on: after some memories the fixed part says so, and tokens cost what they did."""
    random, fit = np.random.default_rng(1), CostFit()
    for number in range(1200):
        tokens = 1e6 * (1 + 0.1 * random.standard_normal())
        fit.add(tokens, 5e5, 0, 0, (6 if number < 400 else 9) + 4e-6 * tokens + 0.05 * random.standard_normal())
    cost = cost_of(fit)
    assert cost.fixed_ms == pytest.approx(9, rel=0.05)
    assert cost.token_ms == pytest.approx(4e-6, rel=0.1)


def test_costs_count_as_far_as_they_are_sure() -> None:
    """A plan of a GiB in ten commits costs 5 ms; nothing, where nothing was ever moved, or where it may as well be noise."""
    sure = cost_of(fitted(200, 0.001))
    assert sure.moving_ms(1e9, 10) == pytest.approx(5.0, rel=0.1)
    assert cost_of(fitted(200, 0.001, moving=0.0)).moving_ms(1e9, 10) == 0.0
    unsure = cost_of(fitted(60, 0.5))
    assert unsure.byte_ms < 2 * unsure.errors[2]
    assert unsure.moving_ms(1e9, 0) == 0.0

"""The fit of step times in a replay finds the replay's own cost model, and plans that cost more time than they save are not made."""

from typing import Any

import numpy as np
import pytest

from eplb_async.core.config import load_settings
from eplb_async.core.cost import StepCost
from eplb_async.core.daemon_settings import EAGER
from eplb_async.core.spec import MoESpec
from eplb_async.observability.history import Outcome
from eplb_async.observability.replay_report import ReplayReport
from eplb_async.runtime.replay import Replay, ReplayCosts, replay_all
from eplb_async.runtime.replay_trace import Stretch, StretchedTrace

__all__: list[str] = []

SPEC = MoESpec(num_layers=3, num_experts=16, num_ranks=4, num_redundant=4)
SLOT_BYTES = 1 << 20
HOOK = {"pull_bytes_per_step": 2 * SLOT_BYTES}
COSTS = {"token_us": 1.0, "fixed_us": 1000.0, "stall_us": 200.0, "decide_us": 3000.0}


def replayed(num_windows: int, costs: dict[str, float], **daemon: Any) -> tuple[StepCost, ReplayReport]:
    """Traffic that is another every 100 steps, planned for at every interval, whatever it costs."""
    load = [
        np.random.default_rng(seed).lognormal(0, 1.2, (SPEC.num_layers, SPEC.num_experts))
        for seed in range(num_windows)
    ]
    daemon = {
        **EAGER,
        "window_steps": 10,
        "num_windows": 2,
        "interval_steps": 40,
        "min_gain": 0.0,
        "weigh_time": True,
        **daemon,
    }
    settings = load_settings(environ={}, overrides={"daemon": daemon, "hook": HOOK})
    one = Replay("one", settings, SPEC, SLOT_BYTES, ReplayCosts(**{**COSTS, **costs}))
    stretch = Stretch(steps_per_window=100, tokens_per_step=4000)
    report = replay_all(StretchedTrace(1000 * np.stack(load), stretch), [one], lambda _: None)[0]
    assert one.cost is not None
    return one.cost, report


@pytest.mark.parametrize("mib_us", [0.0, 50.0])
def test_the_fit_finds_the_cost_model_of_the_replay(mib_us: float) -> None:
    """Tokens to 3 %: windows have the peak of sums, steps are as long as their own peaks, which the fixed part makes up for. Others as sure as they say."""
    cost, _ = replayed(12, {"mib_us": mib_us}, weigh_time=False)
    assert cost.known
    assert cost.token_ms == pytest.approx(1e-3, rel=0.03)
    assert cost.fixed_ms == pytest.approx(1.0, rel=0.15)
    assert abs(cost.commit_ms - 0.2) < 3 * cost.errors[3]
    assert abs(cost.byte_ms * (1 << 20) - mib_us / 1e3) < 3 * cost.errors[2] * (1 << 20)


def test_plans_that_cost_more_than_they_bring_are_not_made() -> None:
    """A MiB takes 50 ms: once that is known plans are refused, with their numbers. Less is moved, and less time is taken; where moves cost
    little, nothing is refused and all is as it was."""
    dear, cheap = {"mib_us": 50_000.0}, {"mib_us": 0.0}
    _, free = replayed(12, dear, weigh_time=False)
    _, weighed = replayed(12, dear)
    refused = [one for one in weighed.decisions if one.why.startswith("would cost more than it brings")]
    assert refused
    assert all(one.outcome is Outcome.NOTHING_PAYS and one.cost_fit and one.moving_ms for one in refused)
    assert weighed.bytes_moved < 0.5 * free.bytes_moved
    assert weighed.total_s < free.total_s
    _, free = replayed(12, cheap, weigh_time=False)
    _, weighed = replayed(12, cheap)
    assert [one.step for one in weighed.decisions] == [one.step for one in free.decisions]
    assert weighed.bytes_moved == free.bytes_moved


def test_decisions_say_what_time_they_save() -> None:
    """Predicted per step, and how long steps were before and after, for each plan that was judged once the fit is there."""
    _, report = replayed(12, {})
    judged = [one for one in report.decisions if one.verdict and one.saved_ms_per_step is not None]
    assert len(judged) > 3
    for one in judged:
        assert one.saved_ms_per_step is not None
        assert one.saved_ms_per_step > 0
        assert one.step_ms_before is not None
        assert one.step_ms_after is not None
        assert 1 < one.step_ms_after < 20
        assert "windows: tokens are" in one.cost_fit

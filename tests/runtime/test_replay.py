"""A replay follows the daemon's own decisions on the trace's steps, and measures what was live."""

from typing import Any

import msgspec
import numpy as np
import pytest

from eplb_async.core.config import DaemonSettings, Settings, load_settings
from eplb_async.core.daemon_settings import EAGER
from eplb_async.core.placement import initial_placement
from eplb_async.core.score import par, rank_load
from eplb_async.core.spec import MoESpec
from eplb_async.observability.history import Outcome
from eplb_async.observability.replay_report import ReplayReport
from eplb_async.runtime.replay import Replay, ReplayCosts, replay_all
from eplb_async.runtime.replay_trace import Stretch, StretchedTrace

__all__: list[str] = []

SPEC = MoESpec(num_layers=3, num_experts=16, num_ranks=4, num_redundant=4)
DAEMON: dict[str, Any] = {**EAGER, "window_steps": 10, "num_windows": 2, "interval_steps": 40, "min_gain": 0.0}
HOOK: dict[str, Any] = {"pull_bytes_per_step": 200}


def skewed(seed: int, num_windows: int = 1) -> np.ndarray:
    """Windows of loads, all alike but for the experts that are hot."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.lognormal(0, 1.2, (SPEC.num_layers, SPEC.num_experts)) * 1000 for _ in range(num_windows)])


def settings_of(**daemon: Any) -> Settings:
    return load_settings(environ={}, overrides={"daemon": {**DAEMON, **daemon}, "hook": HOOK})


def replayed(
    trace_TLE: np.ndarray, settings: Settings, stretch: Stretch, costs: ReplayCosts | None = None
) -> ReplayReport:
    one = Replay("one", settings, SPEC, 100, costs or ReplayCosts())
    return replay_all(StretchedTrace(trace_TLE, stretch), [one], lambda _: None)[0]


STRETCH = Stretch(steps_per_window=100, tokens_per_step=4000)


def test_nothing_moves_below_the_threshold() -> None:
    """PAR is then that of the initial placement on each step's own load; time and ideal are the cost model's."""
    trace_TLE = skewed(1)
    report = replayed(trace_TLE, settings_of(par_threshold=1e9), STRETCH, ReplayCosts(token_us=2.0, fixed_us=10.0))
    steps_TLE = np.concatenate([piece.first_KLE for piece in StretchedTrace(trace_TLE, STRETCH).spans()])
    load_TLR = rank_load(steps_TLE, initial_placement(SPEC), SPEC.topology)
    assert report.par_mean == report.par_initial == pytest.approx(float(par(load_TLR).mean()))
    assert report.par_p99 == pytest.approx(float(np.quantile(par(load_TLR).mean(axis=1), 0.99)))
    assert report.total_s == pytest.approx((2.0 * load_TLR.max(axis=2).sum() + 100 * 10.0) / 1e6)
    assert report.ideal_s == pytest.approx((2.0 * load_TLR.mean(axis=2).sum() + 100 * 10.0) / 1e6)
    assert (report.num_steps, report.num_decisions, report.bytes_moved, report.stall_s) == (100, 0, 0, 0)


@pytest.mark.parametrize("options", [{}, {"dispatch": "weighted"}])
def test_a_plan_takes_effect_when_it_is_committed(options: dict[str, str]) -> None:
    """The first plan is triggered at the first window after the interval; then PAR falls; bytes, stalls and reasons are told."""
    costs = ReplayCosts(fixed_us=1000.0, decide_us=3000.0, stall_us=70.0)
    report = replayed(skewed(1), settings_of(policy_options=options), STRETCH, costs)
    first = report.decisions[0]
    assert (first.step, first.outcome) == (40, Outcome.FINISHED)
    assert first.trigger.startswith("PAR ")
    values = dict(report.series)
    assert np.mean([values[step] for step in range(41)]) == pytest.approx(report.par_initial, rel=0.02)
    assert np.mean([values[step] for step in range(60, 100)]) < 0.8 * report.par_initial
    assert first.decide_s is not None
    assert 0.003 <= first.decide_s < 0.006
    assert first.par_realised == pytest.approx(first.par_predicted, rel=0.1)
    assert report.bytes_moved == 100 * report.moves == sum(plan.bytes_moved for plan in report.decisions)
    commits = sum(plan.num_committed for plan in report.decisions)
    assert report.stall_s == pytest.approx(70e-6 * commits)
    assert commits >= 3


OURS: dict[str, Any] = {
    **msgspec.structs.asdict(DaemonSettings()),
    "window_steps": 10,
    "num_windows": 8,
    "interval_steps": 20,
    "min_gain": 0.0,
}
"""The defaults, on shorter windows."""
LONG = Stretch(steps_per_window=1000, tokens_per_step=4000)
FOUR_THOUSAND = Stretch(steps_per_window=4000, tokens_per_step=400)


@pytest.mark.parametrize("tokens", [4000, 40_000])
def test_nothing_moves_after_the_first_plan_while_traffic_stays(tokens: int) -> None:
    """One window of shares, sampled for long: one plan as soon as the gain is certain, and no decision after it."""
    report = replayed(skewed(1), settings_of(**OURS), Stretch(steps_per_window=1000, tokens_per_step=tokens))
    assert [plan.outcome for plan in report.decisions].count(Outcome.FINISHED) == 1
    assert report.decisions[-1].bytes_moved > 0
    assert report.decisions[-1].step < 100
    assert report.par_mean < 0.85 * report.par_initial


def test_gains_within_the_noise_are_waited_for() -> None:
    """With few tokens the first windows make no plan, which does not end it: more windows of the same traffic do."""
    few = Stretch(steps_per_window=1000, tokens_per_step=12)
    report = replayed(skewed(1) ** 0.7, settings_of(**{**OURS, "policy_options": {"noise": 0.0}}), few)
    outcomes = [plan.outcome for plan in report.decisions]
    assert outcomes[0] is Outcome.NOTHING_PAYS
    assert Outcome.FINISHED in outcomes
    assert report.decisions[-1].step < 200


@pytest.mark.parametrize(
    "one_setting",
    [
        {},
        {"policy": "default"},
        {"policy": "flashlb"},
        {"policy": "swift_balancer"},
        {"window_steps": 10},
        {"window_steps": 400},
        {"interval_steps": 1000},
        {"num_windows": 1},
    ],
)
def test_one_setting_alone_leaves_a_daemon_that_balances(one_setting: dict[str, Any]) -> None:
    """What a user sets who sets one thing: a skew that is worth its bytes to any policy is mended, and the traffic then left alone."""
    trace_TLE = skewed(1)
    trace_TLE[:, :, :2] *= 100
    report = replayed(trace_TLE, load_settings(environ={}, overrides={"daemon": one_setting}), FOUR_THOUSAND)
    assert 1 <= report.num_plans <= 2
    assert report.par_mean < 0.85 * report.par_initial


def test_moves_that_cost_too_much_may_pay_once_traffic_has_stayed() -> None:
    """A policy that moves much at once is asked again after twice the life that was too short, at half the price, until it pays."""
    settings = load_settings(environ={}, overrides={"daemon": {"policy": "default"}})
    report = replayed(skewed(1), settings, FOUR_THOUSAND)
    refused, paid = report.decisions
    assert (refused.step, refused.outcome, paid.outcome) == (100, Outcome.NOTHING_PAYS, Outcome.FINISHED)
    assert "daemon.move_cost" in refused.why
    assert 850 <= paid.step <= 950


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_few_tokens_make_few_plans(tokens: int) -> None:
    """Windows of few tokens are all different, and by chance far from even, where every slot has the same load: nothing moves for it."""
    trace_TLE = np.ones((1, 3, 16))
    trace_TLE[:, :, :4] = 2.0  # those with a second slot
    report = replayed(trace_TLE, load_settings(environ={}), Stretch(steps_per_window=4000, tokens_per_step=tokens))
    assert report.par_initial > 1.1
    assert report.moves <= 2


def test_traffic_that_changes_is_followed_when_it_does() -> None:
    """Another window of shares: a rise of PAR, not the schedule, brings the next plan, made from the new traffic."""
    report = replayed(skewed(1, 2), settings_of(**{**OURS, "interval_steps": 800, "min_gap_steps": 10}), LONG)
    changed = next(plan for plan in report.decisions if plan.step > 1000)
    assert changed.trigger.startswith("PAR rose from ")
    assert changed.step == 1010
    before, after = ([par for step, par in report.series if first <= step < first + 20] for first in (1000, 1080))
    assert np.mean(before) > 1.1 * np.mean(after)


def on_ranks(rows_LP: np.ndarray) -> np.ndarray:
    """The experts of each rank, in order: which of its slots they have does not matter."""
    return np.sort(rows_LP.reshape(SPEC.num_layers, SPEC.num_ranks, SPEC.slots_per_rank), axis=2)


def spiteful(settings: Settings) -> np.ndarray:
    """Two windows, the second of which turns against the plan made for the first: the experts that it put on the first rank are hot."""
    trace_TLE = np.concatenate([skewed(1), np.ones_like(skewed(1))])
    one = Replay("one", settings, SPEC, 100, ReplayCosts())
    replay_all(StretchedTrace(trace_TLE, STRETCH), [one], lambda _: None)
    history = one.report().decisions
    assert history[0].step == 100
    for layer, row_P in enumerate(one.rows_LP):
        trace_TLE[1, layer, row_P[: SPEC.slots_per_rank]] = 20.0
    return trace_TLE


def test_a_harmful_plan_is_taken_back_once() -> None:
    """Four windows after the commit tell; rows before are put back where they are better, and trust has fallen; without regret nothing is."""
    trace_TLE = spiteful(settings_of(interval_steps=100, regret_windows=0))
    one = Replay("one", settings_of(interval_steps=100), SPEC, 100, ReplayCosts())
    report = replay_all(StretchedTrace(trace_TLE, STRETCH), [one], lambda _: None)[0]
    assert np.array_equal(on_ranks(one.rows_LP), on_ranks(initial_placement(SPEC)))
    harmful, back = report.decisions[:2]
    assert harmful.step == 100
    assert harmful.verdict.startswith(("harmed", "did not pay"))
    assert harmful.trust_after == pytest.approx(0.7, abs=0.01)
    assert (back.reverts, back.outcome) == (0, Outcome.FINISHED)
    assert set(back.layers) <= set(harmful.layers)
    assert 140 <= back.step <= 170
    assert back.trust == pytest.approx(0.7, abs=0.01)
    assert back.par_realised is not None
    assert back.par_live is not None
    assert back.par_realised < back.par_live
    assert [plan.reverts for plan in report.decisions].count(0) == 1
    blind = replayed(trace_TLE, settings_of(interval_steps=100, regret_windows=0), STRETCH)
    assert all(plan.reverts is None and not plan.verdict and plan.trust == 1 for plan in blind.decisions)
    assert report.par_mean < blind.par_mean


def test_a_budget_holds_at_every_step() -> None:
    """No more bytes than earned so far and saved at the start; a tight budget moves less and balances worse."""
    trace_TLE, budget = skewed(5, 8), 4
    stretch = Stretch(steps_per_window=100, tokens_per_step=4000)
    often = {**OURS, "interval_steps": 20, "move_cost": 0.0}
    free = replayed(trace_TLE, settings_of(**often), stretch)
    tight = replayed(trace_TLE, settings_of(**{**often, "bytes_per_step": budget, "budget_steps": 50}), stretch)
    assert free.bytes_moved > 800 * budget
    moved = 0
    for plan in tight.decisions:
        moved += plan.bytes_moved
        assert moved <= budget * (50 + plan.step + 20)
    assert 0 < tight.bytes_moved < free.bytes_moved
    assert free.par_mean < tight.par_mean < tight.par_initial


def test_moving_has_to_pay() -> None:
    """A higher cost of moves moves less; an absurd one, nothing."""
    trace_TLE = skewed(5, 8)
    moved = [
        replayed(trace_TLE, settings_of(**{**OURS, "move_cost": cost}), STRETCH).moves for cost in (0.0, 50.0, 1e9)
    ]
    assert moved[0] > moved[1] > moved[2] == 0


def test_few_measured_steps_tell_the_same() -> None:
    """Measuring one step in two changes the mean PAR by no more than noise, and what is counted not at all."""
    trace_TLE = skewed(2, 3)
    each = replayed(trace_TLE, settings_of(), STRETCH)
    few = replayed(trace_TLE, settings_of(), Stretch(steps_per_window=100, tokens_per_step=4000, every=2))
    assert (few.num_steps, few.num_measured) == (300, 150)
    assert few.par_mean == pytest.approx(each.par_mean, rel=0.05)
    assert few.total_s == pytest.approx(each.total_s, rel=0.02)
    assert few.num_decisions == each.num_decisions


def test_replays_are_the_same_each_time() -> None:
    """Nothing of this machine gets in: neither clock nor order of configurations."""
    trace = StretchedTrace(skewed(3, 2), STRETCH)

    def course(*intervals: int) -> list[ReplayReport]:
        made = [Replay(str(n), settings_of(interval_steps=n), SPEC, 100, ReplayCosts()) for n in intervals]
        return sorted(replay_all(trace, made, lambda _: None), key=lambda report: report.name)

    assert course(40, 60) == course(60, 40)


def test_a_policy_that_fails_moves_nothing() -> None:
    """Its error is the decision's reason, and the replay goes on."""
    report = replayed(skewed(1), settings_of(policy="static", policy_options={"path": "/none.json"}), STRETCH)
    assert report.decisions[0].outcome is Outcome.FAILED
    assert "/none.json" in report.decisions[0].why
    assert report.bytes_moved == 0


def test_windows_consist_of_spans() -> None:
    """A configuration whose windows end inside a span cannot be replayed."""
    with pytest.raises(ValueError, match="windows of 10 steps"):
        replayed(skewed(1), settings_of(), Stretch(steps_per_window=100, every=4))

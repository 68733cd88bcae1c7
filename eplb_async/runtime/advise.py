"""What suits recorded traffic: redundancy, policy, interval and budget, found by replay; or that rebalancing does not pay here.

    first round     for each number of redundant experts: nothing moves, and our defaults
    second round    with the best number: other costs of a move, intervals and budgets, and vLLM's schedule
    advice          the least time; of those that come close to it the one with the fewest redundant experts and bytes

The measure is time in the cost model of the replay, against what is served without any balancing: as few redundant experts as divide over
the ranks, and the initial placement. Redundant experts cost memory, and time where each slot's weights are read (`slot_us`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.config import DaemonSettings, load_settings
from eplb_async.core.errors import SpecError
from eplb_async.observability.advice import Advice, Candidate
from eplb_async.observability.replay_report import ReplayReport
from eplb_async.runtime.offline import Shape
from eplb_async.runtime.offline_files import read_loads
from eplb_async.runtime.replay import ReplayCosts
from eplb_async.runtime.replay_presets import PRESETS
from eplb_async.runtime.replay_request import ReplayRequest, replay_loads

__all__ = ["AdviceRequest", "advise", "redundancies"]

CLOSE = 0.002
"""Of the time: as good as the best, if it takes fewer experts or bytes."""
MOST_NUMBERS = 4
"""Of redundant experts that are tried."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class AdviceRequest:
    """What is known of traffic and machines.

    Fields:
        loads: a file, or `offline_files.STANDARD_INPUT`.
        num_ranks, num_nodes, num_expert_groups: of the machines and the router.
        slot_bytes: of one expert in one layer.
        costs: what things take.
        slot_us: time that each slot of a rank adds to each layer of a step, whatever its load: its weights are read.
        most_redundant: experts; 0: a quarter of the model's.
        least_saving: share of the time for which rebalancing is worth running.
        steps_per_window, tokens_per_step, seed, every: see ReplayRequest.
    """

    num_ranks: int
    slot_bytes: int
    loads: str = ""
    num_nodes: int = 1
    num_expert_groups: int = 1
    costs: ReplayCosts = field(default_factory=ReplayCosts)
    slot_us: float = 0.0
    most_redundant: int = 0
    least_saving: float = 0.01
    steps_per_window: int = 1
    tokens_per_step: int = 0
    seed: int = 0
    every: int = 0


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """A configuration that was replayed: number of redundant experts, settings of the table `daemon`, what came of it."""

    redundant: int
    daemon: Mapping[str, Any]
    report: ReplayReport


def advise(request: AdviceRequest, progress: Progress = lambda *_: None) -> Advice:
    """Replay the trace with what might suit it; `progress` is told of the round, and of steps done and to do.

    Raises:
        ConfigError: the file, or `every` does not divide the windows' steps.
        SpecError: the numbers do not fit together.
    """
    trace_TLE = read_loads(request.loads)
    numbers = redundancies(trace_TLE.shape[2], request.num_ranks, request.most_redundant)
    tried: list[_Tried] = []
    for redundant in numbers:
        daemons = {"still": PRESETS["still"], "ours": PRESETS["ours"]}
        tried += _replayed(trace_TLE, request, redundant, daemons, progress)
    best = min(tried, key=_time_s)
    others = _variations(best.report if best.daemon is PRESETS["ours"] else None)
    tried += _replayed(trace_TLE, request, best.redundant, others, progress)
    return _advice(request, trace_TLE, tried)


def redundancies(num_experts: int, num_ranks: int, most: int = 0) -> list[int]:
    """Numbers of redundant experts to try, fewest first: the least that divides over the ranks, then one, two, four more for each rank.

    256 experts on 32 ranks: 0, 32, 64 (a quarter). 60 experts on 8 ranks: 4, 12.

    Raises:
        SpecError: not even the least is allowed.
    """
    least, limit = -num_experts % num_ranks, most or num_experts // 4
    numbers = [least, *(least + num_ranks * 2**power for power in range(MOST_NUMBERS - 1))]
    fitting = [number for number in numbers if number <= limit or (not most and number == least)]
    if not fitting:
        raise SpecError(
            f"{num_experts} experts need {least} redundant ones to divide over {num_ranks} ranks; allow them"
        )
    return fitting


def _variations(ours: ReplayReport | None) -> dict[str, Mapping[str, Any]]:
    """Settings to try beside our defaults; `ours`: what came of those, if they were the best."""
    defaults = DaemonSettings()
    found: dict[str, Mapping[str, Any]] = {
        "vllm": PRESETS["vllm"],
        "ours, moves cost half": {"move_cost": defaults.move_cost / 2},
        "ours, moves cost four times": {"move_cost": defaults.move_cost * 4},
        "ours, four times the interval": {"interval_steps": defaults.interval_steps * 4},
    }
    if ours is not None and ours.bytes_moved:
        found["ours, half the bytes"] = {"bytes_per_step": max(1, int(ours.bytes_per_step / 2))}
    return found


def _replayed(
    trace_TLE: NDArray[np.float64],
    request: AdviceRequest,
    redundant: int,
    daemons: Mapping[str, Mapping[str, Any]],
    progress: Progress,
) -> list[_Tried]:
    num_layers, num_experts = trace_TLE.shape[1:]
    shape = Shape(
        num_slots=num_experts + redundant,
        num_ranks=request.num_ranks,
        num_nodes=request.num_nodes,
        num_expert_groups=request.num_expert_groups,
    )
    reading_us = request.slot_us * num_layers * (shape.num_slots // shape.num_ranks)
    replays = ReplayRequest(
        configurations=[
            (name, load_settings(environ={}, overrides={"daemon": daemon})) for name, daemon in daemons.items()
        ],
        shape=shape,
        slot_bytes=request.slot_bytes,
        costs=replace(request.costs, fixed_us=request.costs.fixed_us + reading_us),
        steps_per_window=request.steps_per_window,
        tokens_per_step=request.tokens_per_step,
        seed=request.seed,
        every=request.every,
    )
    label = f"{redundant} redundant: {', '.join(daemons)}"
    reports = replay_loads(trace_TLE, replays, lambda done, total: progress(label, done, total))
    return [
        _Tried(redundant=redundant, daemon=daemon, report=report)
        for daemon, report in zip(daemons.values(), reports, strict=True)
    ]


def _time_s(tried: _Tried) -> float:
    return tried.report.total_s


def _advice(request: AdviceRequest, trace_TLE: NDArray[np.float64], tried: Sequence[_Tried]) -> Advice:
    baseline = tried[0]
    limit_s = min(map(_time_s, tried)) + CLOSE * _time_s(baseline)
    close = [one for one in tried if _time_s(one) <= limit_s]
    chosen = min(close, key=lambda one: (one.redundant, one.report.bytes_moved, _time_s(one)))
    saving = 1 - _time_s(chosen) / _time_s(baseline)
    if saving < request.least_saving:
        chosen = baseline
    candidates = [_candidate(one, baseline, request, trace_TLE.shape[1]) for one in tried]
    possible = 1 - baseline.report.ideal_s / _time_s(baseline)
    return Advice(
        rebalance=chosen.report.bytes_moved > 0,
        chosen=candidates[tried.index(chosen)],
        baseline=candidates[0],
        possible_saving=possible,
        least_saving=request.least_saving,
        reasons=_reasons(request, tried, chosen, possible, saving),
        candidates=candidates,
    )


def _candidate(tried: _Tried, baseline: _Tried, request: AdviceRequest, num_layers: int) -> Candidate:
    report, more = tried.report, tried.redundant - baseline.redundant
    return Candidate(
        name=report.name,
        redundant=tried.redundant,
        policy=report.policy,
        daemon=dict(tried.daemon),
        par_mean=report.par_mean,
        par_p99=report.par_p99,
        num_plans=report.num_plans,
        bytes_per_step=report.bytes_per_step,
        memory_bytes=more * num_layers * request.slot_bytes // request.num_ranks,
        total_s=report.total_s,
        stall_s=report.stall_s,
        saving=1 - report.total_s / _time_s(baseline),
    )


def _reasons(
    request: AdviceRequest, tried: Sequence[_Tried], chosen: _Tried, possible: float, saving: float
) -> list[str]:
    """Why this is the advice, in numbers."""
    baseline, least = tried[0].report, request.least_saving
    reasons = [
        f"without balancing the PAR is {baseline.par_mean:.3f}, and perfect balance would save {possible:.1%} of a step's time"
    ]
    if possible < least:
        cause = "the load is even" if baseline.par_mean < 1.05 else "experts are a small part of a step"
        return [*reasons, f"that is less than the {least:.1%} that balancing has to bring: {cause}"]
    if chosen is tried[0]:
        return [
            *reasons,
            f"the best of {len(tried)} configurations saves {saving:.1%}, less than {least:.1%}",
            _lost(tried),
        ]
    reasons.append(f"{chosen.report.name!r} with {chosen.redundant} redundant experts saves {saving:.1%}")
    if not chosen.report.bytes_moved:
        reasons.append("no placement that follows the load is faster than the initial one with that redundancy")
    fastest = min(tried, key=_time_s)
    if fastest is not chosen:
        more = 1 - _time_s(fastest) / baseline.total_s - saving
        reasons.append(
            f"the fastest, {fastest.report.name!r} with {fastest.redundant}, saves {more:.2%} more and moves "
            f"{fastest.report.bytes_per_step / 2**20:,.1f} MiB per step"
        )
    return reasons


def _lost(tried: Sequence[_Tried]) -> str:
    """Where the possible gain goes: the least PAR that was reached, and what redundancy costs."""
    least = min(tried, key=lambda one: one.report.par_mean)
    return (
        f"the least PAR reached is {least.report.par_mean:.3f} ({least.report.name!r} with {least.redundant} redundant experts), "
        f"at {least.report.total_s / _time_s(tried[0]):.1%} of the time: what the load of past windows says of the next, "
        "or what redundant experts cost, leaves no more"
    )

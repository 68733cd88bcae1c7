"""Planning without a daemon: recorded loads and a policy in, a new placement and how good it is out.

    windows A:B    what is planned on, all of the trace by default; the policy sees them one by one and starts without state
    windows C:D    what comes next: what the placement, made without them, is worth there. By default as many as were
                   planned on, right after them, as far as the trace goes
    before         the current map, or the initial placement

Shape suffixes: T windows, L MoE layers, E logical experts, P slots of all ranks, S slots per rank, R ranks.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.errors import ConfigError, EplbError, PolicyError, SpecError
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec, Topology
from eplb_async.observability.plan_report import PlanReport
from eplb_async.policies.base import Policy
from eplb_async.policies.dispatch import FittedDispatch
from eplb_async.policies.registry import decode_dispatch, decode_options, load_policy, run_dispatch, run_loaded
from eplb_async.runtime.offline_files import check_writable, read_loads, read_map, write_map
from eplb_async.runtime.offline_score import Compared, balance, moves, next_balance

__all__ = ["OfflineRequest", "Shape", "Span", "chosen_windows", "plan_offline"]

Span = tuple[int | None, int | None]
"""Windows A:B as in a Python slice: B is the first one after, None is the trace's end, negative numbers count from there."""

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What loads do not say: P, R, N, the router's expert groups, and K (0: see MoESpec.table_length)."""

    num_slots: int
    num_ranks: int
    num_nodes: int = 1
    num_expert_groups: int = 1
    table_length: int = 0

    def spec(self, num_layers: int, num_experts: int) -> MoESpec:
        """The model, with L and E from the loads.

        Raises:
            SpecError: the numbers do not fit together; the message says which, and what would.
        """
        if self.num_slots < num_experts:
            raise SpecError(f"{self.num_slots} slots are too few for {num_experts} experts; each needs at least one")
        if rest := self.num_slots % self.num_ranks:
            below, above = self.num_slots - rest, self.num_slots - rest + self.num_ranks
            fitting = f"{above} slots" + (f" or {below}" if below >= num_experts else "")
            raise SpecError(f"{self.num_slots} slots do not divide over {self.num_ranks} ranks; use {fitting}")
        return MoESpec(
            num_layers=num_layers,
            num_experts=num_experts,
            num_ranks=self.num_ranks,
            num_redundant=self.num_slots - num_experts,
            num_nodes=self.num_nodes,
            num_expert_groups=self.num_expert_groups,
            table_length=self.table_length,
        )


@dataclass(frozen=True, kw_only=True)
class OfflineRequest:
    """What to plan.

    Fields:
        loads: a file, or `offline_files.STANDARD_INPUT`.
        policy, options: a registered policy's name; its options and those of every policy.
        shape: of the model and the machines.
        windows, next_windows: see the module; None takes the default.
        current: map file of the placement to start from; None: the initial placement.
        out: map file to write the new placement to.
        slot_bytes: of one expert's weights in one layer.
        repeats: plans that are timed, >= 1.
    """

    loads: str
    policy: str
    shape: Shape
    options: Mapping[str, object] = field(default_factory=dict)
    windows: Span | None = None
    next_windows: Span | None = None
    current: Path | None = None
    out: Path | None = None
    slot_bytes: int | None = None
    repeats: int = 3


def plan_offline(request: OfflineRequest, progress: Progress = lambda _: None) -> PlanReport:
    """Read, plan, score, and write the map if one is wanted. `progress` is told what begins.

    Raises:
        ConfigError: a file, an option or a choice of windows is wrong.
        SpecError, UnknownName: the shape does not fit the loads; nobody registered the policy.
        PolicyError: the policy raised, or returned something else than a valid placement.
        In all cases nothing was written.
    """
    policy = load_policy(request.policy)
    settings = (decode_options(policy, request.options), decode_dispatch(policy.name, request.options))
    if request.out is not None:
        check_writable(request.out)
    progress("reading")
    trace_TLE = read_loads(request.loads)
    spec = request.shape.spec(*trace_TLE.shape[1:])
    windows, following = chosen_windows(len(trace_TLE), request.windows, request.next_windows)
    before_LP = initial_placement(spec) if request.current is None else read_map(request.current, spec)
    run = _Run(policy, trace_TLE[slice(*windows)], before_LP, spec, request)
    after_LP, times = run.timed(progress)
    fitted, fit_ms = run.dispatched(after_LP, progress)
    progress("scoring")
    compared = Compared(spec, before_LP, after_LP, fitted.share_LP if fitted else None)
    report = PlanReport(
        policy=policy.name,
        options={key: value for one in settings for key, value in msgspec.to_builtins(one, enc_hook=str).items()},
        num_layers=spec.num_layers,
        num_experts=spec.num_experts,
        num_slots=spec.num_slots,
        num_ranks=spec.num_ranks,
        num_nodes=spec.num_nodes,
        num_expert_groups=spec.num_expert_groups,
        table_length=spec.max_replicas,
        num_windows=len(trace_TLE),
        windows=windows,
        next_windows=following,
        slot_to_expert=after_LP.tolist(),
        dispatch=_dispatch_rows(fitted) if fitted else None,
        weighted_layers=int((~fitted.even_L).sum()) if fitted else 0,
        dispatch_ms=fit_ms,
        **balance(run.windows_TLE, compared),
        **next_balance(trace_TLE[slice(*following)] if following else None, compared),
        **moves(compared, request.slot_bytes),
        **times,
    )
    if request.out is not None:
        write_map(request.out, after_LP)
    return report


def chosen_windows(
    num_windows: int, planned: Span | None, following: Span | None
) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """The windows to plan on and those that come next, as (first, end); see the module for the defaults.

    Of 10 windows, (0, 4) and nothing said: (0, 4) and (4, 8). (-3, None) and nothing said: (7, 10) and None.

    Raises:
        ConfigError: they select no window, or reach beyond the trace.
    """
    start, end = _resolved("--windows", planned or (None, None), num_windows)
    if following is not None:
        return (start, end), _resolved("--next", following, num_windows)
    next_end = min(end + (end - start), num_windows)
    return (start, end), ((end, next_end) if next_end > end else None)


def _resolved(option: str, span: Span, num_windows: int) -> tuple[int, int]:
    start, end = (0 if span[0] is None else span[0]), (num_windows if span[1] is None else span[1])
    first, last = (number + num_windows if number < 0 else number for number in (start, end))
    if not 0 <= first < last <= num_windows:
        raise ConfigError(
            f"{option} {'' if span[0] is None else span[0]}:{'' if span[1] is None else span[1]}",
            f"does not fit {num_windows} windows of loads; A:B is A up to, not including, B, and negative numbers "
            "count from the end",
        )
    return first, last


@dataclass
class _Stopwatch:
    """A policy's function that notes what each call takes; all else that `run_loaded` does is not in it."""

    policy: Policy
    elapsed_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    def __call__(
        self,
        windows_TLE: NDArray[np.float64],
        slot_to_expert_LP: NDArray[np.int32],
        topology: Topology,
        options: Any,
        state: bytes,
    ) -> tuple[NDArray[np.int32], bytes]:
        """Plan (see `policies.base.PolicyFunction`)."""
        start, cpu_start = time.perf_counter(), time.thread_time()
        result = self.policy.function(windows_TLE, slot_to_expert_LP, topology, options, state)
        self.cpu_ms.append(1e3 * (time.thread_time() - cpu_start))
        self.elapsed_ms.append(1e3 * (time.perf_counter() - start))
        return result


@dataclass(frozen=True)
class _Run:
    """One policy on one input."""

    policy: Policy
    windows_TLE: NDArray[np.float64]
    before_LP: NDArray[np.int32]
    spec: MoESpec
    request: OfflineRequest

    def timed(self, progress: Progress) -> tuple[NDArray[np.int32], dict[str, Any]]:
        """The placement, and the report's times."""
        start = time.perf_counter()
        progress(f"warming up policy {self.policy.name!r} (what it compiles takes seconds the first time)")
        try:
            self.policy.warm_up()
        except EplbError:
            raise
        except Exception as error:
            raise PolicyError(self.policy.name, f"cannot be warmed up: {type(error).__name__}: {error}") from error
        progress(f"planning with {self.policy.name!r}")
        after_LP = self._plan(self.policy)
        warm_up_ms = 1e3 * (time.perf_counter() - start)
        watch = _Stopwatch(self.policy)
        for repeat in range(self.request.repeats):
            progress(f"timing plan {repeat + 1} of {self.request.repeats} with {self.policy.name!r}")
            self._plan(replace(self.policy, function=watch))
        return after_LP, {
            "ms": statistics.median(watch.elapsed_ms),
            "cpu_ms": statistics.median(watch.cpu_ms),
            "repeats": self.request.repeats,
            "warm_up_ms": warm_up_ms,
        }

    def dispatched(self, after_LP: NDArray[np.int32], progress: Progress) -> tuple[FittedDispatch | None, float | None]:
        """The dispatch tables that the options ask for, if any, and the elapsed milliseconds of a warm fit."""
        arguments = (self.policy.name, self.windows_TLE, after_LP, self.spec, self.request.options)
        progress("fitting dispatch tables (compiling takes seconds the first time)")
        if (fitted := run_dispatch(*arguments)) is None:
            return None, None
        start = time.perf_counter()
        run_dispatch(*arguments)
        return fitted, 1e3 * (time.perf_counter() - start)

    def _plan(self, policy: Policy) -> NDArray[np.int32]:
        return run_loaded(policy, self.windows_TLE, self.before_LP, self.spec, self.request.options)[0]


def _dispatch_rows(fitted: FittedDispatch) -> list[list[list[int]]]:
    """The tables without their padding, [L][E][count]."""
    tables = zip(fitted.table_LEK.tolist(), fitted.count_LE.tolist(), strict=True)
    return [[row[:count] for row, count in zip(rows, counts, strict=True)] for rows, counts in tables]

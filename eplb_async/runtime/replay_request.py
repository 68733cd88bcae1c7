"""A whole replay, from the name of a trace to its reports: what the command line and benchmarks call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.config import Settings
from eplb_async.core.errors import ConfigError
from eplb_async.observability.replay_report import ReplayReport
from eplb_async.policies.registry import check_choice
from eplb_async.runtime.offline import Shape
from eplb_async.runtime.offline_files import read_loads
from eplb_async.runtime.replay import Replay, ReplayCosts, replay_all
from eplb_async.runtime.replay_trace import Stretch, StretchedTrace, measured_every

__all__ = ["ReplayRequest", "replay_loads", "replay_trace"]


@dataclass(frozen=True, kw_only=True)
class ReplayRequest:
    """What to replay.

    Fields:
        loads: a file, or `offline_files.STANDARD_INPUT`.
        configurations: name and settings of each.
        shape: of the model and the machines.
        slot_bytes: of one expert in one layer.
        costs: what things take.
        steps_per_window, tokens_per_step, seed: see Stretch.
        every: see Stretch; 0: see measured_every.
    """

    configurations: Sequence[tuple[str, Settings]]
    shape: Shape
    slot_bytes: int
    loads: str = ""
    costs: ReplayCosts = field(default_factory=ReplayCosts)
    steps_per_window: int = 1
    tokens_per_step: int = 0
    seed: int = 0
    every: int = 0


def replay_trace(request: ReplayRequest, progress: Callable[[int, int], None] = lambda *_: None) -> list[ReplayReport]:
    """Read the trace and take all configurations through it; `progress` is told of steps done, and of how many.

    Raises:
        ConfigError, UnknownName: a file, a policy or its options are wrong, or `every` does not divide the windows' steps.
        SpecError: the shape does not fit the loads.
    """
    return replay_loads(read_loads(request.loads), request, progress)


def replay_loads(
    trace_TLE: NDArray[np.float64], request: ReplayRequest, progress: Callable[[int, int], None] = lambda *_: None
) -> list[ReplayReport]:
    """`replay_trace` for loads at hand."""
    spec = request.shape.spec(*trace_TLE.shape[1:])
    for _, settings in request.configurations:
        check_choice(settings.daemon.policy, settings.daemon.policy_options)
    lengths = [request.steps_per_window, *(settings.daemon.window_steps for _, settings in request.configurations)]
    every = request.every or measured_every(float(trace_TLE.size) * request.steps_per_window, lengths)
    for length in lengths:
        if length % every:
            raise ConfigError("every", f"is {every}; it must divide windows of {length} steps")
    stretch = Stretch(
        steps_per_window=request.steps_per_window,
        tokens_per_step=request.tokens_per_step,
        seed=request.seed,
        every=every,
    )
    trace = StretchedTrace(trace_TLE, stretch)
    replays = [
        Replay(name, settings, spec, request.slot_bytes, request.costs) for name, settings in request.configurations
    ]
    return replay_all(trace, replays, lambda done: progress(done, trace.num_steps))

"""The traces, and the configurations, that `bench_replay` compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eplb_async.core.config import Settings, load_settings
from eplb_async.core.daemon_settings import EAGER
from eplb_async.runtime.offline import Shape
from eplb_async.runtime.replay_presets import PRESETS

__all__ = ["CASES", "CURVES", "MIB", "ReplayCase", "Series", "chosen_series", "trace_path"]

Tables = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReplayCase:
    """A trace and the machines it is replayed on.

    Fields:
        trace: stem of the trace's file.
        shape: slots, ranks.
        slot_bytes: of one expert in one layer.
        steps_per_window, tokens_per_step: see Stretch.
        vllm_bytes_per_step: that vLLM's schedule moves with seed 0, about.
    """

    trace: str
    shape: Shape
    slot_bytes: int
    steps_per_window: int
    tokens_per_step: int = 0
    vllm_bytes_per_step: float = 0.0


MIB = 1 << 20

CASES = {
    # 4096 tokens a step, top-8; 3 x 6144 x 2048 weights of 8 bits; a domain lasts 8 x 600 steps
    "glm52": ReplayCase(
        trace="glm52_7domains",
        shape=Shape(num_slots=288, num_ranks=32),
        slot_bytes=3 * 6144 * 2048,
        steps_per_window=600,
        tokens_per_step=8 * 4096,
        vllm_bytes_per_step=222.6 * MIB,
    ),
    # each recorded decode step of 292 to 703 tokens is drawn 60 times; 3 x 2880 x 2880 weights of 4.25 bits
    "gptoss20b": ReplayCase(
        trace="gptoss20b_decode_steps",
        shape=Shape(num_slots=40, num_ranks=8),
        slot_bytes=3 * 2880 * 2880 * 17 // 32,
        steps_per_window=60,
        vllm_bytes_per_step=2.82 * MIB,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """Configurations that make one curve of bytes against PAR: settings of the table `daemon`, and what changes along it."""

    name: str
    daemon: Tables
    points: Mapping[str, Tables]

    def configurations(self, case: ReplayCase) -> list[tuple[str, Settings]]:
        """Name and settings of each point."""
        found = []
        for label, point in self.points.items():
            daemon = {**self.daemon, **point}
            if share := daemon.pop(SHARE, None):
                daemon["bytes_per_step"] = int(share * case.vllm_bytes_per_step)
            name = f"{self.name} {label}".strip()
            found.append((name, load_settings(environ={}, overrides={"daemon": daemon})))
        return found


SHARE = "share of vllm"
"""Of a point: its budget, as a share of what vLLM's schedule moves."""
INTERVALS = {f"every {steps}": {"interval_steps": steps} for steps in (1000, 300)}
"""Points of a policy that has no budget: how often it plans."""
ALONE: Tables = {**EAGER, "window_steps": 100, "regret_windows": 0}
"""A policy on a schedule, without what the daemon's defaults add to it."""
OFTEN = {f"every {steps}": {"interval_steps": steps} for steps in (1000, 100)}
CURVES = (
    Series(name="vllm", daemon=PRESETS["vllm"], points={"": {}}),
    Series(name="still", daemon=PRESETS["still"], points={"": {}}),
    Series(name="default", daemon={**ALONE, "policy": "default"}, points=INTERVALS),
    Series(name="swift_balancer", daemon={**ALONE, "policy": "swift_balancer"}, points=OFTEN),
    Series(name="flashlb", daemon={**ALONE, "policy": "flashlb"}, points=INTERVALS),
    Series(
        name="frontier",
        daemon={**ALONE, "policy": "frontier"},
        points={**OFTEN, "most_moved 0.005": {"interval_steps": 100, "policy_options": {"most_moved": 0.005}}},
    ),
    Series(
        name="ours",
        daemon=PRESETS["ours"],
        points={
            **{f"cost {cost}": {"move_cost": cost} for cost in (100, 300, 1000, 2000, 4000)},
            "within a fifth": {"move_cost": 500, SHARE: 0.2},
        },
    ),
)
"""`still` is policy `static` with the initial placement: what is served without balancing."""


def chosen_series(names: Sequence[str]) -> list[Series]:
    """The named curves, or all; vLLM's schedule is always the first.

    Raises:
        ValueError: an unknown name (lists the known ones).
    """
    known = [series.name for series in CURVES]
    if unknown := set(names) - set(known):
        raise ValueError(f"unknown curve {min(unknown)!r}; known: {', '.join(known)}")
    return [series for series in CURVES if not names or series.name in names or series.name == "vllm"]


def trace_path(folder: Path, case: ReplayCase) -> Path:
    """Where a case's trace is."""
    return folder / f"{case.trace}.npz"

"""The loads on which policies are compared: recorded traces, and synthetic ones in the shapes of large models."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.spec import MoESpec

__all__ = ["SYNTHETIC", "TRACES", "Case", "synthetic_case", "trace_cases"]

SYNTHETIC = {
    "deepseek-v3": {"num_layers": 58, "num_experts": 256, "num_redundant": 32, "num_ranks": 32},
    "deepseek-v3-nodes": {
        "num_layers": 58,
        "num_experts": 256,
        "num_redundant": 32,
        "num_ranks": 32,
        "num_nodes": 4,
        "num_expert_groups": 8,
    },
    "deepseek-v3-64": {"num_layers": 58, "num_experts": 256, "num_redundant": 64, "num_ranks": 64},
    "qwen3-235b": {"num_layers": 94, "num_experts": 128, "num_redundant": 16, "num_ranks": 16},
    "kimi-k2": {"num_layers": 60, "num_experts": 384, "num_redundant": 32, "num_ranks": 32},
}
"""Shape of each synthetic case."""

TRACES = {
    "glm52_7domains": (32, 32),
    "qwen3_30b_mgsm_8lang": (16, 16),
    "deepseek_moe16b_chat_7domains": (8, 8),
    "olmoe_1b7b_7domains": (8, 8),
    "gptoss20b_decode_steps": (8, 8),
    "smartmoe_gpt_training": (8, 8),
}
"""Redundant slots and ranks with which each recorded trace is planned."""

MOST_WINDOWS = 64
"""Longer traces are merged into as many windows, each the sum of consecutive ones."""

SIGMA, KEPT, TOKENS = 1.0, 0.98, 8 * 65_536
"""Synthetic load: width of the lognormal, correlation of log-load from window to window, tokens per layer and window."""


@dataclass(frozen=True)
class Case:
    """A model's shape and its windows [T, L, E], T >= 2."""

    name: str
    spec: MoESpec
    windows_TLE: NDArray[np.float64]

    @property
    def label(self) -> str:
        """Name and shape, for tables."""
        spec = self.spec
        nodes = f", {spec.num_nodes} nodes, {spec.num_expert_groups} groups" if spec.num_nodes > 1 else ""
        return (
            f"{self.name}: {spec.num_layers} x {spec.num_experts} -> {spec.num_slots} on {spec.num_ranks}{nodes}, "
            f"{len(self.windows_TLE)} windows"
        )


def synthetic_case(name: str, num_windows: int = 9, seed: int = 0) -> Case:
    """Lognormal expert loads whose logarithms drift as an autoregressive process, counted with Poisson noise."""
    spec = MoESpec(**SYNTHETIC[name])
    random = np.random.default_rng(seed)
    log_LE = random.normal(size=(spec.num_layers, spec.num_experts))
    windows = []
    for _ in range(num_windows):
        load_LE = np.exp(SIGMA * log_LE)
        windows.append(random.poisson(load_LE / load_LE.sum(axis=1, keepdims=True) * TOKENS))
        log_LE = KEPT * log_LE + np.sqrt(1 - KEPT**2) * random.normal(size=log_LE.shape)
    return Case(name, spec, np.array(windows, dtype=np.float64))


def trace_cases(folder: Path) -> list[Case]:
    """The recorded traces of `TRACES` that the folder has."""
    return [_trace_case(folder / f"{name}.npz") for name in TRACES if (folder / f"{name}.npz").exists()]


def _trace_case(path: Path) -> Case:
    counts_TLE = np.load(path)["counts"].astype(np.float64)
    if len(counts_TLE) > MOST_WINDOWS:
        starts = np.linspace(0, len(counts_TLE), MOST_WINDOWS, endpoint=False).astype(int)
        counts_TLE = np.add.reduceat(counts_TLE, starts, axis=0)
    redundant, ranks = TRACES[path.stem]
    num_layers, num_experts = counts_TLE.shape[1:]
    spec = MoESpec(num_layers=num_layers, num_experts=num_experts, num_redundant=redundant, num_ranks=ranks)
    return Case(path.stem, spec, counts_TLE)

"""The loads on which policies are compared: recorded traces, and synthetic ones in the shapes of large models.

A case is a sequence of intervals of T windows. Each plan sees one interval and is scored on it and on the next.

    window cases    T = 1; a trace of more windows is summed to as many as its entry in `TRACES` says
    @steps cases    T windows as recorded, which the policy gets as T windows; only traces of many windows have one
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.spec import MoESpec

__all__ = ["STEPS", "SYNTHETIC", "TRACES", "Case", "Trace", "chosen_cases", "domain", "synthetic_case", "trace_case"]

STEPS = "@steps"
"""Ends the name of a case whose windows are given to policies one by one."""

DEEPSEEK_V3 = {"num_layers": 58, "num_experts": 256, "num_redundant": 32, "num_ranks": 32}

SYNTHETIC = {
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v3-nodes": {**DEEPSEEK_V3, "num_nodes": 4, "num_expert_groups": 8},
    "deepseek-v3-64": {**DEEPSEEK_V3, "num_redundant": 64, "num_ranks": 64},
    "qwen3-235b": {"num_layers": 94, "num_experts": 128, "num_redundant": 16, "num_ranks": 16},
    "kimi-k2": {"num_layers": 60, "num_experts": 384, "num_redundant": 32, "num_ranks": 32},
    "calm": DEEPSEEK_V3,
}
"""Shape of each synthetic case. `calm` is stationary: its windows differ by sampling noise alone, so who moves, moves for
nothing."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """How a recorded trace is planned.

    Fields:
        redundant: slots beyond one per expert.
        ranks: R.
        most_windows: longer traces are summed to as many windows of consecutive ones, for the window case.
        interval: windows in an interval of the @steps case; 0: the trace has none.
    """

    redundant: int
    ranks: int
    most_windows: int = 64
    interval: int = 0


TRACES = {
    # 14 windows of 4: half a domain each
    "glm52_7domains": Trace(redundant=32, ranks=32, most_windows=14, interval=4),
    "qwen3_30b_mgsm_8lang": Trace(redundant=16, ranks=16),
    "deepseek_moe16b_base_7domains": Trace(redundant=8, ranks=8),
    "deepseek_moe16b_chat_7domains": Trace(redundant=8, ranks=8),
    "qwen15_moe_a27b_7domains": Trace(redundant=4, ranks=8),
    "olmoe_1b7b_7domains": Trace(redundant=8, ranks=8),
    "gptoss20b_decode_steps": Trace(redundant=8, ranks=8, interval=32),
    "gptoss20b_requests": Trace(redundant=8, ranks=8, interval=32),
    "smartmoe_gpt_training": Trace(redundant=8, ranks=8, interval=32),
}
"""By the name of the trace's file."""

SIGMA, KEPT, TOKENS = 1.0, 0.98, 8 * 65_536
"""Synthetic load: width of the lognormal, correlation of log-load from window to window, tokens per layer and window."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model's shape and its load, at least two intervals.

    Fields:
        name: of the trace or shape, with `STEPS` at its end if windows stay apart.
        spec: the model.
        windows_TLE: all windows in order; those after the last whole interval are not used.
        interval: windows in an interval.
        domains: what each window's traffic is about, if the trace says so; several where windows were summed.
        recorded: windows as recorded, before they were summed.
    """

    name: str
    spec: MoESpec
    windows_TLE: NDArray[np.float64]
    interval: int = 1
    domains: Sequence[frozenset[str]] | None = None
    recorded: int = 0

    @property
    def num_intervals(self) -> int:
        """Whole intervals; one plan fewer is made."""
        return len(self.windows_TLE) // self.interval

    def windows(self, interval: int) -> NDArray[np.float64]:
        """The windows of an interval, [T, L, E]."""
        return self.windows_TLE[interval * self.interval : (interval + 1) * self.interval]

    def changes_after(self, interval: int) -> bool | None:
        """Whether this interval and the next are about more than one domain; None if the trace does not say."""
        if self.domains is None:
            return None
        return len(frozenset().union(*self.domains[interval * self.interval : (interval + 2) * self.interval])) > 1

    @property
    def label(self) -> str:
        """Name, shape and intervals, for tables."""
        spec, num_windows = self.spec, len(self.windows_TLE)
        nodes = f", {spec.num_nodes} nodes, {spec.num_expert_groups} groups" if spec.num_nodes > 1 else ""
        if self.interval > 1:
            traffic = f"{self.num_intervals} intervals of {self.interval} windows"
        elif self.recorded > num_windows:
            each, rest = divmod(self.recorded, num_windows)
            traffic = f"{num_windows} windows, each the sum of {each}" + (f" or {each + 1}" if rest else "")
        else:
            traffic = f"{num_windows} windows"
        shape = f"{spec.num_layers} x {spec.num_experts} -> {spec.num_slots} on {spec.num_ranks}"
        return f"{self.name}: {shape}{nodes}, {traffic}"


def synthetic_case(name: str, num_windows: int = 9, seed: int = 0) -> Case:
    """Lognormal expert loads whose logarithms drift as an autoregressive process (`calm`: stay), with Poisson noise."""
    spec = MoESpec(**SYNTHETIC[name])
    random = np.random.default_rng(seed)
    kept = 1.0 if name == "calm" else KEPT
    log_LE = random.normal(size=(spec.num_layers, spec.num_experts))
    windows = []
    for _ in range(num_windows):
        load_LE = np.exp(SIGMA * log_LE)
        windows.append(random.poisson(load_LE / load_LE.sum(axis=1, keepdims=True) * TOKENS))
        log_LE = kept * log_LE + np.sqrt(1 - kept**2) * random.normal(size=log_LE.shape)
    return Case(name=name, spec=spec, windows_TLE=np.array(windows, dtype=np.float64))


def domain(label: str) -> str:
    """What a window's label says it is about: all before a slash, without the number at the end.

    "code_raw_07": code_raw; "gpqa_diamond/Genetics/False_True": gpqa_diamond; "iter121": iter.
    """
    return re.sub(r"_?\d+$", "", label.partition("/")[0])


def trace_case(path: Path, interval: int = 0) -> Case:
    """A recorded trace of `TRACES`; with an interval, its @steps case.

    Raises:
        ValueError: fewer windows than two intervals have.
    """
    trace = TRACES[path.stem]
    with np.load(path, allow_pickle=False) as file:
        counts_TLE = file["counts"].astype(np.float64)
        labels = [str(label) for label in file["window_labels"]] if "window_labels" in file else None
    recorded = len(counts_TLE)
    domains = None if labels is None else [frozenset([domain(label)]) for label in labels]
    if domains is not None and len(set(domains)) == 1:  # the labels only count ("iter11"): nothing to split by
        domains = None
    if not interval and recorded > trace.most_windows:
        starts = np.linspace(0, recorded, trace.most_windows, endpoint=False).astype(int)
        counts_TLE = np.add.reduceat(counts_TLE, starts, axis=0)
        if domains is not None:
            ends = [*starts[1:], recorded]
            domains = [frozenset().union(*domains[a:b]) for a, b in zip(starts, ends, strict=True)]
    if len(counts_TLE) < 2 * max(interval, 1):
        raise ValueError(f"{path} has {recorded} windows; two intervals of {interval} need {2 * interval}")
    num_layers, num_experts = counts_TLE.shape[1:]
    return Case(
        name=path.stem + STEPS * bool(interval),
        spec=MoESpec(
            num_layers=num_layers, num_experts=num_experts, num_redundant=trace.redundant, num_ranks=trace.ranks
        ),
        windows_TLE=counts_TLE,
        interval=interval or 1,
        domains=domains,
        recorded=recorded,
    )


def chosen_cases(names: Sequence[str], traces: Path, interval: int | None = None) -> list[Case]:
    """The named cases, or all: synthetic shapes, then the traces that the folder has, then their @steps cases.

    Args:
        names: of cases; none for all.
        traces: folder of traces; it need not be there.
        interval: windows in an interval of every @steps case, instead of each one's own.

    Raises:
        ValueError: an unknown name (lists the known ones), or an interval longer than half a trace.
    """
    known = {name: partial(synthetic_case, name) for name in SYNTHETIC}
    files = {name: traces / f"{name}.npz" for name in TRACES if (traces / f"{name}.npz").exists()}
    known |= {name: partial(trace_case, file) for name, file in files.items()}
    for name, file in files.items():
        if TRACES[name].interval:
            known[name + STEPS] = partial(trace_case, file, interval or TRACES[name].interval)
    unknown = set(names) - known.keys()
    if unknown:
        raise ValueError(f"unknown case {min(unknown)!r}; known: {', '.join(known)}")
    return [make() for name, make in known.items() if not names or name in names]

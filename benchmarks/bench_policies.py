"""Policies compared: time per plan, balance on the planned and on the next window, and how much they move.

    python benchmarks/bench_policies.py
    python benchmarks/bench_policies.py --policy default --policy default:relabel_ranks=true --case qwen3-235b
    python benchmarks/bench_policies.py --traces DIR --json policies.json

Each policy plans on every window but the last, from its own previous placement (the first from the initial one).
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere, installed or not

from benchmarks.policy_cases import SYNTHETIC, Case, synthetic_case, trace_cases
from benchmarks.reporting import Column, show_table, write_json
from eplb_async.core.errors import EplbError
from eplb_async.core.placement import initial_placement, replica_count, validate_placement
from eplb_async.core.score import windows_par
from eplb_async.core.spec import MoESpec
from eplb_async.policies.base import Policy
from eplb_async.policies.bounds import par_lower_bound
from eplb_async.policies.registry import decode_options, load_policy
from eplb_async.testing import ranks_with_duplicates

__all__ = ["main", "measure", "moved_share", "parse_policy"]

DEFAULT_TRACES = Path(os.environ.get("EPLB_TRACES", Path(__file__).resolve().parents[1] / "../shared/traces"))

COLUMNS = [
    Column(key="policy", title="policy"),
    Column(key="plan_ms", title="plan p50, ms", digits=2, ratio=True),
    Column(key="cpu_ms", title="CPU p50, ms", digits=2),
    Column(key="par_planned", title="PAR planned", digits=4, ratio=True),
    Column(key="par_next", title="PAR next window", digits=4, ratio=True),
    Column(key="moved_share", title="moved", digits=3, ratio=True),
    Column(key="duplicates", title="duplicates"),
]


@dataclass
class Measured:
    """What the plans of one policy on one case were like; one entry per plan (times: per repeat)."""

    plan_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    par_planned: list[float] = field(default_factory=list)
    par_next: list[float] = field(default_factory=list)
    moved_share: list[float] = field(default_factory=list)
    duplicates: int = 0

    def row(self, case: Case, policy: str) -> dict[str, object]:
        """The table's row."""
        return {
            "case": case.label,
            "policy": policy,
            "plan_ms": float(np.median(self.plan_ms)),
            "cpu_ms": float(np.median(self.cpu_ms)),
            "par_planned": float(np.mean(self.par_planned)),
            "par_next": float(np.mean(self.par_next)),
            "moved_share": float(np.mean(self.moved_share)),
            "duplicates": self.duplicates,
        }


def moved_share(before_LP: NDArray[np.int32], after_LP: NDArray[np.int32], spec: MoESpec) -> float:
    """Share of all slots whose expert was not on that rank before: the bytes a change costs, whatever the slot order."""
    by_rank = (-1, spec.slots_per_rank)
    new = replica_count(after_LP.reshape(by_rank), spec.num_experts)
    old = replica_count(before_LP.reshape(by_rank), spec.num_experts)
    return float(np.maximum(new - old, 0).sum()) / after_LP.size


def parse_policy(text: str) -> tuple[Policy, dict[str, object]]:
    """`name` or `name:option=value,...` with JSON values, as a policy and its options."""
    name, _, settings = text.partition(":")
    options: dict[str, object] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        options[key] = msgspec.json.decode(value)
    return load_policy(name), options


def measure(case: Case, policy: Policy, options: dict[str, object], repeats: int) -> Measured:
    """Plan through the windows of a case; times are of the policy function alone, warm, in this thread.

    CPU time is what a plan costs on a machine that other work shares; both are equal on a quiet one.
    """
    spec, windows = case.spec, case.windows_TLE
    settings: Any = decode_options(policy, options)
    if policy.prepare_options is not None:
        settings = policy.prepare_options(settings, spec)
    policy.warm_up()
    live_LP = placement_LP = initial_placement(spec)
    state, measured = b"", Measured()
    for window in range(len(windows) - 1):
        planned_on, following = windows[window : window + 1], windows[window + 1 : window + 2]
        # every repeat plans the same; the result of the last is kept
        for repeat in range(repeats):
            start, cpu_start = time.perf_counter(), time.thread_time()
            result = policy.function(planned_on, live_LP, spec.topology, settings, state)
            measured.cpu_ms.append((time.thread_time() - cpu_start) * 1e3)
            measured.plan_ms.append((time.perf_counter() - start) * 1e3)
            if repeat == repeats - 1:
                placement_LP, state = result
        placement_LP = validate_placement(placement_LP, spec)
        measured.par_planned.append(float(windows_par(planned_on, placement_LP, spec.topology).mean()))
        measured.par_next.append(float(windows_par(following, placement_LP, spec.topology).mean()))
        measured.moved_share.append(moved_share(live_LP, placement_LP, spec))
        measured.duplicates += int(ranks_with_duplicates(placement_LP, spec).sum())
        live_LP = placement_LP
    return measured


def reference_rows(case: Case) -> list[dict[str, object]]:
    """The initial placement, which never moves, and the PAR that no placement can beat."""
    windows, spec = case.windows_TLE, case.spec
    live_LP = initial_placement(spec)
    par_T = [float(windows_par(window[None], live_LP, spec.topology).mean()) for window in windows]
    bound_T = [float(par_lower_bound(window, spec.topology).mean()) for window in windows]
    return [
        {
            "case": case.label,
            "policy": "(initial placement)",
            "par_planned": float(np.mean(par_T[:-1])),
            "par_next": float(np.mean(par_T[1:])),
            "moved_share": 0.0,
        },
        {
            "case": case.label,
            "policy": "(lower bound)",
            "par_planned": float(np.mean(bound_T[:-1])),
            "par_next": float(np.mean(bound_T[1:])),
        },
    ]


def chosen_cases(names: Sequence[str], traces: Path) -> list[Case]:
    """The named cases, or all: synthetic shapes first, then the traces that the folder has."""
    recorded = {case.name: case for case in trace_cases(traces)}
    unknown = set(names) - SYNTHETIC.keys() - recorded.keys()
    if unknown:
        raise typer.BadParameter(f"unknown case {min(unknown)!r}; known: {', '.join([*SYNTHETIC, *recorded])}")
    synthetic = [synthetic_case(name) for name in SYNTHETIC if not names or name in names]
    return synthetic + [case for name, case in recorded.items() if not names or name in names]


def main(
    policy: Annotated[
        list[str] | None, typer.Option(help="Name, or name:option=value,...; may be given again.")
    ] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only these cases; may be given again.")] = None,
    traces: Annotated[
        Path, typer.Option(help="Folder of recorded traces; left out if it is not there.")
    ] = DEFAULT_TRACES,
    repeats: Annotated[int, typer.Option(min=1, help="Times each plan is timed.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Also write the rows to this file.")] = None,
) -> None:
    """Compare policies: time per plan, PAR on the planned and the next window, share of slots moved, shared ranks.

    Examples:
      python benchmarks/bench_policies.py

      python benchmarks/bench_policies.py --policy default --policy default:relabel_ranks=true --case qwen3-235b

      python benchmarks/bench_policies.py --traces DIR --json policies.json
    """
    texts = policy or ["default", "default:relabel_ranks=true", "random"]
    try:
        policies = [(text, *parse_policy(text)) for text in texts]
        for _, loaded, options in policies:
            decode_options(loaded, options)
    except (EplbError, msgspec.DecodeError) as error:
        raise typer.BadParameter(str(error)) from error
    rows: list[dict[str, object]] = []
    for one in chosen_cases(case or [], traces):
        rows += [measure(one, loaded, options, repeats).row(one, text) for text, loaded, options in policies]
        rows += reference_rows(one)
    show_table("policies (ratios to the first of each case)", COLUMNS, rows, group="case")
    if json is not None:
        write_json(json, "policies", rows)


if __name__ == "__main__":
    typer.run(main)

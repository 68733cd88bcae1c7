"""Weighted dispatch replayed: tables fitted to one interval meet the next, against an even split of the same placement.

    python benchmarks/bench_dispatch.py
    python benchmarks/bench_dispatch.py --case gptoss20b_requests --interval 8 --interval 16 --strength 1
    python benchmarks/bench_dispatch.py --table-length 32 --json dispatch.json

An interval is a number of consecutive windows of a trace. `fresh` placements are planned by the policy `default` on the
interval to which the tables are fitted; a `stale` one is planned once, on the first interval, and only the tables are refitted:
a correction that moves no expert. PAR is the mean over windows and layers of each window's own max / mean rank load.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere, installed or not

from benchmarks.reporting import Column, show_table, write_json
from eplb_async.core.placement import initial_placement
from eplb_async.core.score import par, rank_load
from eplb_async.core.spec import MoESpec
from eplb_async.policies.dispatch import fit_dispatch, warm_up
from eplb_async.policies.registry import run_policy

__all__ = ["CASES", "ReplayCase", "interval_pairs", "main", "replay"]

FloatArray = NDArray[np.float64]
DEFAULT_TRACES = Path(os.environ.get("EPLB_TRACES", Path(__file__).resolve().parents[1] / "../shared/traces"))

CASES = {
    "glm52_7domains": (32, 32, 0),
    "glm52_7domains:same-domain": (32, 32, 8),
    "gptoss20b_decode_steps": (8, 8, 0),
    "gptoss20b_requests": (8, 8, 0),
    "smartmoe_gpt_training": (8, 8, 0),
    "qwen3_30b_mgsm_8lang": (16, 16, 0),
}
"""Redundant slots, ranks, and how many windows belong together (0: all): pairs of intervals do not cross such a border."""
INTERVALS = (1, 2, 4, 8, 16, 32, 64)
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
FIT_REPEATS = 9


@dataclass(frozen=True)
class ReplayCase:
    """A model's shape, the windows of a trace [T, L, E], and how many of them belong together."""

    name: str
    spec: MoESpec
    windows_TLE: FloatArray
    segment: int


def recorded_cases(folder: Path, names: Sequence[str], table_length: int) -> Iterator[ReplayCase]:
    """The named cases, or all, of which the folder has the trace, with dispatch rows of K = `table_length` (0: as ever)."""
    for name, (redundant, ranks, segment) in CASES.items():
        path = folder / f"{name.partition(':')[0]}.npz"
        if path.exists() and (not names or name in names):
            counts_TLE = np.load(path)["counts"].astype(np.float64)
            num_layers, num_experts = counts_TLE.shape[1:]
            spec = MoESpec(
                num_layers=num_layers,
                num_experts=num_experts,
                num_redundant=redundant,
                num_ranks=ranks,
                table_length=table_length,
            )
            yield ReplayCase(name, spec, counts_TLE, segment or len(counts_TLE))


def interval_pairs(case: ReplayCase, length: int, most: int) -> list[tuple[int, int]]:
    """Pairs of consecutive intervals: (first window of the pair, first window of its segment), `most` spread evenly."""
    pairs = [
        (start, segment)
        for segment in range(0, len(case.windows_TLE), case.segment)
        for start in range(segment, min(segment + case.segment, len(case.windows_TLE)) - 2 * length + 1, length)
    ]
    if len(pairs) <= most:
        return pairs
    return [pairs[int(index)] for index in np.linspace(0, len(pairs) - 1, most)]


def replay(
    case: ReplayCase, length: int, pairs: Sequence[tuple[int, int]], strengths: Sequence[float]
) -> list[dict[str, object]]:
    """One row for fresh placements and one for the stale one, which is scored on later intervals than its own only."""
    found: dict[tuple[str, str], list[float]] = {}
    live_LP = initial_placement(case.spec)
    for start, segment in pairs:
        fitted_on = case.windows_TLE[start : start + length]
        scored_on = case.windows_TLE[start + length : start + 2 * length]
        live_LP, _ = run_policy("default", fitted_on, live_LP, case.spec, {})
        placements = {"fresh": live_LP}
        if start > segment:
            planned_on = case.windows_TLE[segment : segment + length]
            placements["stale"], _ = run_policy("default", planned_on, initial_placement(case.spec), case.spec, {})
        for kind, rows_LP in placements.items():
            shares: dict[str, FloatArray | None] = {"even": None}
            for strength in strengths:
                shares[f"{strength:g}"] = fit_dispatch(fitted_on, rows_LP, case.spec.topology, strength).share_LP
            for dispatch, share_LP in shares.items():
                for when, windows_TLE in (("fitted", fitted_on), ("next", scored_on)):
                    score = mean_par(windows_TLE, rows_LP, case.spec, share_LP)
                    found.setdefault((kind, f"{when} {dispatch}"), []).append(score)
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in found):
        values = {key: scores for (of, key), scores in found.items() if of == kind}
        label = f"{case.name}, {kind} placement, K = {case.spec.max_replicas}"
        row: dict[str, object] = {"case": label, "windows": length}
        row |= {"pairs": len(values["next even"]), **{key: float(np.mean(scores)) for key, scores in values.items()}}
        best = min(strengths, key=lambda strength: float(np.mean(values[f"next {strength:g}"])))
        gain = 1 - float(np.mean(values[f"next {best:g}"])) / float(np.mean(values["next even"]))
        rows.append(row | {"best": f"{best:g}", "gain": 100 * gain})
    return rows


def mean_par(windows_TLE: FloatArray, rows_LP: NDArray[np.int32], spec: MoESpec, share_LP: FloatArray | None) -> float:
    """Mean over windows and layers, each of the same weight."""
    return float(par(rank_load(windows_TLE, rows_LP, spec.topology, share_LP)).mean())


def fit_times() -> list[dict[str, object]]:
    """CPU time of a fit, in one thread: 75 layers of 256 experts on 288 slots of 32 ranks, Poisson counts of a lognormal."""
    spec = MoESpec(num_layers=75, num_experts=256, num_redundant=32, num_ranks=32)
    random = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    mean_LE = random.lognormal(size=(75, 256)) * 1000
    for num_windows in (1, 8):
        windows_TLE = random.poisson(mean_LE * random.lognormal(sigma=0.2, size=(num_windows, 75, 256))).astype(float)
        rows_LP, _ = run_policy("default", windows_TLE, initial_placement(spec), spec, {})
        times = []
        for _ in range(FIT_REPEATS):
            start = time.thread_time()
            fit_dispatch(windows_TLE, rows_LP, spec.topology)
            times.append(1e3 * (time.thread_time() - start))
        rows.append({"case": "75 x 256 -> 288 on 32", "windows": num_windows, "fit_ms": float(np.median(times))})
    return rows


def columns(strengths: Sequence[float]) -> list[Column]:
    """Of the replay's table."""
    last = f"{strengths[-1]:g}"
    return [
        Column(key="windows", title="windows"),
        Column(key="pairs", title="intervals"),
        Column(key="fitted even", title="fitted: even", digits=4),
        Column(key=f"fitted {last}", title=f"fitted: {last}", digits=4),
        Column(key="next even", title="next: even", digits=4),
        *(Column(key=f"next {strength:g}", title=f"next: {strength:g}", digits=4) for strength in strengths),
        Column(key="best", title="best"),
        Column(key="gain", title="gain, %", digits=2),
    ]


def main(  # size: typer declares options this way
    case: Annotated[list[str] | None, typer.Option(help="Only these traces; may be given again.")] = None,
    interval: Annotated[list[int] | None, typer.Option(min=1, help="Windows per interval; may be given again.")] = None,
    strength: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="dispatch_strength to replay; may be given again.")
    ] = None,
    table_length: Annotated[int, typer.Option(min=0, help="K, entries of a dispatch row; 0: MoESpec's default.")] = 0,
    most: Annotated[int, typer.Option(min=1, help="Pairs of intervals per row, spread over the trace.")] = 40,
    traces: Annotated[Path, typer.Option(help="Folder of recorded traces.")] = DEFAULT_TRACES,
    json: Annotated[Path | None, typer.Option(help="Also write the rows to this file.")] = None,
) -> None:
    """Replay weighted dispatch on traces: PAR on the interval after the one it was fitted to, against an even split.

    Examples:
      python benchmarks/bench_dispatch.py

      python benchmarks/bench_dispatch.py --case gptoss20b_requests --interval 8 --interval 16 --strength 1

      python benchmarks/bench_dispatch.py --table-length 32 --json dispatch.json
    """
    if unknown := set(case or []) - CASES.keys():
        raise typer.BadParameter(f"unknown case {min(unknown)!r}; known: {', '.join(CASES)}")
    strengths = sorted(strength or STRENGTHS)
    warm_up()
    times, rows = fit_times(), list[dict[str, object]]()
    for one in recorded_cases(traces, case or [], table_length):
        for length in interval or INTERVALS:
            if pairs := interval_pairs(one, length, most):
                rows += replay(one, length, pairs, strengths)
    timed = [
        Column(key="windows", title="windows"),
        Column(key="fit_ms", title="fit, CPU p50 of one thread, ms", digits=2),
    ]
    show_table("time of a fit", timed, times, group="case")
    show_table("weighted dispatch, PAR (columns: strength)", columns(strengths), rows, group="case")
    if json is not None:
        write_json(json, "dispatch", [*times, *rows])


if __name__ == "__main__":
    typer.run(main)

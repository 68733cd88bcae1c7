"""Bytes moved against realised PAR, for vLLM's schedule and for each policy with several intervals and budgets, by replay.

    python -m benchmarks.bench_replay --json rows.json --output tables.md pictures

Traces are not part of this repository: EPLB_TRACES or --traces names their folder.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.replay_cases import CASES, Series, chosen_series, trace_path
from benchmarks.reporting import Column, header, markdown_tables, show_table, write_json, write_whole
from eplb_async.core.errors import EplbError
from eplb_async.runtime.replay_request import ReplayRequest, replay_trace

__all__ = ["draw", "main", "measure_case"]

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_TRACES = Path(os.environ.get("EPLB_TRACES", ROOT / "../shared/traces"))

COLUMNS = [
    Column(key="configuration", title="configuration"),
    Column(key="par_mean", title="PAR mean", digits=4),
    Column(key="par_p99", title="p99", digits=3),
    Column(key="mib_per_step", title="MiB/step", digits=2),
    Column(key="bytes_share", title="of vLLM's bytes", digits=3),
    Column(key="moves", title="moves"),
    Column(key="num_plans", title="plans"),
    Column(key="num_decisions", title="decisions"),
    Column(key="behind_steps", title="steps to last commit", digits=0),
    Column(key="stall_s", title="stalls, s"),
    Column(key="over_ideal", title="time / ideal", digits=4),
]
LEGEND = """PAR: of each step, mean over layers of max / mean rank load, under the placement that was live at that step and on its own load. Time / ideal:
of all steps in the cost model of `eplb-async replay`, against perfect balance. "vllm": policy default, load of 1000 steps, every 3000 steps.
Decisions: plans, and times that nothing paid."""

Row = dict[str, Any]


def measure_case(name: str, series: Sequence[Series], traces: Path, seed: int) -> list[Row]:
    """Rows of a case, vLLM's schedule first.

    Raises:
        EplbError: the trace cannot be read.
    """
    case = CASES[name]
    configurations = [(one.name, configuration) for one in series for configuration in one.configurations(case)]

    tenths = [0]

    def progress(done: int, total: int) -> None:
        if 10 * done // total > tenths[-1]:
            tenths.append(10 * done // total)
            print(f"{name}: {done} of {total} steps", file=sys.stderr, flush=True)

    request = ReplayRequest(
        loads=str(trace_path(traces, case)),
        configurations=[configuration for _, configuration in configurations],
        shape=case.shape,
        slot_bytes=case.slot_bytes,
        steps_per_window=case.steps_per_window,
        tokens_per_step=case.tokens_per_step,
        seed=seed,
        every=10,
    )
    reports = replay_trace(request, progress)
    label = (
        f"{name}: {case.trace}, {case.shape.num_slots} slots on {case.shape.num_ranks}, {reports[0].num_steps} steps"
    )
    return [
        {
            "case": label,
            "series": of_series,
            "configuration": report.name,
            **{column.key: getattr(report, column.key) for column in COLUMNS if hasattr(report, column.key)},
            "mib_per_step": report.bytes_per_step / (1 << 20),
            "bytes_share": report.bytes_moved / max(1, reports[0].bytes_moved),
            "over_ideal": report.total_s / report.ideal_s,
        }
        for (of_series, _), report in zip(configurations, reports, strict=True)
    ]


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """A picture for each case: bytes against PAR, one curve for each series. Returns a line for each, or why there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ["no pictures: matplotlib is not installed (pip install 'eplb-async[bench]')"]
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
        axes = figure.subplots()
        for index, name in enumerate(dict.fromkeys(row["series"] for row in rows)):
            places = sorted(
                (row["mib_per_step"], row["par_mean"]) for row in rows if (row["case"], row["series"]) == (case, name)
            )
            axes.plot(*zip(*places, strict=True), "o-" if len(places) > 1 else "*", color=f"C{index}", label=name)
        axes.set_xscale("symlog", linthresh=max(row["mib_per_step"] for row in rows if row["case"] == case) / 100)
        axes.set_xlabel("MiB moved per step, all ranks")
        axes.set_ylabel("realised PAR, mean over steps and layers")
        axes.set_title(case, fontsize=9)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=8)
        path = folder / f"replay_{case.partition(':')[0]}.png"
        figure.savefig(path)
        lines.append(f"drew {path}")
    return lines


def main(
    case: Annotated[list[str] | None, typer.Option(help="Only these cases; may be given again.")] = None,
    curve: Annotated[list[str] | None, typer.Option(help="Only these curves; may be given again.")] = None,
    traces: Annotated[Path, typer.Option(help="Folder of recorded traces.")] = DEFAULT_TRACES,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples that steps are.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the rows to this file.")] = None,
    output: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="MARKDOWN PLOTS", help="Also write a table and pictures.")
    ] = None,
) -> None:
    """Bytes against realised PAR of each policy, on recorded traffic, in closed loop."""
    try:
        series = chosen_series(curve or [])
        if unknown := set(case or []) - CASES.keys():
            raise ValueError(f"unknown case {min(unknown)!r}; known: {', '.join(CASES)}")
        rows = [row for name in case or CASES for row in measure_case(name, series, traces, seed)]
    except (EplbError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    show_table("replay", COLUMNS, rows, "case")
    print(LEGEND)
    if json is not None:
        write_json(json, "replay", rows)
    if output is not None:
        text = f"`{header()['command']}`\n\n{LEGEND}\n\n{markdown_tables(COLUMNS, rows, 'case')}"
        write_whole(output[0], text.encode())
        print("\n".join(draw(rows, output[1])), file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)

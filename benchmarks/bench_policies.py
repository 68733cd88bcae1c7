"""Policies compared, ours and other engines': time per plan, balance on what was planned and on what came next, and moves.

    python -m benchmarks.bench_policies
    python -m benchmarks.bench_policies --policy default --policy default:relabel_ranks=true --case qwen3-235b
    python -m benchmarks.bench_policies --peers-dir DIR --json policies.json --markdown policies.md --plots pictures
    python -m benchmarks.bench_policies --case calm --policy default --sweep "random:seed=[1,2,3]" --plots pictures
    python -m benchmarks.bench_policies --scaling --peers-dir DIR --plots pictures

Each policy plans on every interval but the last, from its own previous placement (the first from the initial one);
`policy_cases` says what an interval is, `policy_measure` how it is scored. Another engine's policies take part when
`--peers-dir` (or EPLB_PEERS) names a folder with its unpacked wheel; see `peers`.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # before numpy is imported: what a policy calls in BLAS or torch is to stay on the one core that is timed
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere, installed or not

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.policy_candidates import Candidate, chosen_candidates, load_peers_from, peer_versions
from benchmarks.policy_cases import Case, chosen_cases
from benchmarks.policy_measure import measure, reference_rows
from benchmarks.policy_plots import draw_cases, draw_scaling
from benchmarks.policy_scaling import SERIES, measure_scaling, scaling_table
from benchmarks.reporting import Column, header, markdown_tables, show_table, write_json, write_whole
from eplb_async.core.errors import EplbError

__all__ = ["Report", "main", "measure_cases"]

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_TRACES = Path(os.environ.get("EPLB_TRACES", ROOT / "../shared/traces"))

COLUMNS = [
    Column(key="policy", title="policy"),
    Column(key="cpu_ms", title="CPU p50, ms", digits=2, ratio=True),
    Column(key="plan_ms", title="wall, ms", digits=2),
    Column(key="par_planned", title="PAR planned", digits=4, ratio=True),
    Column(key="par_planned_max", title="planned max", digits=3),
    Column(key="par_next", title="PAR next", digits=4, ratio=True),
    Column(key="par_next_max", title="next max", digits=3),
    Column(key="par_same", title="same domain", digits=4),
    Column(key="par_change", title="after change", digits=4),
    Column(key="balancedness", title="balancedness", digits=3),
    Column(key="moved_share", title="moved", digits=3, ratio=True),
    Column(key="moved_later", title="but the first", digits=3),
    Column(key="duplicates", title="duplicates"),
    Column(key="bound", title="bound", digits=4),
    Column(key="gap", title="gap", digits=4),
    Column(key="failures", title="failed"),
]

LEGEND = """CPU, wall: the policy function alone, p50, one warm plan of all layers in one thread. PAR: mean over plans of the
mean (max) over layers; of an interval of several windows, the mean of each window's own PAR, every window alike. Next: the
interval after the planned one; where the trace says what its traffic is about, also split into intervals of the same domain
and first ones after a change. Balancedness: sum over layers of mean / sum of max rank load, on the next interval. Moved:
experts new on a rank, share of all slots, per plan; "but the first": without the plan that starts from the initial placement.
Duplicates: slots that repeat an expert of their rank, all plans. Bound: mean over windows of the PAR that no placement can
beat in that window, on the planned interval; gap: planned / bound - 1. Failed: plans that raised or were invalid; the live
placement stayed."""

SCALING_LEGEND = """Second plan, 8 layers, in one thread. "over": a plan took longer than {:g} s of CPU at a point that is smaller or equal
in experts, ranks, slots and windows, so this one was left out."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """Tables and what is said about them.

    Fields:
        title: of the whole.
        columns: of the tables.
        table: their rows.
        rows: as measured; "error" of a row says what failed.
        group: key of the rows of one table.
        legend: what the columns mean.
    """

    title: str
    columns: Sequence[Column]
    table: Sequence[Row]
    rows: Sequence[Row]
    group: str
    legend: str

    def show(self, versions: Row) -> None:
        """Print it."""
        show_table(self.title, self.columns, self.table, self.group, more=versions)
        console = Console(soft_wrap=True, highlight=False, markup=False)
        for line in [*self.failures(), "", self.legend]:
            console.print(line)

    def markdown(self, versions: Row) -> str:
        """The same as Markdown, without ratios."""
        lines = [f"{name}: {value}" for name, value in header(versions).items() if name != "command"]
        command = f"`{header()['command']}`"
        tables = markdown_tables(self.columns, self.table, self.group)
        failures = [f"- {line}" for line in self.failures()]
        return "\n".join([command, "", "; ".join(lines) + ".", "", self.legend, "", tables, *failures]).rstrip() + "\n"

    def failures(self) -> list[str]:
        """A line for each row that has something to say of a failure."""
        return [f"failed: {row[self.group]}: {row['policy']}: {row['error']}" for row in self.rows if "error" in row]


def measure_cases(cases: Sequence[Case], candidates: Sequence[Candidate], repeats: int) -> list[Row]:
    """The rows of all cases; says on stderr how far it is."""
    rows: list[Row] = []
    for number, case in enumerate(cases, start=1):
        references = reference_rows(case)
        bound = references[-1]["par_planned"]
        for candidate in candidates:
            start = time.perf_counter()
            rows.append(measure(case, candidate, repeats, bound))
            failed = f", failed: {rows[-1]['failures']}" if "failures" in rows[-1] else ""
            _progress(
                f"[{number}/{len(cases)}] {case.name}: {candidate.label}: {time.perf_counter() - start:.1f} s{failed}"
            )
        rows += references
    return rows


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(  # size: options of a command
    policy: Annotated[
        list[str] | None, typer.Option(help="Name, or name:option=value,...; may be given again.")
    ] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only these cases; may be given again.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="name:option=[values], a curve in the plots; may be given again.")
    ] = None,
    traces: Annotated[
        Path, typer.Option(help="Folder of recorded traces; left out if it is not there.")
    ] = DEFAULT_TRACES,
    peers_dir: Annotated[
        Path | None, typer.Option(envvar="EPLB_PEERS", help="Folder with other engines' unpacked wheels.")
    ] = None,
    interval: Annotated[
        int | None, typer.Option(min=1, help="Windows in an interval of the @steps cases; each has its own by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times each plan is timed; once if it takes long.")] = 3,
    scaling: Annotated[bool, typer.Option("--scaling", help="Time against size, instead of the cases.")] = False,
    limit: Annotated[
        float, typer.Option(min=0, help="--scaling: seconds per plan beyond which a policy is left out.")
    ] = 2.0,
    json: Annotated[Path | None, typer.Option(help="Also write the rows to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Also draw pictures in this folder (needs matplotlib).")] = None,
) -> None:
    """Compare policies: time per plan, PAR on the planned interval and the next, share of slots moved."""
    for file in (json, markdown):
        if file is not None and not file.absolute().parent.is_dir():
            raise typer.BadParameter(f"{file} cannot be written: {file.parent} is not a folder")
    try:
        candidates = chosen_candidates(policy or [], sweep or [], load_peers_from(peers_dir))
        cases = [] if scaling else chosen_cases(case or [], traces, interval)
    except (EplbError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if scaling:
        rows = measure_scaling(candidates, limit, repeats, _progress, SERIES)
        columns, table = scaling_table(rows)
        report = Report("policies: time against size", columns, table, rows, "series", SCALING_LEGEND.format(limit))
    else:
        rows = measure_cases(cases, candidates, repeats)
        report = Report("policies (ratios to the first of each case)", COLUMNS, rows, rows, "case", LEGEND)
    versions: Row = dict(peer_versions(peers_dir))
    report.show(versions)
    if json is not None:
        write_json(json, "policies", rows, versions)
    if markdown is not None:
        write_whole(markdown, report.markdown(versions).encode())
    if plots is not None:
        draw = draw_scaling if scaling else draw_cases
        for line in draw(rows, plots):
            _progress(line)


if __name__ == "__main__":
    typer.run(main)

"""What a replay tells of each configuration: plain data for programs, a table for people."""

from collections import Counter
from collections.abc import Sequence

import msgspec
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from eplb_async.observability.history import Decision, Outcome

__all__ = ["ReplayReport", "replay_tables"]

MIB = 1 << 20


class ReplayReport(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration's course over a trace; JSON-able.

    Fields:
        name, policy: of the configuration.
        num_steps: replayed; num_measured: those of them whose balance was measured.
        par_mean, par_p99: of the measured steps' PAR (mean over layers) under the placement that was live, on the step's own load.
        par_initial: the same mean under the initial placement.
        num_plans, num_decisions: plans that committed something; decisions, those included that moved nothing.
        moves, bytes_moved: slots filled anew, and bytes pulled for them; bytes_per_step: of all ranks together.
        total_s, ideal_s: time of all steps, and what it were with perfect balance and without stalls.
        stall_s: part of total_s that steps waited for commits.
        behind_steps: mean steps from a plan's trigger to its last commit.
        decisions: as `eplb-async history` has them; of the replayed time.
        series: (step, mean PAR) of consecutive measured steps, for pictures.
    """

    name: str
    policy: str
    num_steps: int
    num_measured: int
    par_mean: float
    par_p99: float
    par_initial: float
    num_plans: int
    num_decisions: int
    moves: int
    bytes_moved: int
    bytes_per_step: float
    total_s: float
    ideal_s: float
    stall_s: float
    behind_steps: float
    decisions: list[Decision]
    series: list[tuple[int, float]]


def replay_tables(reports: Sequence[ReplayReport]) -> Group:
    """One line for each configuration, and below it why its plans were made, or were not."""
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=True)
    table.add_column("configuration", no_wrap=True)
    for title in (
        "policy",
        "PAR mean",
        "p99",
        "MiB/step",
        "of first",
        "moves",
        "plans",
        "stalls, s",
        "total, s",
        "ideal, s",
    ):
        table.add_column(title, justify="right" if title != "policy" else "left", no_wrap=True)
    first = reports[0].bytes_moved
    for report in reports:
        table.add_row(
            escape(report.name),
            escape(report.policy),
            f"{report.par_mean:.4f}",
            f"{report.par_p99:.4f}",
            f"{report.bytes_per_step / MIB:,.2f}",
            f"{report.bytes_moved / first:.1%}" if first else "-",
            f"{report.moves:,}",
            f"{report.num_plans}/{report.num_decisions}",
            f"{report.stall_s:.3f}",
            f"{report.total_s:,.1f}",
            f"{report.ideal_s:,.1f}",
        )
    return Group(table, "", *[_reasons(report) for report in reports])


def _reasons(report: ReplayReport) -> RenderableType:
    """How often each kind of trigger led to which outcome; numbers in the reasons are left out."""
    kinds = Counter((_kind(decision), decision.outcome) for decision in report.decisions)
    if not kinds:
        return f"[dim]{escape(report.name)}[/]: no decision; initial placement PAR {report.par_initial:.4f}"
    told = ", ".join(f"{count} x {kind}: {outcome.value}" for (kind, outcome), count in kinds.most_common(6))
    failed = next((d.why for d in report.decisions if d.outcome is Outcome.FAILED), "")
    return f"[dim]{escape(report.name)}[/]: {escape(told)}" + (f" ({escape(failed)})" if failed else "")


def _kind(decision: Decision) -> str:
    """A trigger without its numbers: "PAR 1.2 > 1.05 after 300 steps" is "PAR > after steps"."""
    words = [word for word in decision.trigger.split() if not any(char.isdigit() for char in word)]
    return " ".join(words)

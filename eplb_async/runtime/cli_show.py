"""What the command line prints for people."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from eplb_async.observability.history import Decision, Outcome
from eplb_async.runtime.messages import CostStatus, DaemonStatus, GroupStatus, PhaseStatus, ShadowStatus

__all__ = ["fail", "show_decision", "show_garbage", "show_history", "show_status", "watch_status"]

_COLOURS = {
    Outcome.FINISHED: "green",
    Outcome.DROPPED: "red",
    Outcome.FAILED: "red",
    Outcome.UNKNOWN: "yellow",
    Outcome.PUBLISHED: "cyan",
    Outcome.PLANNING: "cyan",
}
_STATES = {"serving": "green", "joining": "yellow", "paused": "yellow", "ended": "red"}


def fail(message: str) -> NoReturn:
    """One red line on standard error, and status 1."""
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(message)}", highlight=False)
    sys.exit(1)


def show_status(status: DaemonStatus) -> None:
    """Print a status once."""
    Console().print(_status(status))


def watch_status(read: Callable[[], DaemonStatus]) -> None:
    """Show the status anew every second until interrupted."""
    with Live(_status(read()), auto_refresh=False) as live:
        while True:
            time.sleep(1)
            live.update(_status(read()), refresh=True)


def show_history(histories: Mapping[str, Sequence[Decision]]) -> None:
    """Print decisions, a table per group."""
    console = Console()
    if not any(histories.values()):
        console.print("no decisions yet")
    for group, decisions in histories.items():
        if decisions:
            console.print(f"[bold]{escape(group)}[/]", _decisions(decisions), sep="\n")


def show_decision(decision: Decision) -> None:
    """Print one decision in full."""
    console, colour = Console(highlight=False), _COLOURS.get(decision.outcome, "default")
    console.print(f"[{colour}]{decision.outcome.value}[/]: {escape(decision.why or decision.trigger)}")
    table = Table.grid(padding=(0, 2))
    rows = {
        "group": f"{decision.group}, generation {decision.generation}",
        "policy": decision.policy,
        "PAR": f"{_par(decision.par_live)} live, {_par(decision.par_predicted)} predicted",
        "layers": f"{len(decision.layers)} of {len(decision.par_live_L)} change in {decision.num_entries} commits",
        "moves": f"{decision.num_moves} ({_bytes(decision.bytes_moved)}, {_bytes(decision.bytes_between_ranks)} between ranks)",
        "step": _time(decision) or "-",
        "time": f"{_seconds(decision.decide_s)} to decide, {_seconds(decision.trigger_to_last_commit_s)} to the last commit",
    }
    for name, text in rows.items():
        table.add_row(f"[dim]{name}[/]", escape(text))
    console.print(table)


def show_garbage(segments: Sequence[tuple[str, int, str]], *, dry_run: bool) -> None:
    """Print stale segments as (name, bytes, why)."""
    console = Console(highlight=False)
    for name, num_bytes, why in segments:
        console.print(f"{'would remove' if dry_run else 'removed'} {escape(name)} ({_bytes(num_bytes)}): {escape(why)}")
    if not segments:
        console.print("nothing is stale")


def _status(status: DaemonStatus) -> Group:
    head = Text(
        f"eplb-async {status.release}, pid {status.pid}, up {_seconds(status.uptime_s)}, policy {status.policy}, "
        f"{status.cpu_share:.1%} of a core, {_bytes(status.memory_bytes)}, loop lag {1e3 * status.loop_lag_s:.1f} ms "
        f"(worst {1e3 * status.loop_lag_worst_s:.0f} ms)"
    )
    if not status.groups:
        return Group(head, Text("no groups; ranks appear here when they attach", style="dim"))
    return Group(head, *(_group(group) for group in status.groups))


def _group(group: GroupStatus) -> Group:
    head = Text.from_markup(
        f"\n[bold]{escape(group.group)}[/] [{_STATES.get(group.state, 'default')}]{group.state}[/]"
        f" incarnation {group.incarnation}, generation {group.generation}, PAR live {_par(group.par_live)}"
        f" ({group.windows} windows of {group.window_steps} steps), {group.lost_records} records lost"
    )
    parts: list[Text | Table] = [head, *(Text(f"  {problem}", style="yellow") for problem in group.problems)]
    if group.plan is not None:
        plan = group.plan
        progress = f"{plan.staged} staged, {plan.committed} committed of {plan.num_entries}"
        parts.append(
            Text(f"  plan {plan.generation}: {progress}, {_seconds(plan.age_s)} old ({plan.reason})", style="cyan")
        )
    elif group.planning:
        parts.append(Text("  a policy is planning", style="cyan"))
    if group.shadow is not None:
        parts.append(Text(f"  shadow: {_shadow(group.shadow)}", style="magenta"))
    if group.phases:
        steps = ", ".join(f"{number} {phase}" for phase, number in group.phases.items())
        parts.append(Text(f"  steps of ranks: {steps}; placement serves {group.serves}", style="dim"))
    parts += [Text(f"  {_phase(load)}", style="dim") for load in group.phase_loads]
    if group.cost is not None:
        parts.append(Text(f"  {_cost(group.cost)}", style="dim"))
    if group.ranks:
        parts.append(_ranks(group))
    if group.decisions:
        parts.append(_decisions(group.decisions))
    return Group(*parts)


def _phase(load: PhaseStatus) -> str:
    counts = f"; a token counts {load.weight:g}" if load.weight != 1 else ""
    return f"{load.phase}: PAR live {_par(load.par_live)} ({load.windows} windows), {load.tokens:,} tokens in {load.steps:,} steps{counts}"


def _shadow(shadow: ShadowStatus) -> str:
    if shadow.par_live is None or shadow.par_shadow is None:
        return "no window is complete yet"
    gained = f"PAR {shadow.par_live:.3f} as served, {shadow.par_shadow:.3f} had plans been applied"
    return (
        f"{gained} ({shadow.windows} windows); {shadow.plans} plans, {shadow.moves} moves, {_bytes(shadow.bytes_moved)}"
    )


def _cost(cost: CostStatus) -> str:
    if not cost.known:
        return (
            f"a step of {cost.step_ms:.2f} ms; what tokens cost is not known yet: their number has not varied enough "
            f"({cost.windows} windows)"
        )
    return (
        f"a step of {cost.step_ms:.2f} ms: {cost.fixed_ms:.2f} fixed, {cost.even_ms:.2f} of all tokens, {cost.tokens_ms:.2f} +- {cost.tokens_error_ms:.2f} of the "
        f"busiest rank's, "
        f"{cost.pulls_ms:.2f} of pulls, {cost.commits_ms:.2f} of commits ({cost.windows} windows)"
    )


def _time(decision: Decision) -> str:
    """What was predicted of steps, and what they took; "" if neither is known."""
    predicted = realised = ""
    if decision.saved_ms_per_step is not None:
        saved, moving = decision.saved_ms_per_step, decision.moving_ms or 0.0
        predicted = f"predicted to save {saved:.3f} ms per step for {moving:.1f} ms of moves ({decision.cost_fit})"
    if decision.step_ms_before is not None:
        realised = f"a step took {decision.step_ms_before:.3f} ms before, {decision.step_ms_after:.3f} after"
    return "; ".join(filter(None, (predicted, realised)))


def _ranks(group: GroupStatus) -> Table:
    names = ("rank", "pid", "state", "step", "staged", "committed", "records", "lost", "missed", "damaged", "unfolded")
    table = _table(*names, "budget", "pauses", "slowed")
    for rank in group.ranks:
        counters = (f"{generation}.{position}" for generation, position in (rank.staged, rank.committed))
        state = f"[red]{rank.state}[/]" if rank.state == "gone" else rank.state
        numbers = (rank.records, rank.lost, rank.missed, rank.damaged, rank.unfolded)
        pace = (_bytes(rank.budget_bytes), str(rank.pauses), str(rank.slowdowns))
        table.add_row(str(rank.rank), str(rank.pid), state, str(rank.step), *counters, *map(str, numbers), *pace)
    return table


def _decisions(decisions: Sequence[Decision]) -> Text:
    """Two lines each: what came of it in numbers, and why; then whether it paid, and what it did to step times, as far as that is known."""
    lines = []
    for decision in decisions:
        when = time.strftime("%H:%M:%S", time.localtime(decision.time_unix_s))
        colour = _COLOURS.get(decision.outcome, "default")
        numbers = f"PAR {_par(decision.par_live)}"
        if decision.par_predicted is not None:
            realised = f", realised {_par(decision.par_realised)}" if decision.num_committed else ""
            numbers += f" -> {_par(decision.par_predicted)} predicted{realised}"
        if decision.num_moves:
            took = f" in {_seconds(decision.trigger_to_last_commit_s)}" if decision.num_committed else ""
            numbers += f"; {decision.num_moves} moves, {_bytes(decision.bytes_moved)}{took}"
        outcome = f"[{colour}]{decision.outcome.value}[/]" + (" (shadow)" if decision.shadow else "")
        lines.append(f"  #{decision.number} {when} generation {decision.generation} {outcome}  {numbers}")
        why = f"; {decision.why}" if decision.why else ""
        lines.append(f"     [dim]{escape(decision.trigger + why)}[/]")
        if decision.verdict:
            trust = f"; trust {decision.trust:.2f} -> {decision.trust_after:.2f}" if decision.trust_after else ""
            lines.append(f"     [dim]{escape(decision.verdict + trust)}[/]")
        if time_told := _time(decision):
            lines.append(f"     [dim]{escape(time_told)}[/]")
    return Text.from_markup("\n".join(lines))


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=True)
    for column in columns:
        table.add_column(column, justify="left" if column == "state" else "right")
    return table


def _par(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1e3 * value:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"

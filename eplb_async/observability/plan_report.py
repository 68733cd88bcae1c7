"""What `eplb-async plan` tells of a placement: plain data for programs, and tables for people.

layer   PAR before -> after   next before -> after   busiest rank   bound    gap   moved   changed
    0        2.310    1.004         2.288    1.171       16 384.0  16 320.0  0.4 %    271       288
"""

from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

__all__ = ["PlanReport", "plan_tables"]


class PlanReport(msgspec.Struct, frozen=True, kw_only=True):
    """A new placement, and what is known of it; JSON-able.

    A name that ends in `_L` has one value per layer; the same name without it is the mean over layers, unless noted.
    `before` is the current placement, `next` the windows after those that were planned on.

    Fields:
        policy, options: its options and those of every policy, with defaults filled in.
        num_layers, num_experts, num_slots, num_ranks, num_nodes, num_expert_groups, table_length: L, E, P, R, N, groups, K.
        num_windows: of the whole trace.
        windows, next_windows: [A, B]: windows A..B-1 were planned on, or came next; None: there are none.
        par, par_max: peak-to-average rank load over the windows, weighted by their tokens: mean and greatest over layers.
        balancedness: sum over layers of the mean rank load / that of the busiest rank's, on the sum of the windows.
        max_load: tokens of the busiest rank on the sum of the windows; the greatest over layers.
        bound: tokens that the busiest rank has at least, with any placement; the greatest over layers.
        gap, gap_max: max_load_L / bound_L - 1, mean and greatest over layers. 0 is proof of an optimum.
        moved: slots that get an expert which their rank did not hold, whatever the order of slots: what comes from
            another rank; the sum over layers. moved_share: as a share of all L * P slots.
        slots_changed: slots with another content than before, numbered as the policy does; the sum over layers.
        layers_changed: layers with any such slot.
        transfer_bytes: moved * bytes of a slot; None where those were not given.
        ms, cpu_ms: elapsed and CPU milliseconds of the policy function alone, warm; median of `repeats` plans.
        warm_up_ms: elapsed, of the policy's warm-up (it may compile) and a first plan.
        weighted_layers: layers whose experts' tokens are split unevenly over their slots (option dispatch); all numbers after
            are with that split. dispatch_ms: elapsed, of fitting it, warm; None for an even split.
        dispatch: the slots that get an expert's tokens in turn, [L][E][1..K]; None for an even split.
        slot_to_expert: the new placement, [L][P]; -1 is an empty slot.
    """

    policy: str
    options: dict[str, Any]
    num_layers: int
    num_experts: int
    num_slots: int
    num_ranks: int
    num_nodes: int
    num_expert_groups: int
    table_length: int
    num_windows: int
    windows: tuple[int, int]
    next_windows: tuple[int, int] | None
    par: float
    par_max: float
    par_before: float
    par_before_max: float
    par_next: float | None
    par_next_max: float | None
    par_next_before: float | None
    par_next_before_max: float | None
    balancedness: float
    balancedness_before: float
    max_load: float
    max_load_before: float
    bound: float
    gap: float
    gap_max: float
    moved: int
    moved_share: float
    slots_changed: int
    layers_changed: int
    transfer_bytes: int | None
    ms: float
    cpu_ms: float
    repeats: int
    warm_up_ms: float
    weighted_layers: int
    dispatch_ms: float | None
    par_L: list[float]
    par_before_L: list[float]
    par_next_L: list[float] | None
    par_next_before_L: list[float] | None
    max_load_L: list[float]
    max_load_before_L: list[float]
    bound_L: list[float]
    gap_L: list[float]
    moved_L: list[int]
    slots_changed_L: list[int]
    dispatch: list[list[list[int]]] | None
    slot_to_expert: list[list[int]]


def plan_tables(report: PlanReport) -> Group:
    """A table of layers, and below it the whole in words."""
    return Group(_layers(report), "", _whole(report))


def _layers(report: PlanReport) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=True)
    columns = ["layer", "PAR before", "after"]
    columns += ["next before", "next after"] if report.next_windows else []
    for title in [*columns, "busiest rank", "bound", "gap", "moved", "changed"]:
        table.add_column(title, justify="right", no_wrap=True)
    for layer in range(report.num_layers):
        par = [report.par_before_L, report.par_L, report.par_next_before_L, report.par_next_L]
        tokens = [f"{load_L[layer]:,.1f}" for load_L in (report.max_load_L, report.bound_L)]
        moves = [str(count_L[layer]) for count_L in (report.moved_L, report.slots_changed_L)]
        values = [f"{par_L[layer]:.3f}" for par_L in par if par_L is not None]
        table.add_row(str(layer), *values, *tokens, f"{report.gap_L[layer]:.1%}", *moves)
    return table


def _whole(report: PlanReport) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    slots = report.num_layers * report.num_slots
    rows = {
        "model": f"{report.num_layers} layers x {report.num_experts} experts on {report.num_slots} slots "
        f"(ranks: {report.num_ranks}, nodes: {report.num_nodes}, expert groups: {report.num_expert_groups}, "
        f"most replicas: {report.table_length})",
        "policy": f"{report.policy} {_options(report.options)}",
        "windows": f"{_span(report.windows)} of {report.num_windows}"
        + (f"; next are {_span(report.next_windows)}" if report.next_windows else "; none after them"),
        "PAR": f"{report.par_before:.4f} -> {report.par:.4f} mean over layers, "
        f"{report.par_before_max:.4f} -> {report.par_max:.4f} worst",
        "PAR next": _next(report),
        "balancedness": f"{report.balancedness_before:.4f} -> {report.balancedness:.4f}",
        "busiest rank": f"{report.max_load_before:,.2f} -> {report.max_load:,.2f} tokens in the worst layer; "
        f"bound {report.bound:,.2f}",
        "gap to bound": f"{report.gap:.2%} mean over layers, {report.gap_max:.2%} worst",
        "moves": f"{report.moved:,} of {slots:,} slots get an expert new on their rank ({report.moved_share:.1%}); "
        f"{report.slots_changed:,} slots of {report.layers_changed} layers change",
        "transfer": "" if report.transfer_bytes is None else _bytes(report.transfer_bytes),
        "dispatch": "" if report.dispatch is None else f"weighted in {report.weighted_layers} layers",
        "time": f"{report.ms:.2f} ms ({report.cpu_ms:.2f} ms CPU), median of {report.repeats} warm plans; "
        + ("" if report.dispatch_ms is None else f"{report.dispatch_ms:.2f} ms to fit dispatch; ")
        + f"{report.warm_up_ms:,.0f} ms to warm up",
    }
    for name, text in rows.items():
        if text:
            table.add_row(f"[dim]{name}[/]", escape(text))
    return table


def _next(report: PlanReport) -> str:
    """Empty where there are no next windows."""
    means, worst = (report.par_next_before, report.par_next), (report.par_next_before_max, report.par_next_max)
    numbers = [f"{value:.4f}" for value in (*means, *worst) if value is not None]
    return "{} -> {} mean over layers, {} -> {} worst".format(*numbers) if numbers else ""


def _span(span: tuple[int, int]) -> str:
    return f"{span[0]}:{span[1]}"


def _options(options: dict[str, Any]) -> str:
    return f"({', '.join(f'{name}={value}' for name, value in options.items())})" if options else ""


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"

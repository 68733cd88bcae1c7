"""What the advisor says: plain data for programs, a table and settings for people."""

from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

__all__ = ["Advice", "Candidate", "advice_shown", "settings_text"]

MIB, GIB = 1 << 20, 1 << 30


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration that was replayed.

    Fields:
        name, policy: of it.
        redundant: experts beside one of each.
        daemon: settings of the table `daemon` that are not as they are by default.
        par_mean, par_p99: of the steps.
        num_plans: that committed something.
        bytes_per_step: moved, of all ranks together.
        memory_bytes: that its redundant experts take on each rank, more than the baseline's.
        total_s, stall_s: of the replayed steps, and that commits held them up.
        saving: share of the baseline's time.
    """

    name: str
    redundant: int
    policy: str
    daemon: dict[str, Any]
    par_mean: float
    par_p99: float
    num_plans: int
    bytes_per_step: float
    memory_bytes: int
    total_s: float
    stall_s: float
    saving: float


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """The answer; JSON-able.

    Fields:
        rebalance: it pays to move experts here.
        chosen: what to run; the baseline where nothing pays.
        baseline: the initial placement, with as few redundant experts as divide over the ranks.
        possible_saving: share of the baseline's time that perfect balance would save.
        least_saving: what was asked for.
        reasons: for people.
        candidates: all that were replayed, the baseline first.
    """

    rebalance: bool
    chosen: Candidate
    baseline: Candidate
    possible_saving: float
    least_saving: float
    reasons: list[str]
    candidates: list[Candidate]


def advice_shown(advice: Advice) -> RenderableType:
    """For a terminal."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for title in (
        "redundant",
        "configuration",
        "PAR mean",
        "p99",
        "plans",
        "MiB/step",
        "GiB more per rank",
        "time saved",
    ):
        table.add_column(title, justify="left" if title == "configuration" else "right", no_wrap=True)
    for one in advice.candidates:
        style = "bold green" if one is advice.chosen else ""
        table.add_row(
            str(one.redundant),
            escape(one.name),
            f"{one.par_mean:.3f}",
            f"{one.par_p99:.3f}",
            str(one.num_plans),
            f"{one.bytes_per_step / MIB:,.1f}",
            f"{one.memory_bytes / GIB:,.2f}",
            f"{one.saving:+.2%}",
            style=style,
        )
    reasons = "\n".join(f"- {escape(reason)}" for reason in advice.reasons)
    return Group(table, "", f"[bold]{_verdict(advice)}[/]", reasons, "", escape(settings_text(advice)))


def settings_text(advice: Advice) -> str:
    """A settings file for what is advised, with comments; only comments where nothing is to move."""
    chosen = advice.chosen
    lines = [
        f"# redundant experts: {chosen.redundant} (vLLM: num_redundant_experts, SGLang: --ep-num-redundant-experts)"
    ]
    if not advice.rebalance:
        return "\n".join([*lines, "# no daemon is needed: leave EPLB's rebalancing off"])
    if not chosen.daemon:
        lines.append("# everything else as it is by default")
    return "\n".join([*lines, "[daemon]", *(f"{name} = {_toml(value)}" for name, value in chosen.daemon.items())])


def _verdict(advice: Advice) -> str:
    chosen = advice.chosen
    if advice.rebalance:
        return f"Rebalance: {escape(chosen.name)}, {chosen.redundant} redundant experts, {chosen.saving:.1%} of the time saved."
    if chosen.redundant > advice.baseline.redundant:
        return f"Do not rebalance here; {chosen.redundant} redundant experts where they are save {chosen.saving:.1%}."
    return "Do not rebalance here."


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(part)}" for name, part in value.items()) + " }"
    return msgspec.json.encode(value).decode()

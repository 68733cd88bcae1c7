"""What the demo shows at the end: numbers from arrays, then tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from eplb_async.core.score import par
from eplb_async.demo.reference import Reference
from eplb_async.demo.serving import RankResult
from eplb_async.demo.text import Stream

__all__ = ["DaemonFacts", "Rebalance", "Summary", "show", "summarise"]

AROUND = 8
"""Steps before a plan's first and after its last commit over which PAR is compared."""
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class DaemonFacts:
    """What only the daemon knows."""

    lost_records: int
    trigger_to_commit_s: dict[int, float]
    moves: dict[int, int]
    bytes_moved: dict[int, int]


class Rebalance(msgspec.Struct, frozen=True, kw_only=True):
    """One committed plan: where in the stream, and the realised PAR per layer around it.

    `static` is the PAR of the initial placement on the steps of `after`, the fair comparison when traffic changes.
    """

    plan: int
    domain: str
    first_step: int
    last_step: int
    layers: list[int]
    moves: int
    bytes_moved: int
    trigger_to_commit_s: float | None
    before: list[float]
    after: list[float]
    static: list[float]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The demo's result; what `--json` prints.

    PAR is the mean over steps and layers of max / mean over ranks of the rows that ranks computed: `par_static` under the
    initial placement on the same text, `par_live` as served, `par_live_after_first` from the first commit on, beside
    `par_static_after_first`. `worst_step_added_us` is the most host time that the hook took in a step in which a
    layer was committed or weights moved, waiting for other ranks included; `median_step_added_us` that of any step.
    """

    outputs_equal: bool
    logits_bit_equal: bool
    par_static: float
    par_live: float
    par_static_after_first: float
    par_live_after_first: float
    plans: int
    moves: int
    bytes_moved: int
    lost_records: int
    worst_step_added_us: float
    median_step_added_us: float
    median_step_us: float
    trigger_to_commit_s: float | None
    num_steps: int
    num_tokens: int
    seconds: float
    rebalances: list[Rebalance]
    steps_per_domain: int
    par_static_by_step: list[float]
    par_live_by_step: list[float]


def summarise(
    stream: Stream, ranks: Sequence[RankResult], reference: Reference, daemon: DaemonFacts, seconds: float
) -> Summary:
    """Compare what was served with the reference, and count."""
    live_TL = par(np.stack([rank.received_TL for rank in ranks], axis=-1))
    static_TL = par(np.sum([rank.static_TLR for rank in ranks], axis=0))
    next_TRBT = np.stack([rank.next_TBT for rank in ranks], axis=1)
    digests = tuple(zip(*[rank.digests for rank in ranks], strict=True))
    changed_T = ranks[0].changed_TL.any(axis=1)
    first = int(np.argmax(changed_T)) if changed_T.any() else stream.num_steps
    rebalances = _rebalances(stream, ranks[0], live_TL, static_TL, daemon)
    added_us = np.stack([rank.added_us_T for rank in ranks])
    times = sorted(daemon.trigger_to_commit_s.values())
    return Summary(
        outputs_equal=bool(np.array_equal(next_TRBT, reference.next_tokens)),
        logits_bit_equal=digests == reference.digests,
        par_static=float(static_TL.mean()),
        par_live=float(live_TL.mean()),
        par_static_after_first=float(static_TL[first:].mean()) if first < len(static_TL) else 1.0,
        par_live_after_first=float(live_TL[first:].mean()) if first < len(live_TL) else 1.0,
        plans=len(rebalances),
        moves=sum(daemon.moves.values()),
        bytes_moved=sum(daemon.bytes_moved.values()),
        lost_records=daemon.lost_records,
        worst_step_added_us=float(added_us[:, changed_T].max()) if changed_T.any() else float(added_us.max()),
        median_step_added_us=float(np.median(added_us)),
        median_step_us=float(np.median([rank.step_us_T for rank in ranks])),
        trigger_to_commit_s=times[len(times) // 2] if times else None,
        num_steps=stream.num_steps,
        num_tokens=next_TRBT.size,
        seconds=seconds,
        rebalances=rebalances,
        steps_per_domain=stream.steps_per_domain,
        par_static_by_step=[round(value, 4) for value in static_TL.mean(axis=1).tolist()],
        par_live_by_step=[round(value, 4) for value in live_TL.mean(axis=1).tolist()],
    )


def _rebalances(
    stream: Stream, rank: RankResult, live_TL: NDArray[np.float64], static_TL: NDArray[np.float64], daemon: DaemonFacts
) -> list[Rebalance]:
    found = []
    for plan in np.unique(rank.plan_T[rank.changed_TL.any(axis=1)]).tolist():
        steps = np.flatnonzero(rank.changed_TL.any(axis=1) & (rank.plan_T == plan))
        first, last = int(steps[0]), int(steps[-1])
        before, after = slice(max(0, first - AROUND), first), slice(last, last + AROUND)
        found.append(
            Rebalance(
                plan=plan,
                domain=stream.domain(first),
                first_step=first,
                last_step=last,
                layers=np.flatnonzero(rank.changed_TL[steps].any(axis=0)).tolist(),
                moves=daemon.moves.get(plan, 0),
                bytes_moved=daemon.bytes_moved.get(plan, 0),
                trigger_to_commit_s=daemon.trigger_to_commit_s.get(plan),
                before=live_TL[before].mean(axis=0).tolist(),
                after=live_TL[after].mean(axis=0).tolist(),
                static=static_TL[after].mean(axis=0).tolist(),
            )
        )
    return found


def show(summary: Summary, console: Console) -> None:
    """The tables."""
    layers = len(summary.rebalances[0].before) if summary.rebalances else 0
    table = Table(
        title=f"PAR per layer, {AROUND} steps before -> after each rebalance (static placement on the same steps)"
    )
    for name in (
        "plan",
        "step",
        "text",
        *[f"layer {layer}" for layer in range(layers)],
        "moves",
        "KiB",
        "trigger to commit",
    ):
        table.add_column(name, justify="left" if name == "text" else "right")
    for item in summary.rebalances:
        cells = [
            f"{before:.2f} -> [bold]{after:.2f}[/] [dim]({static:.2f})[/]"
            for before, after, static in zip(item.before, item.after, item.static, strict=True)
        ]
        taken = "-" if item.trigger_to_commit_s is None else f"{item.trigger_to_commit_s:.2f} s"
        row = [str(item.plan), str(item.first_step), item.domain, *cells]
        table.add_row(*row, str(item.moves), f"{item.bytes_moved / 1024:,.0f}", taken)
    console.print(table)
    console.print(_chart("static placement", summary.par_static_by_step, summary.steps_per_domain))
    console.print(_chart("as served", summary.par_live_by_step, summary.steps_per_domain))
    for name, value in _facts(summary):
        console.print(f"  {name:34} {value}")


def _facts(summary: Summary) -> list[tuple[str, str]]:
    equal = "[green]equal[/]" if summary.outputs_equal else "[red]DIFFERENT[/]"
    bits = "every logit bit for bit" if summary.logits_bit_equal else "logits not bit for bit"
    taken = "-" if summary.trigger_to_commit_s is None else f"{summary.trigger_to_commit_s:.2f} s (median)"
    return [
        ("outputs against the unsharded model", f"{equal} for {summary.num_tokens:,} tokens, {bits}"),
        ("PAR, whole stream", f"static {summary.par_static:.3f}, served [bold]{summary.par_live:.3f}[/]"),
        (
            "PAR from the first commit on",
            f"static {summary.par_static_after_first:.3f}, served [bold]{summary.par_live_after_first:.3f}[/]",
        ),
        ("plans, moves, bytes", f"{summary.plans}, {summary.moves}, {summary.bytes_moved:,}"),
        ("from trigger to last commit", taken),
        (
            "hook per step, waiting included",
            f"{summary.median_step_added_us:,.0f} us of {summary.median_step_us:,.0f} (median)",
        ),
        ("worst step with a commit", f"{summary.worst_step_added_us:,.0f} us in the hook"),
        ("lost load records", str(summary.lost_records)),
        ("time", f"{summary.seconds:.1f} s"),
    ]


def _chart(name: str, values: Sequence[float], steps_per_domain: int) -> str:
    """One line of blocks, a block per four steps, from PAR 1.0 to 2.0."""
    means = [float(np.mean(values[first : first + 4])) for first in range(0, len(values), 4)]
    blocks = [_BLOCKS[min(7, max(0, int((value - 1.0) * 8)))] for value in means]
    per_domain = max(1, steps_per_domain // 4)
    groups = ["".join(blocks[first : first + per_domain]) for first in range(0, len(blocks), per_domain)]
    return f"  {name:18} {'|'.join(groups)}"

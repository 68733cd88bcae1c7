"""The chaos run behind `scripts/chaos`: seeded random faults, one after the other, and a check of everything after each.

After every event the ranks go on stepping, all that they and the daemons did is a behaviour of tests/model, every slot and
every routed token found the right expert, and at the end nothing is left in shared memory. See tests/faults/chaos_events.py
for the events, docs/faults.md for what each must come to.
"""

import json as json_module
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from eplb_async.shm.gc import collect_garbage
from eplb_async.shm.segment import list_segments
from tests.faults.chaos_events import EVENTS
from tests.faults.chaos_group import ChaosGroup, Tally

__all__ = ["app", "problems_of", "run_chaos", "segments_of"]

app = typer.Typer(add_completion=False)

STEPS_BETWEEN = (3, 10, 25)
"""Steps that are waited for after an event."""


def run_chaos(
    group: ChaosGroup,
    num_events: int,
    seed: int,
    minutes: tuple[float, float] = (0.0, float("inf")),
    told: Callable[[str], None] = lambda _: None,
) -> Tally:
    """Let that many events happen, in (at least, at most) so many minutes; ends all ranks in order."""
    rng = random.Random(seed)
    names, weights = list(EVENTS), [weight for _, weight in EVENTS.values()]
    order = rng.sample(names, len(names)) + rng.choices(names, weights, k=max(0, num_events - len(names)))
    start, spacing_s = time.monotonic(), 60.0 * minutes[0] / max(1, num_events)
    for number, name in enumerate(order[:num_events]):
        if time.monotonic() - start > 60.0 * minutes[1]:
            break
        group.tally.counts[name] += 1
        problems = len(problems_of(group.tally))
        what = EVENTS[name][0](group, rng)
        group.wait_steps(rng.choice(STEPS_BETWEEN))
        group.check()
        if group.daemon is None or group.daemon.poll() is not None:
            group.tally.surprises.append(f"no daemon runs after {name} ({what})")
            group.kill_daemon()
            group.start_daemon()
        found = problems_of(group.tally)[problems:]
        told(f"{number:4} {name}: {what}" + "".join(f"\n     !! {problem}" for problem in found))
        time.sleep(max(0.0, start + (number + 1) * spacing_s - time.monotonic()))
    group.end_incarnation()
    return group.tally


def problems_of(tally: Tally) -> list[str]:
    """All that must not have been."""
    return [*tally.violations, *tally.wrong, *tally.surprises]


def segments_of(group: str) -> list[str]:
    """Names of the segments that a group has."""
    return [name for name, owner, _ in list_segments() if owner == group]


@app.command()
def main(
    events: Annotated[int, typer.Option(help="How many.")] = 1000,
    minutes: Annotated[float, typer.Option(help="Spread them over so long at least.")] = 30.0,
    most: Annotated[float, typer.Option(help="End after so many minutes, whatever is left.")] = float("inf"),
    seed: Annotated[int, typer.Option(help="Of the events.")] = 0,
    log: Annotated[Path | None, typer.Option(help="Write a line for each event here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Let faults happen to four ranks and their daemon; status 1 if an invariant, an output or a segment suffered.

    Example: scripts/chaos --events 50 --minutes 0 --seed 7
    """
    console, name, start = Console(stderr=True), f"chaos-{uuid4().hex[:8]}", time.monotonic()
    with tempfile.TemporaryDirectory(prefix="eplb-", dir="/tmp") as directory, Progress(console=console) as progress:
        task = progress.add_task("chaos", total=events)
        lines = log.open("w", encoding="utf-8", buffering=1) if log else None

        def told(line: str) -> None:
            progress.advance(task)
            if lines is not None:
                lines.write(f"{time.monotonic() - start:8.1f} {line}\n")

        with ChaosGroup(name, Path(directory)) as group:
            tally = run_chaos(group, events, seed, (minutes, most), told)
    left = segments_of(name)
    collect_garbage(name)
    _report(tally, {"minutes": (time.monotonic() - start) / 60, "left": left}, console, json)
    raise typer.Exit(1 if problems_of(tally) or left else 0)


def _report(tally: Tally, more: dict[str, Any], console: Console, as_json: bool) -> None:
    fields = ("steps", "commits", "plans", "drops", "aborts", "incarnations", "reloaded_layers", "refused_joins")
    numbers = {name: getattr(tally, name) for name in (*fields, "trace_events")}
    numbers |= {
        "violations": len(tally.violations),
        "wrong outputs": len(tally.wrong),
        "surprises": len(tally.surprises),
    }
    numbers |= {"minutes": round(more["minutes"], 1), "leaked segments": len(more["left"])}
    if as_json:
        print(json_module.dumps({**numbers, "events": dict(tally.counts), "problems": problems_of(tally)}))
        return
    table = Table("event", "times")
    for event, times in tally.counts.most_common():
        table.add_row(event, str(times))
    console.print(table)
    for key, value in numbers.items():
        console.print(f"{key:20} {value}")
    for problem in problems_of(tally)[:20]:
        console.print(problem, markup=False)


if __name__ == "__main__":
    app()

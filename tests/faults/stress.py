"""The stress run behind `scripts/stress`: many daemons, each killed at a random moment of its work.

After every kill the ranks go on stepping, what is active is finished or dropped by all alike, a new daemon adopts the
live placement, and its first plan is committed by all ranks before it is killed in turn.
"""

import json as json_module
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from eplb_async.shm.gc import collect_garbage
from eplb_async.shm.launch import daemon_running
from eplb_async.shm.segment import list_segments
from tests.faults.harness import MOMENTS, FaultGroup, RankReport, wait_for

__all__ = ["app", "kill_daemons", "problems_of"]

app = typer.Typer(add_completion=False)


def kill_daemons(group: FaultGroup, num_kills: int, seed: int, progress: object = None) -> dict[str, object]:
    """Kill that many daemons, at each moment of MOMENTS in turn; what happened.

    Raises:
        TimeoutError: a new daemon's plan was not committed within 60 s.
    """
    rng = np.random.default_rng(seed)
    reached: Counter[str] = Counter()
    recovery_s = []
    pid = group.start_daemon()
    for kill in range(num_kills):
        moment = MOMENTS[kill % len(MOMENTS)]
        generation = group.counter()[0]
        if group.kill_daemon(moment, pid, rng):
            reached[moment] += 1
        # its socket is gone before its lock is free
        wait_for(lambda: not daemon_running(group.settings), 10, "the daemon to die")
        start = time.monotonic()
        pid = group.start_daemon()
        # one plan of the new daemon: what the old one left ends as one generation at most, so two more are enough
        wait_for(lambda: group.counter()[0] >= generation + 2, 60, f"a plan after kill {kill} ({moment})")  # noqa: B023
        recovery_s.append(time.monotonic() - start)
        if progress is not None:
            progress()  # type: ignore[operator]
    return {
        "kills": num_kills,
        "reached": dict(reached),
        "recovery_p50_s": float(np.median(recovery_s)),
        "recovery_max_s": max(recovery_s),
    }


def problems_of(reports: list[RankReport]) -> list[str]:
    """What is wrong with a run: wrong weights, ranks that ended by themselves, forwards with different maps."""
    problems = [wrong for report in reports for wrong in report.wrong]
    problems += [f"rank {report.rank} ended: {report.ended}" for report in reports if report.ended != "stopped"]
    lengths = {len(report.maps) for report in reports}
    if len(lengths) > 1:
        problems.append(f"ranks made different numbers of steps: {sorted(lengths)}")
    for step, maps in enumerate(zip(*[report.maps for report in reports], strict=False)):
        if len(set(maps)) > 1:
            problems.append(f"step {step} ran with different maps")
            break
    return problems


@app.command()
def main(
    kills: Annotated[int, typer.Option(help="Daemons to kill.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Kill the daemon again and again while four ranks serve; status 1 if anything was wrong.

    Example: scripts/stress --kills 20 --seed 7
    """
    console = Console(stderr=True)
    name = f"stress-{uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="eplb-") as directory, Progress(console=console) as progress:
        task = progress.add_task("killing daemons", total=kills)
        with FaultGroup(name, Path(directory)) as group:
            found = kill_daemons(group, kills, seed, lambda: progress.advance(task))
            reports = group.stop()
        collect_garbage(name)
    left = [segment for segment, owner, _ in list_segments() if owner == name]
    problems = problems_of(reports) + [f"left in shared memory: {segment}" for segment in left]
    found |= {
        "steps": len(reports[0].maps),
        "generation": reports[0].generation,
        "drops": reports[0].drops,
        "worst_before_forward_us": max(report.worst_step_us for report in reports),
        "problems": problems,
    }
    if json:
        print(json_module.dumps(found))
    else:
        for key, value in found.items():
            console.print(f"{key:24} {value}")
    raise typer.Exit(1 if problems else 0)

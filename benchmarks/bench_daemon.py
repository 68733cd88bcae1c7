"""What the daemon costs: its share of a core and its memory while it reads the loads of all ranks of a node.

    python -m benchmarks.bench_daemon
    python -m benchmarks.bench_daemon --ranks 8 --rate 200 --seconds 30 --records 200000 --json daemon.json

This process writes the rings and words of all ranks, as hooks would; the daemon is a real one, in a process of its own,
with its pool of workers (which are counted apart: they only run while a plan is made). First at the given rate for the
CPU share, then as fast as the daemon follows, until `--records` records were read, for the memory.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import Progress

from benchmarks.reporting import Column, show_table, write_json
from eplb_async.core.config import daemon_variables, load_settings
from eplb_async.core.load import LoadKind, Phase
from eplb_async.core.placement import initial_placement
from eplb_async.core.plan import FIRST_COUNTER, NO_PLAN
from eplb_async.core.spec import MoESpec
from eplb_async.runtime.client import ControlClient
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.launch import ensure_daemon, group_lock_path
from eplb_async.shm.live import LivePlacement
from eplb_async.shm.ring import LoadRing, RingInfo
from eplb_async.shm.words import AgreementWords, GroupInfo, MemberState

__all__ = ["main"]

COLUMNS = [
    Column(key="what", title="phase"),
    Column(key="records_per_s", title="records/s", digits=0),
    Column(key="cpu_percent", title="daemon, % of a core", digits=2, ratio=True),
    Column(key="memory_mib", title="memory MiB", digits=1, ratio=True),
    Column(key="lost", title="lost records"),
]
GROUP = "bench-daemon"
TICKS = os.sysconf("SC_CLK_TCK")


class Ranks:
    """The shared segments of all ranks of a group, and their steps."""

    def __init__(self, spec: MoESpec) -> None:
        info = GroupInfo(
            group=GROUP, spec=spec, lag=2, history=64, staging_rows=2, slot_bytes=[1] * spec.num_layers, tensors=""
        )
        incarnation = time.time_ns()
        self.board = PlanBoard.create(GROUP, spec, incarnation)
        self.live = LivePlacement.create(GROUP, spec, initial_placement(spec), incarnation)
        self.rings = []
        for rank in range(spec.num_ranks):
            ring = RingInfo(
                group=GROUP,
                rank=rank,
                kind=LoadKind.LOGICAL,
                num_layers=spec.num_layers,
                width=spec.num_experts,
                num_records=256,
            )
            self.rings.append(LoadRing.create(ring, incarnation))
        self.words = AgreementWords.create(info, incarnation)
        for rank in range(spec.num_ranks):
            self.words.join(rank, os.getpid())
            self.words.set_state(rank, MemberState.READY)
        self.counts = np.random.default_rng(0).poisson(100, (spec.num_layers, spec.num_experts)).astype(np.int32)
        self.num_steps = 0

    def step(self) -> None:
        """One step of all ranks."""
        for rank, ring in enumerate(self.rings):
            self.words.publish(rank, self.num_steps, (FIRST_COUNTER, FIRST_COUNTER, 0, NO_PLAN))
            ring.begin(self.num_steps, Phase.DECODE, FIRST_COUNTER, 64)[:] = self.counts
            ring.publish()
        self.num_steps += 1

    def close(self) -> None:
        """Remove all segments."""
        parts: list[AgreementWords | PlanBoard | LivePlacement | LoadRing] = [
            self.words,
            self.board,
            self.live,
            *self.rings,
        ]
        for part in parts:
            part.segment.unlink()
            part.close()


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory_mib(pid: int) -> float:
    """Resident memory of a process that is its own, without shared segments."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def paced(ranks: Ranks, rate: float, seconds: float, pid: int) -> dict[str, object]:
    """Step at a rate; the daemon's share of a core."""
    start, before, first = time.monotonic(), cpu_s(pid), ranks.num_steps
    while (now := time.monotonic() - start) < seconds:
        ranks.step()
        time.sleep(max(0.0, (ranks.num_steps - first) / rate - now))
    records = (ranks.num_steps - first) * len(ranks.rings)
    return {"records_per_s": records / now, "cpu_percent": 100 * (cpu_s(pid) - before) / now}


def followed(ranks: Ranks, records: int, client: ControlClient) -> dict[str, object]:
    """Step as fast as the daemon follows until so many records were written; its CPU share and memory."""
    pid = client.status().pid
    start, before, first = time.monotonic(), cpu_s(pid), ranks.num_steps
    while ranks.num_steps * len(ranks.rings) < records:
        ranks.step()
        if ranks.num_steps % 32 == 0:  # this is about memory, not about loss
            while min(rank.records for rank in client.status().groups[0].ranks) < ranks.num_steps - 128:
                time.sleep(0.002)
    took = time.monotonic() - start
    return {
        "records_per_s": (ranks.num_steps - first) * len(ranks.rings) / took,
        "cpu_percent": 100 * (cpu_s(pid) - before) / took,
        "memory_mib": memory_mib(pid),
        "lost": client.status().groups[0].lost_records,
    }


def main(
    ranks: Annotated[int, typer.Option(help="Ranks on the node.")] = 8,
    rate: Annotated[float, typer.Option(help="Steps per second.")] = 200.0,
    seconds: Annotated[float, typer.Option(help="Length of the paced phase.")] = 20.0,
    records: Annotated[int, typer.Option(help="Records after which memory is compared.")] = 200_000,
    load: Annotated[tuple[int, int], typer.Option(help="MoE layers, and experts per layer.")] = (58, 256),
    json: Annotated[Path | None, typer.Option(help="Also write the rows here.")] = None,
) -> None:
    """Measure, print the table, and write it as JSON if asked."""
    layers, experts = load
    spec = MoESpec(num_layers=layers, num_experts=experts, num_ranks=ranks)
    with tempfile.TemporaryDirectory(prefix="eplb-bench-") as directory, Progress() as progress:
        # reading alone: nothing is decided, and no policy compiles beside it
        daemon = {"policy": "default", "par_threshold": 1000.0}
        environ = {"EPLB_ASYNC_RUNTIME_DIR": directory, **daemon_variables(daemon)}
        os.environ.update(environ)
        settings = load_settings(environ=environ)
        # what makes the group this daemon's
        group_lock_path(settings.directory, GROUP).touch()
        group, client = Ranks(spec), ControlClient(settings)
        rows: list[dict[str, object]] = []
        try:
            ensure_daemon(settings, 60)
            pid = client.status().pid
            while not client.status().pool["num_idle"] or not client.status().groups:
                time.sleep(0.1)
            task = progress.add_task("paced, then at full speed", total=records)
            case = f"{ranks} ranks, int32 [{layers}, {experts}]"
            paced(group, rate, 2.0, pid)
            rows.append({"case": case, "what": f"{rate:g} steps/s", **paced(group, rate, seconds, pid)})
            rows[-1] |= {"memory_mib": memory_mib(pid), "lost": client.status().groups[0].lost_records}
            for end in (records // 4, records):
                rows.append({"case": case, "what": f"full speed, to {end:,} records", **followed(group, end, client)})
                progress.update(task, completed=group.num_steps * ranks)
        finally:
            client.stop_daemon()
            group.close()
    show_table("Daemon", COLUMNS, rows, "case")
    if json is not None:
        write_json(json, "daemon", rows)


if __name__ == "__main__":
    typer.run(main)

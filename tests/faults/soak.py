"""The soak behind `scripts/soak`: ranks that step as fast as they can, plans all the time, and nothing that grows.

Every so many seconds own memory, descriptors and threads of each rank, the daemon and its workers are read from /proc, and
the group's segments are counted. What the last fifth shows is compared with the second: by then caches and pools are filled.
"""

import contextlib
import json as json_module
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from eplb_async import RankHook, share_weights
from eplb_async.core.config import daemon_variables, load_settings, policy_cache
from eplb_async.core.daemon_settings import EAGER
from eplb_async.core.placement import initial_placement
from eplb_async.runtime.client import ControlClient
from eplb_async.shm.gc import collect_garbage
from eplb_async.shm.launch import ensure_daemon
from eplb_async.shm.segment import SHM_DIRECTORY, list_segments
from tests.faults.harness import SPEC, expert_weights

__all__ = ["Sample", "Soak", "app", "growth", "run_soak", "serve_fast"]

app = typer.Typer(add_completion=False)

SHIFT_STEPS = 400
MOST_OWN_MIB = 8.0
"""Growth of one process's own memory that is still called flat: allocators keep what they once had."""
forkserver = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Sample:
    """One look: own MiB, descriptors and threads by process; segments and their MiB; steps and generations so far."""

    at_s: float
    own_mib: dict[str, float]
    descriptors: dict[str, int]
    threads: dict[str, int]
    segments: int
    segments_mib: float
    steps: int
    generation: int


@dataclass
class Soak:
    """Samples of a run, and what was wrong with it."""

    samples: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def serve_fast(group: str, rank: int, environ: dict[str, str], step_s: float, stop: Connection) -> None:
    """One rank's process: step until told of a last step."""
    torch.set_num_threads(1)
    loaded = expert_weights(initial_placement(SPEC), rank)
    with contextlib.closing(share_weights(group, rank, loaded)) as weights:
        load = torch.zeros(SPEC.num_layers, SPEC.num_experts, dtype=torch.int32)
        settings = load_settings(environ=environ)
        hook = RankHook.attach(group=group, rank=rank, spec=SPEC, weights=weights, load=load, settings=settings)
        step, last, counts = 0, 1 << 62, load.clone()
        while step < last:
            with hook.step("decode", 8):
                if step % SHIFT_STEPS == 0:
                    hot = np.random.default_rng(step // SHIFT_STEPS).permutation(SPEC.num_experts)
                    counts = torch.from_numpy((400 / (1 + hot) ** 1.2).astype(np.int32))
                load += counts
                # an engine releases the interpreter's lock in its kernels
                time.sleep(step_s)
            step += 1
            if step % 16 == 0 and stop.poll():
                last = int(stop.recv())
        hook.detach()


def growth(samples: list[Sample]) -> list[str]:
    """What has grown from the second fifth of the samples to the last one."""
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    found = []
    for name in late[-1].own_mib:
        before = [sample.own_mib[name] for sample in early if name in sample.own_mib]
        if (
            before
            and (grown := _mean([s.own_mib[name] for s in late if name in s.own_mib]) - _mean(before)) > MOST_OWN_MIB
        ):
            found.append(f"{name} has {grown:.1f} MiB more")
    for what in ("descriptors", "threads"):
        for name, now in getattr(late[-1], what).items():
            most = max((getattr(sample, what).get(name, now) for sample in early), default=now)
            # a connection or a policy at work comes and goes
            if min(getattr(sample, what).get(name, now) for sample in late) > most + 2:
                found.append(f"{name} has {now} {what}, and had {most}")
    if late[-1].segments != early[0].segments or late[-1].segments_mib != early[0].segments_mib:
        found.append(f"{late[-1].segments} segments, and there were {early[0].segments}")
    return found


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def run_soak(group: str, directory: Path, times: tuple[float, float, float], told: Callable[[Sample], None]) -> Soak:
    """Serve, and end all processes in order. `times`: seconds in all, from one look to the next, and of a forward."""
    seconds, every_s, step_s = times
    environ = {
        "EPLB_ASYNC_RUNTIME_DIR": str(directory),
        **daemon_variables(EAGER),
        "EPLB_ASYNC_DAEMON_WINDOW_STEPS": "50",
        "EPLB_ASYNC_DAEMON_NUM_WINDOWS": "2",
        "EPLB_ASYNC_DAEMON_INTERVAL_STEPS": "150",
        "EPLB_ASYNC_DAEMON_POLL_INTERVAL_S": "0.02",
        "EPLB_ASYNC_DAEMON_DISCOVERY_INTERVAL_S": "0.1",
        "EPLB_ASYNC_HOOK_RING_RECORDS": "2048",
    }
    os.environ.setdefault("NUMBA_CACHE_DIR", str(policy_cache(Path(__file__).resolve().parents[2] / ".pytest_cache")))
    settings, soak = load_settings(environ=environ), Soak()
    forkserver.set_forkserver_preload(["tests.faults.soak"])
    stops, processes = [], []
    try:
        for rank in range(SPEC.num_ranks):
            reader, writer = forkserver.Pipe(duplex=False)
            process = forkserver.Process(target=serve_fast, args=(group, rank, environ, step_s, reader), daemon=True)
            process.start()
            reader.close()
            stops.append(writer)
            processes.append(process)
        ensure_daemon(settings, 60)
        pids = {f"rank {rank}": process.pid or 0 for rank, process in enumerate(processes)}
        start = time.monotonic()
        while (now_s := time.monotonic() - start) < seconds:
            time.sleep(min(every_s, max(0.0, seconds - now_s)))
            with ControlClient(settings, deadline_s=30.0) as client:
                status = client.status()
            if any(not process.is_alive() for process in processes):
                soak.problems.append("a rank has ended")
                break
            watched = {**pids, "daemon": status.pid}
            ranks = [rank for each in status.groups for rank in each.ranks]
            steps, generation = (min(r.step for r in ranks), ranks[0].committed[0]) if ranks else (0, 0)
            soak.samples.append(_sample(time.monotonic() - start, watched, group, (steps, generation)))
            told(soak.samples[-1])
        last = max((sample.steps for sample in soak.samples), default=0) + 20_000
        for writer in stops:
            writer.send(last)
        for process in processes:
            process.join(120)
            if process.exitcode != 0:
                soak.problems.append(f"a rank ended with {process.exitcode}")
        with ControlClient(settings) as client:
            client.stop_daemon(30)
    finally:
        for process in processes:
            process.kill()
            process.join()
    soak.problems += growth(soak.samples)
    return soak


def _sample(at_s: float, pids: dict[str, int], group: str, progress: tuple[int, int]) -> Sample:
    own, descriptors, threads = {}, {}, {}
    for name, pid in pids.items():
        with contextlib.suppress(OSError):
            resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
            own[name] = (resident - shared) * 4096 / 2**20
            descriptors[name] = len(os.listdir(f"/proc/{pid}/fd"))
            threads[name] = len(os.listdir(f"/proc/{pid}/task"))
    names = [name for name, owner, _ in list_segments() if owner == group]
    sizes = [(SHM_DIRECTORY / name[1:]).stat().st_size for name in names]
    return Sample(at_s, own, descriptors, threads, len(names), sum(sizes) / 2**20, *progress)


@app.command()
def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 60.0,
    every: Annotated[float, typer.Option(help="Seconds between two looks.")] = 10.0,
    step_ms: Annotated[float, typer.Option(help="Time of a forward.")] = 0.2,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Serve at a high step rate and see that nothing grows; status 1 if something does.

    Example: scripts/soak --minutes 10
    """
    console, name = Console(stderr=True), f"soak-{uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="eplb-", dir="/tmp") as directory, Progress(console=console) as progress:
        task = progress.add_task("soaking", total=60.0 * minutes)

        def told(sample: Sample) -> None:
            progress.update(task, completed=sample.at_s)

        soak = run_soak(name, Path(directory), (60.0 * minutes, every, step_ms / 1e3), told)
    left = [segment for segment, owner, _ in list_segments() if owner == name]
    soak.problems += [f"left in shared memory: {segment}" for segment in left]
    collect_garbage(name)
    _report(soak, console, json)
    raise typer.Exit(1 if soak.problems else 0)


def _report(soak: Soak, console: Console, as_json: bool) -> None:
    last = soak.samples[-1]
    fifth = max(1, len(soak.samples) // 5)
    early, late = soak.samples[fifth : 2 * fifth], soak.samples[-fifth:]
    if as_json:
        rows = {
            name: [round(_mean([s.own_mib.get(name, 0.0) for s in part]), 2) for part in (early, late)]
            for name in last.own_mib
        }
        numbers = {"minutes": last.at_s / 60, "steps": last.steps, "generations": last.generation, "own_mib": rows}
        numbers |= {"descriptors": last.descriptors, "threads": last.threads, "segments": last.segments}
        print(json_module.dumps({**numbers, "segments_mib": last.segments_mib, "problems": soak.problems}))
        return
    table = Table("process", "own MiB, second fifth", "last fifth", "descriptors", "threads")
    for name in last.own_mib:
        parts = [f"{_mean([s.own_mib.get(name, 0.0) for s in part]):.1f}" for part in (early, late)]
        table.add_row(name, *parts, str(last.descriptors[name]), str(last.threads[name]))
    console.print(table)
    console.print(
        f"{last.at_s / 60:.1f} minutes, {last.steps:,} steps, {last.generation} generations, {last.segments} segments"
    )
    for problem in soak.problems or ["nothing has grown"]:
        console.print(problem, markup=False)


if __name__ == "__main__":
    app()

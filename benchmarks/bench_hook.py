"""What the hook costs per step while no plan is active, and what agreement costs, in real processes.

    python -m benchmarks.bench_hook
    python -m benchmarks.bench_hook --ranks 2 --steps 20000 --load 58 256 --no-meet --json hook.json
    python -m benchmarks.bench_hook --device cuda          # rank r on GPU r modulo their number

Every rank is a process that steps with the hook around a forward that meets the others and spins for `--forward-us`. Beside it, in the
same processes: an all-reduce of one int64 per step by torch.distributed (gloo), the way engines agree without us.

On GPUs the table also has the device time of a step: many steps are issued behind a kernel that sleeps, so that the device never
waits for the host, and the time between two events is divided by their number.
"""

import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import typer
from numpy.typing import NDArray

from benchmarks.reporting import Column, show_table, write_json
from eplb_async import MoESpec, RankHook, share_weights
from eplb_async.core.config import Settings
from eplb_async.rank.transfer.shm import SharedWeights

__all__ = ["main"]

COLUMNS = [
    Column(key="what", title="host time per step"),
    Column(key="p50_us", title="p50 us", digits=2, ratio=True),
    Column(key="p99_us", title="p99 us", digits=2, ratio=True),
    Column(key="mean_us", title="mean us", digits=2),
]
WARM_UP = 200
DEVICE_STEPS = 200
SLEEP_CYCLES = 100_000_000
"""About 50 ms: longer than the host takes for DEVICE_STEPS."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run; sizes as in MoESpec."""

    ranks: int
    steps: int
    layers: int
    experts: int
    forward_us: float
    meet: bool
    directory: str
    device: str


def measure(case: Case, rank: int, results: "Queue[tuple[int, dict[str, NDArray[np.float64]]]]") -> None:
    """One rank: steps with the hook, then all-reduces."""
    torch.set_num_threads(1)
    spec = MoESpec(num_layers=case.layers, num_experts=case.experts, num_ranks=case.ranks)
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if case.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tensors = [torch.zeros(spec.slots_per_rank, 8, device=device) for _ in range(case.layers)]
    weights = share_weights("bench-hook", rank, tensors) if device.type == "cpu" else tensors
    load = torch.zeros(case.layers, case.experts, dtype=torch.int32, device=device)
    settings = Settings(runtime_dir=case.directory)
    dist.init_process_group("gloo", init_method=f"file://{case.directory}/rendezvous", rank=rank, world_size=case.ranks)
    word = torch.zeros(1, dtype=torch.int64)
    before_us, after_us, reduce_us = (np.zeros(case.steps) for _ in range(3))
    with RankHook.attach(
        group="bench-hook", rank=rank, spec=spec, weights=weights, load=load, settings=settings
    ) as hook:
        for step in range(-WARM_UP, case.steps):
            start = time.perf_counter_ns()
            hook.before_forward("decode", 1)
            entered = time.perf_counter_ns()
            # as an engine's collectives do; else the faster rank runs ahead and its waiting counts as agreement
            if case.meet:
                dist.all_reduce(word)
            spin(case.forward_us)
            left = time.perf_counter_ns()
            hook.after_forward()
            end = time.perf_counter_ns()
            if step >= 0:
                before_us[step], after_us[step] = (entered - start) / 1e3, (end - left) / 1e3
        phases = hook.statistics().times
        device_us = device_time_us(hook) if device.type == "cuda" else np.zeros(0)
    for step in range(-WARM_UP, case.steps):
        start = time.perf_counter_ns()
        dist.all_reduce(word)
        end = time.perf_counter_ns()
        spin(case.forward_us)
        if step >= 0:
            reduce_us[step] = (end - start) / 1e3
    if isinstance(weights, SharedWeights):
        weights.close()
    dist.destroy_process_group()
    agree = phases["agree"]
    results.put(
        (
            rank,
            {
                "hook, all": before_us + after_us,
                "before_forward": before_us,
                "after_forward (record)": after_us,
                "all-reduce of one int64 (gloo)": reduce_us,
                "device": device_us,
                "agree p50": np.array([agree.p50_us]),
                "agree p99": np.array([agree.p99_us]),
            },
        )
    )


def device_time_us(hook: RankHook) -> NDArray[np.float64]:
    """Of a step without a forward, a few times."""
    found = []
    for _ in range(5):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SLEEP_CYCLES)
        before.record()
        for _ in range(DEVICE_STEPS):
            with hook.step("decode", 1):
                pass
        after.record()
        torch.cuda.synchronize()
        found.append(before.elapsed_time(after) * 1e3 / DEVICE_STEPS)
    return np.array(found)


def spin(duration_us: float) -> None:
    """Keep the core busy, as a forward's launches would."""
    end = time.perf_counter_ns() + int(duration_us * 1e3)
    while time.perf_counter_ns() < end:
        pass


def main(  # size: options
    ranks: Annotated[int, typer.Option(help="Rank processes; more than there are cores measures the scheduler.")] = 2,
    steps: Annotated[int, typer.Option(help="Measured steps.")] = 10_000,
    load: Annotated[tuple[int, int], typer.Option(help="MoE layers, and experts per layer.")] = (58, 256),
    forward_us: Annotated[float, typer.Option(help="Length of the stand-in for a forward.")] = 500.0,
    meet: Annotated[bool, typer.Option(help="All-reduce in every forward; without it caches stay warm.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Also write the rows here.")] = None,
) -> None:
    """Measure, print the table, and write it as JSON if asked."""
    with tempfile.TemporaryDirectory(prefix="eplb-bench-") as directory:
        case = Case(
            ranks=ranks,
            steps=steps,
            layers=load[0],
            experts=load[1],
            forward_us=forward_us,
            meet=meet,
            directory=directory,
            device=device,
        )
        context = multiprocessing.get_context("spawn")
        results: Queue[tuple[int, dict[str, NDArray[np.float64]]]] = context.Queue()
        processes = [context.Process(target=measure, args=(case, rank, results)) for rank in range(ranks)]
        for process in processes:
            process.start()
        times = [results.get(timeout=600)[1] for _ in processes]
        for process in processes:
            process.join()
    rows: list[dict[str, object]] = []
    label = f"{ranks} ranks, load int32 {list(load)}, forward {forward_us:g} us{', all-reduced' if meet else ''}"
    for what in list(times[0])[:4]:
        values = np.concatenate([of_rank[what] for of_rank in times])
        p50, p99 = np.percentile(values, (50, 99)).tolist()
        rows.append({"case": label, "what": what, "p50_us": p50, "p99_us": p99, "mean_us": float(values.mean())})
    agree = [float(np.median([of_rank[f"agree {name}"] for of_rank in times])) for name in ("p50", "p99")]
    rows.insert(1, {"case": label, "what": "of it: agreement", "p50_us": agree[0], "p99_us": agree[1]})
    more: dict[str, object] | None = None
    if device == "cuda":
        values = np.concatenate([of_rank["device"] for of_rank in times])
        p50, p99 = np.percentile(values, (50, 99)).tolist()
        rows.append(
            {"case": label, "what": "on the device", "p50_us": p50, "p99_us": p99, "mean_us": float(values.mean())}
        )
        more = {"gpu": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"}
    show_table("Hook without an active plan", COLUMNS, rows, "case", more=more)
    if json is not None:
        write_json(json, "hook", rows, more)


if __name__ == "__main__":
    typer.run(main)

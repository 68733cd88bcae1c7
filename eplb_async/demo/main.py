"""The demo, end to end: rank processes, the daemon that they start, the unsharded reference, and the comparison."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from eplb_async.core.config import daemon_variables, load_settings
from eplb_async.core.daemon_settings import EAGER
from eplb_async.core.errors import EplbError
from eplb_async.demo.model import load_model
from eplb_async.demo.reference import run_reference
from eplb_async.demo.report import DaemonFacts, Summary, summarise
from eplb_async.demo.serving import GROUP, RankResult, ServeRequest, serve_rank
from eplb_async.demo.text import Stream
from eplb_async.observability.history import Outcome
from eplb_async.runtime.client import ControlClient
from eplb_async.shm.launch import ensure_daemon

__all__ = ["ORDER", "DemoOptions", "run"]

DAEMON = {
    **EAGER,
    "window_steps": 4,
    "num_windows": 2,
    "interval_steps": 8,
    "par_threshold": 1.10,
    "min_gain": 0.04,
    "poll_interval_s": 0.02,
    "discovery_interval_s": 0.1,
}
"""A few hundred steps stand for hours of traffic, so windows and intervals are short, and gains need not live long to pay."""
STAGING_ROWS = 40
"""For several layers, so that their weights travel at once: with rows for one layer, each layer waits for the commit of the one before."""

ORDER = ("python", "russian", "japanese", "english", "arabic", "german", "chinese", "web")
"""Neighbours differ much, so that every change of domain is a change of traffic."""
WARM_UP_DEADLINE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the command line can choose.

    Attributes:
        num_ranks: rank processes.
        steps_per_domain: steps before the text's domain changes.
        weights: a weights file instead of the package's own.
    """

    num_ranks: int = 4
    steps_per_domain: int = 24
    weights: Path | None = None


def run(options: DemoOptions, console: Console) -> Summary:
    """Serve, then run the same text unsharded, and compare; progress goes to the console.

    Raises:
        EplbError: a rank or the daemon failed; what was started is stopped.
    """
    start = time.monotonic()
    stream = Stream(domains=ORDER, steps_per_domain=options.steps_per_domain, num_ranks=options.num_ranks)
    model = load_model(options.weights)
    console.print(
        f"[bold]{model.shape.num_layers} MoE layers of {model.shape.num_experts} experts[/], top-{model.shape.top_k}, on "
        f"{options.num_ranks} rank processes; {stream.num_steps} steps of text in {len(ORDER)} domains: {', '.join(ORDER)}"
    )
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with (
        tempfile.TemporaryDirectory(prefix="eplb-demo-") as directory,
        Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress,
    ):
        environ = {**daemon_variables(DAEMON), "EPLB_ASYNC_HOOK_STAGING_ROWS": str(STAGING_ROWS)}
        environ["EPLB_ASYNC_RUNTIME_DIR"] = str(Path(directory) / "run")
        request = ServeRequest(
            stream=stream, weights=options.weights, rendezvous=Path(directory) / "rendezvous", environ=environ
        )
        client = ControlClient(load_settings(environ=environ))
        # ranks and the daemon inherit this
        os.environ.update(environ)
        try:
            _start_daemon(client, environ, progress)
            serving = progress.add_task("serving with expert parallelism", total=stream.num_steps, note="")

            def on_step(step: int) -> None:
                progress.update(serving, completed=step, note=stream.domain(min(step, stream.num_steps - 1)))

            ranks = _serve(request, on_step)
            daemon = _daemon_facts(client)
        finally:
            client.stop_daemon()
            for name in environ:
                os.environ.pop(name, None)
        checking = progress.add_task("the same text, unsharded", total=stream.num_steps, note="")
        torch.set_num_threads(1)
        reference = run_reference(model, stream, lambda step: progress.update(checking, completed=step))
    return summarise(stream, ranks, reference, daemon, time.monotonic() - start)


def _start_daemon(client: ControlClient, environ: dict[str, str], progress: Progress) -> None:
    """Start the daemon and wait until its policy is compiled; ranks could start it too, and would not wait.

    Raises:
        EplbError: it did not get ready.
    """
    starting = progress.add_task("starting the daemon", total=1, note="compiles its policy")
    end = time.monotonic() + WARM_UP_DEADLINE_S
    ensure_daemon(load_settings(environ=environ))
    while not client.status().pool["num_idle"]:
        if time.monotonic() > end:
            raise EplbError(f"the daemon's policy was not ready after {WARM_UP_DEADLINE_S:g} s")
        time.sleep(0.1)
    progress.update(starting, completed=1)


def _serve(request: ServeRequest, on_step: Callable[[int], None]) -> list[RankResult]:
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    try:
        for rank in range(request.stream.num_ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=serve_rank, args=(request, rank, theirs), name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        results = _collect(pipes, on_step)
        for process in processes:
            process.join(30)
        return results
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], on_step: Callable[[int], None]) -> list[RankResult]:
    """Progress and results of all ranks, as they come.

    Raises:
        EplbError: a rank ended without its result; its own error is on the terminal.
    """
    results: dict[int, RankResult] = {}
    steps = [0] * len(pipes)
    while len(results) < len(pipes):
        open_pipes = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        for ready in wait(list(open_pipes)):
            rank = open_pipes[ready]  # type: ignore[index]
            try:
                message = pipes[rank].recv()
            except EOFError as error:
                raise EplbError(f"rank {rank} of the demo ended early; see its error above") from error
            if isinstance(message, RankResult):
                results[rank] = message
            else:
                steps[rank] = message
                on_step(min(steps))
    return [results[rank] for rank in range(len(pipes))]


def _daemon_facts(client: ControlClient) -> DaemonFacts:
    """What the daemon saw; it keeps a group's history when the group has ended."""
    group = next((found for found in client.status().groups if found.group == GROUP), None)
    if group is None:
        raise EplbError("the daemon does not know the demo's group; see its log")
    applied = [
        decision
        for decision in client.history(GROUP, most=10_000)[GROUP]
        if decision.outcome in (Outcome.FINISHED, Outcome.DROPPED) and decision.num_committed
    ]
    times = {
        decision.generation: decision.trigger_to_last_commit_s
        for decision in applied
        if decision.trigger_to_last_commit_s is not None
    }
    return DaemonFacts(
        lost_records=group.lost_records,
        trigger_to_commit_s=times,
        moves={decision.generation: decision.num_moves for decision in applied},
        bytes_moved={decision.generation: decision.bytes_moved for decision in applied},
    )

"""Runs a mode: its daemon if it has one, its rank processes, and what the daemon says afterwards."""

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.engine.serving import RunRequest, run_rank
from eplb_async.core.config import load_settings
from eplb_async.core.errors import EplbError
from eplb_async.runtime.client import ControlClient
from eplb_async.shm.launch import ensure_daemon, log_path

__all__ = ["RunFailed", "rendezvous_in", "run_mode", "short_directory"]

CLOSE_DEADLINE_S = 20.0
HISTORY = 10_000


class RunFailed(EplbError):
    """A rank ended without its results; its own error is on the terminal."""


def run_mode(request: RunRequest, deadline_s: float) -> list[dict[str, Any]]:
    """Run all ranks of a mode to their end, and return the daemon's decisions (none without a daemon).

    Raises:
        RunFailed: a rank failed or was not done in time; all are stopped.
    """
    if request.mode != "ours":
        _run_ranks(request, deadline_s)
        return []
    with _daemon(request) as client:
        _run_ranks(request, deadline_s)
        decisions = client.history(request.group, most=HISTORY).get(request.group, [])
        return [dict(msgspec.to_builtins(decision)) for decision in decisions]


@contextmanager
def _daemon(request: RunRequest) -> Iterator[ControlClient]:
    """A daemon with the run's settings; afterwards it is stopped, and its log is beside the ranks' files."""
    settings = load_settings(environ=request.settings)
    with ControlClient(settings) as client:
        try:
            ensure_daemon(settings, deadline_s=60.0)
            yield client
        finally:
            if (log := log_path(settings.directory)).exists():
                shutil.copyfile(log, request.output / "daemon.log")
            client.stop_daemon()


def _run_ranks(request: RunRequest, deadline_s: float) -> None:
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    end = time.monotonic() + deadline_s
    try:
        for rank in range(request.config.num_ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=run_rank, args=(request, rank, theirs), name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        _wait(pipes, end)
        # results are written: whatever hangs from here on does not matter to them
        for process in processes:
            process.join(CLOSE_DEADLINE_S)
            if process.is_alive():
                print(f"{process.name} of mode {request.mode} does not end after its results; killed", flush=True)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _wait(pipes: list[Connection], end: float) -> None:
    """Until every rank has said that it is done."""
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise RunFailed(f"ranks {sorted(waiting.values())} are not done in time")
        for pipe in pipes:
            if pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    pipe.recv()
                except EOFError as error:
                    raise RunFailed(f"rank {rank} ended early; see its error above") from error


def short_directory() -> "tempfile.TemporaryDirectory[str]":
    """For a rendezvous file and the daemon's socket, whose path may have at most 107 bytes."""
    return tempfile.TemporaryDirectory(prefix="eplb-engine-", dir="/tmp")


def rendezvous_in(directory: str, mode: str) -> Path:
    """A file that does not exist yet; each process group needs one of its own."""
    return Path(directory) / f"rendezvous-{mode}"

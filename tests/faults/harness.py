"""Ranks that serve under changing load, a daemon that can be killed at a chosen moment, and a record of every forward.

A rank's weights say which expert they are, so after every commit each rank can check each of its slots against the map.
Every rank also writes a checksum of its maps for every step; equal checksums at equal steps mean that all ranks ran each
forward with the same maps.
"""

import multiprocessing
import os
import signal
import time
import zlib
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from eplb_async import MoESpec, RankHook, share_weights
from eplb_async.core.config import daemon_variables, load_settings
from eplb_async.core.daemon_settings import EAGER
from eplb_async.core.errors import EplbError, PeerError
from eplb_async.core.placement import IntArray, initial_placement
from eplb_async.core.plan import generation_of, position_of
from eplb_async.rank.transfer.shm import SharedWeights
from eplb_async.runtime.client import ControlClient
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.launch import ensure_daemon
from eplb_async.shm.words import AgreementWords
from tests.rank.harness import DEVICE

__all__ = ["MOMENTS", "FaultGroup", "RankReport"]

MOMENTS = ("idle", "planning", "publishing", "staging", "committing")
"""When a daemon is killed: no plan active; while its policy runs; right as the board changes; after some but not all
entries are staged; after some but not all are committed."""

SPEC = MoESpec(num_layers=6, num_experts=16, num_ranks=4, num_redundant=8)
STEP_S = 0.002
SHIFT_STEPS = 60


@dataclass
class RankReport:
    """What one rank says when it ends: map checksums by step, wrong slots found, why it ended, its statistics."""

    rank: int
    maps: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ended: str = ""
    lost: int = -1
    generation: int = 0
    drops: int = 0
    worst_step_us: float = 0.0


def expert_weights(placement_LP: IntArray, rank: int) -> list[dict[str, torch.Tensor]]:
    """Two tensors per layer, of two types, whose contents are a function of (layer, expert)."""
    width = SPEC.slots_per_rank
    layers = []
    for layer in range(SPEC.num_layers):
        experts = torch.from_numpy(placement_LP[layer, rank * width : (rank + 1) * width].astype(np.int64))
        matrix = (experts[:, None] * 8 + layer + torch.arange(4096)[None] % 7).to(torch.bfloat16)
        layers.append({"matrix": matrix, "scale": (experts * 100 + layer).to(torch.float32)})
    return layers


def serve(group: str, rank: int, environ: dict[str, str], stop: Connection, reports: Connection) -> None:
    """One rank's process: step until told to stop, or until a peer is lost."""
    torch.set_num_threads(1)
    spec, report = SPEC, RankReport(rank)
    loaded = expert_weights(initial_placement(spec), rank)
    device = torch.device("cpu" if DEVICE == "cpu" else f"cuda:{rank % torch.cuda.device_count()}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    on_device = [{name: tensor.to(device) for name, tensor in layer.items()} for layer in loaded]
    weights = share_weights(group, rank, loaded) if device.type == "cpu" else on_device
    load = torch.zeros(spec.num_layers, spec.num_experts, dtype=torch.int32, device=device)
    rng = np.random.default_rng(rank)
    hook = RankHook.attach(
        group=group, rank=rank, spec=spec, weights=weights, load=load, settings=load_settings(environ=environ)
    )
    step, last = 0, 1 << 62
    before_LP = hook.slot_to_expert_LP.clone()
    try:
        while step < last:
            start = time.perf_counter_ns()
            hook.before_forward("decode", 8)
            report.worst_step_us = max(report.worst_step_us, (time.perf_counter_ns() - start) / 1e3)
            report.maps.append(zlib.crc32(hook.slot_to_expert_LP.cpu().numpy().tobytes()))
            if not torch.equal(before_LP, hook.slot_to_expert_LP):
                before_LP.copy_(hook.slot_to_expert_LP)
                report.wrong += _wrong_slots(weights, hook, rank, step)
            hot = np.random.default_rng(step // SHIFT_STEPS).permutation(spec.num_experts)
            share = 1.0 / (1 + hot) ** 1.2
            load += torch.from_numpy(rng.poisson(400 * share, size=load.shape).astype(np.int32)).to(device)
            time.sleep(STEP_S)
            hook.after_forward()
            step += 1
            # all ranks must make the same number of steps: the parent names one that none has reached
            if stop.poll():
                last = int(stop.recv())
        report.ended = "stopped"
    except PeerError as error:
        report.ended, report.lost = str(error), getattr(error, "rank", -1)
    statistics = hook.statistics()
    report.generation, report.drops = statistics.generation, statistics.num_drops
    hook.detach()
    if isinstance(weights, SharedWeights):
        weights.close()
    reports.send(report)


def _wrong_slots(weights: object, hook: RankHook, rank: int, step: int) -> list[str]:
    expected = expert_weights(hook.slot_to_expert_LP.cpu().numpy().astype(np.int32), rank)
    held = hook.slot_to_expert_LP.cpu()[:, rank * SPEC.slots_per_rank :][:, : SPEC.slots_per_rank] >= 0
    wrong = []
    for layer, tensors in enumerate(expected):
        for name, tensor in tensors.items():
            mine = weights[layer][name].cpu()  # type: ignore[index]
            same = (mine == tensor).flatten(1).all(dim=1) if mine.dim() > 1 else mine == tensor
            if not bool((same | ~held[layer]).all()):
                wrong.append(f"step {step} rank {rank} layer {layer} {name}")
    return wrong


class FaultGroup:
    """Rank processes and one daemon; a context manager that kills what is left of both."""

    def __init__(self, group: str, runtime_dir: Path, policy: str = "default") -> None:
        self.group, self.settings_dir = group, runtime_dir
        self.environ = {
            "EPLB_ASYNC_RUNTIME_DIR": str(runtime_dir),
            **daemon_variables(EAGER),
            "EPLB_ASYNC_DAEMON_POLICY": policy,
            "EPLB_ASYNC_DAEMON_WINDOW_STEPS": "10",
            "EPLB_ASYNC_DAEMON_NUM_WINDOWS": "2",
            "EPLB_ASYNC_DAEMON_INTERVAL_STEPS": "30",
            "EPLB_ASYNC_DAEMON_POLL_INTERVAL_S": "0.01",
            "EPLB_ASYNC_DAEMON_DISCOVERY_INTERVAL_S": "0.05",
            "EPLB_ASYNC_DAEMON_PLAN_DEADLINE_S": "20",
            # plans take many steps, so that there is something to interrupt
            "EPLB_ASYNC_HOOK_COPIES_PER_STEP": "1",
            "EPLB_ASYNC_HOOK_STAGING_ROWS": "2",
            "EPLB_ASYNC_HOOK_PEER_DEADLINE_S": "20",
        }
        self.settings = load_settings(environ=self.environ)
        self.client = ControlClient(self.settings)
        self._processes: list[BaseProcess] = []
        self._stops: list[Connection] = []
        self._reports: list[Connection] = []
        self.words: AgreementWords
        self.board: PlanBoard

    def __enter__(self) -> "FaultGroup":
        context = multiprocessing.get_context("spawn")
        for rank in range(SPEC.num_ranks):
            stop_reader, stop_writer = context.Pipe(duplex=False)
            report_reader, report_writer = context.Pipe(duplex=False)
            arguments = (self.group, rank, self.environ, stop_reader, report_writer)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            report_writer.close()
            self._processes.append(process)
            self._stops.append(stop_writer)
            self._reports.append(report_reader)
        wait_for(self._stepping, 60, "the ranks to step")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self.client.close()
        if (pid := self.daemon_pid()) is not None:
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: self.daemon_pid() is None, 10, "the daemon to die")

    def start_daemon(self) -> int:
        """Start a daemon and return its pid once it answers."""
        self.client.close()
        ensure_daemon(self.settings, 60)
        return self.client.status().pid

    def daemon_pid(self) -> int | None:
        """Pid of the daemon that serves this runtime directory."""
        self.client.close()
        try:
            return self.client.status().pid
        except EplbError:
            return None

    def kill_daemon(self, moment: str, pid: int, rng: np.random.Generator) -> bool:
        """Kill it with -9 at a moment of MOMENTS; false if that moment did not come in time (it is killed all the same)."""
        end, reached = time.monotonic() + 15, False
        sequence = self.board.sequence
        while not reached and time.monotonic() < end:
            reached = self._reached(moment, sequence)
        # somewhere inside the moment, not always at its start
        time.sleep(float(rng.uniform(0, 0.0005 if moment == "publishing" else 0.004)))
        os.kill(pid, signal.SIGKILL)
        return reached

    def kill_rank(self, rank: int) -> None:
        """Kill a rank with -9."""
        self._processes[rank].kill()
        self._processes[rank].join()

    def counter(self) -> tuple[int, int]:
        """(generation, position) that every rank has committed; (0, 0) while words cannot be read."""
        words = [self.words.newest(rank) for rank in range(SPEC.num_ranks)]
        if any(word is None for word in words):
            return 0, 0
        committed = min(word.committed for word in words if word is not None)
        return generation_of(committed), position_of(committed)

    def stop(self) -> list[RankReport]:
        """Let all ranks make the same number of steps, and collect what they saw."""
        last = max(self.words.member(rank).newest_step for rank in range(SPEC.num_ranks)) + 200
        for connection in self._stops:
            connection.send(last)
        return self.reports(range(SPEC.num_ranks))

    def reports(self, ranks: "range | list[int]") -> list[RankReport]:
        """Reports of ranks that end or have ended.

        Raises:
            TimeoutError: one does not.
        """
        found = []
        for rank in ranks:
            if not self._reports[rank].poll(60):
                raise TimeoutError(f"rank {rank} did not end")
            found.append(self._reports[rank].recv())
        return found

    def _stepping(self) -> bool:
        try:
            self.words = AgreementWords.open(self.group)
            self.board = PlanBoard.open(self.group, self.words.incarnation)
        except EplbError:
            return False
        return all(self.words.member(rank).newest_step > 20 for rank in range(SPEC.num_ranks))

    def _reached(self, moment: str, sequence: int) -> bool:
        now = self.board.sequence
        if moment == "publishing":
            return now != sequence
        posted = self.board.read() if not now & 1 else None
        generation, position = self.counter()
        active = posted is not None and posted.generation == generation
        if moment == "idle":
            return not active and position == 0
        if moment == "planning":
            return not active and any(group.planning for group in self.client.status().groups)
        if moment == "staging":
            staged = [self.words.newest(rank) for rank in range(SPEC.num_ranks)]
            return active and any(word is not None and position_of(word.staged) > 0 for word in staged)
        return active and position > 0


def wait_for(condition: object, deadline_s: float, what: str) -> None:
    """Poll a condition.

    Raises:
        TimeoutError: it did not come true; names it.
    """
    end = time.monotonic() + deadline_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            raise TimeoutError(f"waited {deadline_s:g} s for {what}")
        time.sleep(0.005)

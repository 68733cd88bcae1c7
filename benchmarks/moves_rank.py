"""One rank of bench_moves: an engine, a hook on its weights, and what is asked of them by the parent."""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.engine.config import EngineConfig
from benchmarks.engine.model import Engine
from eplb_async import RankHook
from eplb_async.core.config import HookSettings, Settings
from eplb_async.core.placement import initial_placement
from eplb_async.rank.transfer.base import Pull
from eplb_async.rank.transfer.cuda_ipc import CudaIpcTransfer

__all__ = ["GROUP", "Case", "Rank", "serve"]

GROUP = "bench-moves"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Of one run; see the options."""

    config: EngineConfig
    steps: int
    bytes_per_step: int
    rows_per_commit: int
    verify: str
    directory: str


class Rank:
    """One process: an engine without a hook and one with, on the same weights, and what the parent asks of them."""

    def __init__(self, case: Case, rank: int) -> None:
        self.case, self.rank, self.device = case, rank, torch.device("cuda", rank)
        self.engine = Engine(case.config, rank, self.device)
        settings = Settings(
            runtime_dir=case.directory,
            hook=HookSettings(
                pull_bytes_per_step=case.bytes_per_step,
                staging_rows=max(2 * case.rows_per_commit, 16),
                verify=case.verify,  # type: ignore[arg-type]
            ),
        )
        self.hook = RankHook.attach(
            group=GROUP,
            rank=rank,
            spec=self.engine.spec,
            weights=self.engine.weights,
            load=self.engine.load,
            settings=settings,
        )
        self.engine.use(self.hook)
        self.engine.prepare(0, 16)
        self.engine.warm_up()
        self.side = torch.cuda.Stream()
        self.exchange = dist.new_group(backend="nccl", timeout=timedelta(seconds=60))
        self.buffers = [torch.empty_like(tensor[0]) for tensor in self.engine.weights[0].values()]

    def block(self, kind: str, steps: int) -> dict[str, Any]:
        """Steps of one kind; their times, and which of them committed something."""
        hooked, marks = kind in ("hook", "moving"), [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        commits, pulled, host_us = np.zeros(steps, dtype=np.int64), np.zeros(steps, dtype=np.int64), np.zeros(steps)
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        parts = self.hook._parts
        before = parts.committer.num_commits, parts.stager.bytes_pulled
        marks[0].record()
        for step in range(steps):
            if step > 2:
                marks[step - 2].synchronize()
            start = time.perf_counter_ns()
            if hooked:
                self.hook.before_forward("decode", self.case.config.tokens_per_rank)
            issued = time.perf_counter_ns()
            if kind == "nccl":
                self._send_and_receive()
            self.engine.run_step(step % 16)
            left = time.perf_counter_ns()
            if hooked:
                self.hook.after_forward()
            host_us[step] = (issued - start + time.perf_counter_ns() - left) / 1e3
            commits[step] = parts.committer.num_commits - before[0]
            pulled[step] = parts.stager.bytes_pulled - before[1]
            marks[step + 1].record()
        torch.cuda.synchronize()
        times = np.array([marks[step].elapsed_time(marks[step + 1]) for step in range(steps)])
        return {"ms": times, "commits": np.diff(commits, prepend=0), "bytes": int(pulled[-1]), "host_us": host_us}

    def finish_plan(self) -> None:
        """Steps without a forward until the parent says that all is done; in groups, since ranks must make the same number."""
        for _ in range(20):
            with self.hook.step("dummy"):
                pass

    def idle_transfer(self, rows: int, verify: bool, turns: int = 5) -> float:
        """GB/s of pulls of so many experts of layer 0 from the other rank, all at once."""
        transfer = self._transfer()
        peer = 1 - self.rank
        rows = min(rows, transfer.staging.num_rows)
        expected = None
        if verify:
            expected = [self.hook._parts.stager._fingerprints(0, expert) for expert in self._experts_of(peer, rows)]
        best = 0.0
        for _ in range(turns):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            dist.barrier()
            torch.cuda.synchronize()
            pulls = [
                transfer.pull(0, Pull(expert, peer, slot, slot), slot, expected[slot] if expected else None)
                for slot, expert in enumerate(self._experts_of(peer, rows))
            ]
            begin.record(transfer.stream)
            transfer.flush()
            end.record(transfer.stream)
            torch.cuda.synchronize()
            assert all(pull.done and pull.error is None for pull in pulls), [pull.error for pull in pulls]
            best = max(best, rows * transfer.weights.slot_bytes[0] / begin.elapsed_time(end) / 1e6)
        return best

    def plain_copy(self, num_bytes: int, alone: bool, turns: int = 5) -> float:
        """GB/s of one plain copy from the other rank's weights; by both ranks at once, or only by rank 0."""
        transfer, best = self._transfer(), 0.0
        address = transfer._peers[1 - self.rank][0][0][0]
        num_bytes = min(num_bytes, transfer.staging.num_bytes, self.engine.weights[0]["gate_up"].nbytes)
        for _ in range(turns):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            dist.barrier()
            torch.cuda.synchronize()
            begin.record(transfer.stream)
            if not alone or self.rank == 0:
                transfer._driver.copy(
                    transfer.staging._buffer.data_ptr(), address, num_bytes, transfer.stream.cuda_stream
                )
            end.record(transfer.stream)
            torch.cuda.synchronize()
            best = max(best, num_bytes / begin.elapsed_time(end) / 1e6)
        return best

    def commit_kernel(self, rows: int, turns: int = 20) -> float:
        """Milliseconds of the kernel of a commit of so many rows, on an idle GPU; fills slots with their own bytes."""
        transfer, found = self._transfer(), []
        for row in range(rows):
            for name_part, tensor in zip(transfer.staging.tensors(0, row), transfer.weights.rows[0], strict=True):
                name_part.copy_(tensor[row])
        for _ in range(turns):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(400_000)
            begin.record()
            transfer.commit(0, [(row, row) for row in range(rows)], [])
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        return float(np.median(found))

    def statistics(self) -> dict[str, Any]:
        """Host times of the hook, and how plans ended."""
        statistics = self.hook.statistics()
        return {
            "drops": statistics.num_drops,
            "commits": statistics.num_commits,
            **{f"{name} p50": timing.p50_us for name, timing in statistics.times.items()},
            **{f"{name} p99": timing.p99_us for name, timing in statistics.times.items()},
        }

    def close(self) -> None:
        """Leave."""
        dist.barrier()
        self.hook.detach()
        self.engine.close()

    def _experts_of(self, peer: int, rows: int) -> list[int]:
        width = self.engine.spec.slots_per_rank
        row_P: list[int] = initial_placement(self.engine.spec)[0].tolist()
        return row_P[peer * width : peer * width + rows]

    def _transfer(self) -> CudaIpcTransfer:
        transfer = self.hook._parts.transfer
        assert isinstance(transfer, CudaIpcTransfer)
        return transfer

    def _send_and_receive(self) -> None:
        self.side.wait_stream(torch.cuda.current_stream())
        peer, layer = 1 - self.rank, self.engine.weights[0]
        with torch.cuda.stream(self.side):
            operations = [dist.P2POp(dist.isend, tensor[0], peer, self.exchange) for tensor in layer.values()]
            operations += [dist.P2POp(dist.irecv, buffer, peer, self.exchange) for buffer in self.buffers]
            dist.batch_isend_irecv(operations)


def serve(case: Case, rank: int, pipe: "Connection[Any, Any]") -> None:
    """A rank's process: commands are methods of Rank."""
    torch.set_num_threads(1)
    torch.cuda.set_device(rank)
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    dist.init_process_group(
        "cuda:nccl,cpu:gloo",
        init_method=f"file://{case.directory}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    served = Rank(case, rank)
    pipe.send("ready")
    while True:
        command, arguments = pipe.recv()
        pipe.send(getattr(served, command)(*arguments))
        if command == "close":
            return

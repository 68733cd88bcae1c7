"""The parts of the CUDA data plane one by one, in one process: what each way of recording, copying and checking costs.

    python -m benchmarks.bench_device
    python -m benchmarks.bench_device --expert-mib 36 --json device.json

Host: time of the calls, p50 over repetitions with an idle device. Device: time between two events around many repetitions, each.
Copies between GPUs need two; with one they are made inside it. This is where the choices in docs/gpu.md come from.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere, installed or not

import numpy as np
import torch
import typer

from benchmarks.reporting import Column, show_table, write_json
from eplb_async.core.load import LoadKind, Phase
from eplb_async.rank.cuda.commit_tables import CommitTables
from eplb_async.rank.cuda.driver import CudaDriver, load_driver
from eplb_async.rank.cuda.recorder import CudaRecorder
from eplb_async.rank.cuda.streams import ComputeStream
from eplb_async.rank.recorder import Recorder
from eplb_async.shm.ring import LoadRing

__all__ = ["main"]

Row = dict[str, object]
COLUMNS = [
    Column(key="what", title="what"),
    Column(key="host_us", title="host p50, us", digits=1),
    Column(key="device_us", title="device, us", digits=1),
    Column(key="gb_s", title="GB/s", digits=0),
]


def main(
    expert_mib: Annotated[float, typer.Option(help="Size of an expert's largest tensor.")] = 24.0,
    layers: Annotated[int, typer.Option(help="MoE layers of the load tensor.")] = 58,
    experts: Annotated[int, typer.Option(help="Experts of the load tensor.")] = 288,
    repetitions: Annotated[int, typer.Option(help="Of each measurement.")] = 200,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
) -> None:
    """Measure and print."""
    torch.cuda.init()
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    with torch.cuda.stream(torch.cuda.Stream()):
        measure = _Measure(load_driver(), device, int(expert_mib * (1 << 20)), repetitions)
        rows = [
            *measure.recording(layers, experts),
            *measure.pulls(),
            *measure.commits(),
            *measure.fingerprints(),
            *measure.dispatch(),
        ]
    more: Row = {"gpu": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"}
    show_table("CUDA data plane, part by part", COLUMNS, rows, "part", more=more)
    if json is not None:
        write_json(json, "device", rows, more)


class _Measure:
    def __init__(self, driver: CudaDriver, device: torch.device, expert_bytes: int, repetitions: int) -> None:
        self._driver, self._device, self._bytes, self._number = driver, device, expert_bytes, repetitions

    def recording(self, layers: int, experts: int) -> list[Row]:
        """Counts to registered host memory, and how the host comes to know."""
        from eplb_async.rank.cuda.streams import EventCompletion

        driver, stream = self._driver, torch.cuda.current_stream()
        load = torch.zeros(layers, experts, dtype=torch.int32, device=self._device)
        target, flag = (
            torch.empty(load.shape, dtype=torch.int32, pin_memory=True),
            torch.zeros(1, dtype=torch.int64, pin_memory=True),
        )
        words, to, source, handle = load.numel(), target.data_ptr(), load.data_ptr(), stream.cuda_stream
        spare = torch.cuda.Stream()

        def copy() -> None:
            driver.copy(to, source, 4 * words, handle)

        ours = _recorder(load)

        def record() -> None:
            ours.record(0, Phase.DECODE, 0, 0)

        def with_flag() -> None:
            driver.copy(to, source, 4 * words, handle)
            driver.zero(source, words, handle)
            driver.write_value(flag.data_ptr(), 1, handle)

        def with_event() -> None:
            driver.copy(to, source, 4 * words, handle)
            driver.zero(source, words, handle)
            EventCompletion(stream)

        def beside() -> None:
            spare.wait_stream(stream)
            driver.copy(to, source, 4 * words, spare.cuda_stream)
            driver.zero(source, words, spare.cuda_stream)
            stream.wait_stream(spare)

        def torch_calls() -> None:
            target.copy_(load, non_blocking=True)
            load.zero_()
            EventCompletion(stream)

        named: dict[str, Callable[[], object]] = {
            "record: one kernel into shared memory (ours)": record,
            "record: copy of the counts alone": copy,
            "record: copy, zero, flag written by the stream": with_flag,
            "record: copy, zero, event": with_event,
            "record: copy and zero on a second stream": beside,
            "record: torch copy_, zero_, event": torch_calls,
        }
        rows = [self._row(what, call) for what, call in named.items()]
        ours.close()
        ours.ring.segment.unlink()
        return rows

    def pulls(self) -> list[Row]:
        """Three tensors of an expert from another GPU."""
        peer = torch.device("cuda", 1) if torch.cuda.device_count() > 1 else self._device
        sizes = [self._bytes, self._bytes // 2, 4096]
        rows: list[Row] = []
        stream = torch.cuda.current_stream()
        for number in (1, 4):
            pairs = [
                (
                    torch.empty(size, dtype=torch.uint8, device=self._device),
                    torch.ones(size, dtype=torch.uint8, device=peer),
                )
                for size in sizes * number
            ]
            pairs[0][0].copy_(pairs[0][1])  # torch opens peer access
            copies = [(to.data_ptr(), source.data_ptr(), to.numel()) for to, source in pairs]
            total = sum(size for *_, size in copies)

            def plain(copies: list[tuple[int, int, int]] = copies) -> None:
                for copy in copies:
                    self._driver.copy(*copy, stream.cuda_stream)

            def batched(copies: list[tuple[int, int, int]] = copies) -> None:
                self._driver.copy_beside(copies, stream.cuda_stream)

            def with_torch(pairs: list[tuple[torch.Tensor, torch.Tensor]] = pairs) -> None:
                for to, source in pairs:
                    to.copy_(source, non_blocking=True)

            few = max(5, self._number // 10)
            rows += [
                self._row(f"pull {number} expert(s): a call per tensor", plain, total, few),
                self._row(f"pull {number} expert(s): one batch (ours)", batched, total, few),
                self._row(f"pull {number} expert(s): torch copy_", with_torch, total, few),
            ]
        return rows

    def commits(self) -> list[Row]:
        """Staging to live inside the GPU."""
        to, source = (torch.ones(8, self._bytes, dtype=torch.uint8, device=self._device) for _ in range(2))
        stream = torch.cuda.current_stream()
        copies = [(to[row].data_ptr(), source[row].data_ptr(), self._bytes) for row in range(8)]

        def one_by_one() -> None:
            for copy in copies:
                self._driver.copy(*copy, stream.cuda_stream)

        size = self._bytes
        live = [[(to.data_ptr(), size)]]
        tables = CommitTables(self._driver, live, [[[row.data_ptr()] for row in source]], [[size]])
        pairs = [(row, row) for row in range(8)]
        return [
            self._row(
                "commit 8 rows: one kernel (ours)",
                lambda: tables.launch(0, pairs, [], stream.cuda_stream),
                8 * self._bytes,
            ),
            self._row("commit 8 rows: a call per tensor", one_by_one, 8 * self._bytes),
            self._row(
                "commit 8 rows: one batch",
                lambda: self._driver.copy_beside(copies, stream.cuda_stream),
                8 * self._bytes,
            ),
            self._row("commit 8 rows: torch copy_", lambda: to.copy_(source), 8 * self._bytes),
        ]

    def fingerprints(self) -> list[Row]:
        """Of four rows, with more and more programs."""
        from eplb_async.rank.cuda.fingerprint import DeviceFingerprints

        memory = torch.ones(4, self._bytes, dtype=torch.uint8, device=self._device)
        stream = torch.cuda.current_stream().cuda_stream
        table = torch.tensor([(row.data_ptr(), row.numel()) for row in memory], device=self._device)
        results, kernel = (
            torch.zeros(4, dtype=torch.int64, device=self._device),
            DeviceFingerprints(self._device, self._driver),
        )
        return [
            self._row(
                f"fingerprints of 4 rows: {4 * programs} programs",
                lambda programs=programs: kernel.add(table, results, programs, stream),  # type: ignore[misc]
                4 * self._bytes,
            )
            for programs in (1, 2, 4, 8, 16, 32, 64, 512)
        ]

    def dispatch(self) -> list[Row]:
        """8,192 tokens x top-8 of 256 experts, one of them hot."""
        from eplb_async.rank.dispatch import map_and_count

        random = torch.Generator(device=self._device).manual_seed(1)
        ids = (256 * torch.rand(8192, 8, device=self._device, generator=random) ** 3).to(torch.int32)
        table_EK = torch.randint(0, 288, (256, 32), device=self._device, generator=random)
        count_E = torch.randint(1, 33, (256,), device=self._device, generator=random)
        logical, slots = (torch.zeros(size, dtype=torch.int32, device=self._device) for size in (256, 288))
        expert = ids.long()

        def plain_torch() -> None:
            entry = torch.arange(8192, device=self._device)[:, None] % count_E[expert]
            table_EK[expert, entry]
            logical.scatter_add_(0, expert.view(-1), torch.ones_like(ids).view(-1))

        calls: dict[str, Callable[[], object]] = {
            "map 8,192 x 8: lookup alone": lambda: map_and_count(ids, table_EK, count_E),
            "map 8,192 x 8: and count experts": lambda: map_and_count(ids, table_EK, count_E, logical_load_E=logical),
            "map 8,192 x 8: and count experts and slots": lambda: map_and_count(
                ids, table_EK, count_E, logical_load_E=logical, slot_load_P=slots
            ),
            "map 8,192 x 8: torch, experts counted": plain_torch,
        }
        return [self._row(what, call) for what, call in calls.items()] + [
            self._row(f"{what}, in a graph", _captured(call), number=self._number) for what, call in calls.items()
        ]

    def _row(self, what: str, call: Callable[[], object], num_bytes: int = 0, number: int = 0) -> Row:
        number = number or self._number
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        host = []
        for _ in range(number):
            start = time.perf_counter_ns()
            call()
            host.append(time.perf_counter_ns() - start)
            torch.cuda.synchronize()
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # enough work ahead of them that the device never waits for the host
        torch.cuda._sleep(int(number * float(np.median(host)) * 2.5))
        before.record()
        for _ in range(number):
            call()
        after.record()
        torch.cuda.synchronize()
        device_us = before.elapsed_time(after) * 1e3 / number
        part, _, what = what.partition(": ")
        row: Row = {"part": part, "what": what, "host_us": float(np.median(host)) / 1e3, "device_us": device_us}
        return row | ({"gb_s": num_bytes / device_us / 1e3} if num_bytes else {})


def _recorder(load: torch.Tensor) -> CudaRecorder:
    info = Recorder.ring_info(f"bench-{os.getpid()}", 0, load, LoadKind.LOGICAL, 256)
    return CudaRecorder(load, LoadRing.create(info, 1), load_driver(), ComputeStream(load.device))


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


if __name__ == "__main__":
    typer.run(main)

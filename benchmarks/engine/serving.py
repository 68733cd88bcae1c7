"""One rank of a measured run: its process, the loop of steps, and the files it leaves.

Files of rank r in the run's directory:

    rank{r}.step_ms.npy    float64 [T], time of each step, from the end of the one before: hook, copies and stalls included
    rank{r}.npz            rows_TL (pairs computed here), maps_TLP (placement of each step), before_us_T and after_us_T (host time
                           in the hook), ids_T (checksums of the routing)
    rank{r}.digests.txt    one line per step: sha256 of the line before and of the step's tokens and hidden state
    rank{r}.json           everything else

The host issues at most `ahead` steps before the device has finished the ones before, as engines with asynchronous scheduling do.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from benchmarks.engine.config import EngineConfig, Mode
from benchmarks.engine.model import Engine
from benchmarks.engine.stop_the_world import StopTheWorld
from eplb_async import RankHook, share_weights
from eplb_async.core.config import load_settings
from eplb_async.core.placement import initial_placement
from eplb_async.rank.maps import Maps
from eplb_async.runtime.client import ControlClient

__all__ = ["RunRequest", "run_rank"]

COLLECTIVE_DEADLINE = timedelta(seconds=180)
POLICY_DEADLINE_S = 150.0
POOL_BYTES = 8 << 30
"""Most memory for prepared ids; longer runs are prepared in several parts, between steps and outside of their times."""


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """One mode of one run; the same for every rank.

    Attributes:
        mode: see config.MODES.
        config: of the engine.
        steps: measured ones.
        interval: steps between two rebalances of mode "sync".
        ahead: steps that the host may be ahead of the device.
        group: name of the hook's group.
        device: "cuda" (rank r takes device r) or "cpu".
        rendezvous: a file for torch.distributed to meet in; it must not exist.
        output: an existing directory.
        settings: EPLB_ASYNC_* variables of hook and daemon.
        environ: variables to set in the rank's process, for NCCL and the like.
    """

    mode: Mode
    config: EngineConfig
    steps: int
    interval: int
    ahead: int
    group: str
    device: str
    rendezvous: Path
    output: Path
    settings: dict[str, str]
    environ: dict[str, str]


class StepClock:
    """Times between marks: events on the device's current stream, or host time on the CPU."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._marks: list[torch.cuda.Event | int] = []
        self._steps: list[tuple[int, int]] = []

    def begin(self) -> None:
        """The next step is measured from here."""
        self._mark()

    def end_step(self) -> None:
        """A step ends here, and the next one begins."""
        self._mark()
        self._steps.append((len(self._marks) - 2, len(self._marks) - 1))

    def wait(self, step: int) -> None:
        """Wait until the device has finished a step; negative ones have."""
        if step >= 0 and isinstance(end := self._marks[self._steps[step][1]], torch.cuda.Event):
            end.synchronize()

    def step_ms(self) -> np.ndarray:
        """Of all steps so far, float64 [T]; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        return np.array([self._between_ms(self._marks[first], self._marks[last]) for first, last in self._steps])

    @staticmethod
    def _between_ms(first: torch.cuda.Event | int, last: torch.cuda.Event | int) -> float:
        if isinstance(first, int) or isinstance(last, int):
            assert isinstance(first, int) and isinstance(last, int)  # noqa: PT018 (one clock has marks of one kind)
            return (last - first) / 1e6
        return float(first.elapsed_time(last))

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter_ns())


class _Measured:
    """What a rank keeps of each step; on the device until the end."""

    def __init__(self, engine: Engine, steps: int) -> None:
        spec, device = engine.spec, engine.device
        self.records = torch.zeros((steps, len(engine.record)), dtype=torch.int64, device=device)
        self.maps = torch.zeros((steps, spec.num_layers, spec.num_slots), dtype=torch.int16, device=device)
        self.ids = torch.zeros(steps, dtype=torch.int64, device=device)
        self.before_us, self.after_us = np.zeros(steps), np.zeros(steps)
        self.clock = StepClock(device.type == "cuda")
        self._factors = 2 * torch.arange(engine.ids_of(0).numel(), device=device) + 1

    def prepared(self, engine: Engine, first: int, count: int) -> None:
        for step in range(first, first + count):
            self.ids[step] = (engine.ids_of(step).reshape(-1).to(torch.int64) * self._factors).sum()

    def keep(self, step: int, engine: Engine, map_LP: torch.Tensor) -> None:
        self.records[step].copy_(engine.record)
        self.maps[step].copy_(map_LP)


def run_rank(request: RunRequest, rank: int, done: Connection) -> None:
    """The rank's process. Sends True when its files are written, then takes everything down."""
    torch.set_num_threads(1)
    os.environ.update(request.environ)
    # NVLink multicast hangs in some virtual machines, and ranks of one host meet over loopback
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    cuda = request.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{request.rendezvous}",
        rank=rank,
        world_size=request.config.num_ranks,
        timeout=COLLECTIVE_DEADLINE,
    )
    control = dist.new_group(backend="gloo", timeout=COLLECTIVE_DEADLINE)
    engine = Engine(request.config, rank, device)
    shared = None
    if request.mode in ("static", "ours") and not cuda:
        engine.weights = shared = share_weights(request.group, rank, engine.weights)
    hook = _attach(request, engine) if request.mode in ("static", "ours") else None
    try:
        maps = hook or Maps(initial_placement(engine.spec), engine.spec, device)
        engine.use(maps)
        balancer = StopTheWorld(engine, maps) if request.mode == "sync" and isinstance(maps, Maps) else None
        _run(request, engine, hook, balancer, control)
        done.send(True)
    finally:
        if hook is not None:
            hook.detach()
        engine.close()
        if shared is not None:
            shared.close()
    dist.destroy_process_group()


def _attach(request: RunRequest, engine: Engine) -> RankHook:
    return RankHook.attach(
        group=request.group,
        rank=engine.rank,
        spec=engine.spec,
        weights=engine.weights,
        load=engine.load,
        daemon="required" if request.mode == "ours" else "optional",
        settings=load_settings(environ=request.settings),
    )


def _run(
    request: RunRequest,
    engine: Engine,
    hook: RankHook | None,
    balancer: StopTheWorld | None,
    control: dist.ProcessGroup,
) -> None:
    per_step = engine.config.num_layers * engine.config.num_pairs * engine.routing.id_dtype.itemsize
    chunk = min(request.steps, max(1, POOL_BYTES // per_step))
    engine.prepare(0, chunk)
    measured = _Measured(engine, request.steps)
    engine.warm_up()
    if request.mode == "ours" and engine.rank == 0:
        _wait_for_policy(request)
    map_LP = engine.maps.slot_to_expert_LP
    clock, now = measured.clock, time.perf_counter_ns
    started = time.perf_counter()
    for step in range(request.steps):
        if step % chunk == 0:
            _prepare(request, engine, measured, step, chunk)
            dist.barrier(group=control)
            clock.begin()
        clock.wait(step - 1 - request.ahead)
        start = now()
        if hook is not None:
            hook.before_forward("decode", engine.config.tokens_per_rank)
        issued = now()
        engine.run_step(step)
        left = now()
        if hook is not None:
            hook.after_forward()
        end = now()
        measured.before_us[step], measured.after_us[step] = (issued - start) / 1e3, (end - left) / 1e3
        measured.keep(step, engine, map_LP)
        if balancer is not None and (step + 1) % request.interval == 0:
            balancer.rebalance(step)
        clock.end_step()
    step_ms = clock.step_ms()
    seconds = time.perf_counter() - started
    # a rank that detaches takes its weights away from those that may still pull
    dist.barrier(group=control)
    facts = {
        "mode": request.mode,
        "rank": engine.rank,
        "config": asdict(request.config),
        "steps": request.steps,
        "interval": request.interval,
        "ahead": request.ahead,
        "seconds": seconds,
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "peak_bytes": torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else 0,
        "hook": msgspec.to_builtins(hook.statistics()) if hook is not None else None,
        "rebalances": [rebalance.as_dict() for rebalance in balancer.history] if balancer is not None else [],
    }
    _write(request.output, engine, measured, step_ms, facts)


def _wait_for_policy(request: RunRequest) -> None:
    """Until the daemon has compiled its policy, which it does while ranks load; the other ranks wait at the barrier."""
    end = time.monotonic() + POLICY_DEADLINE_S
    with ControlClient(load_settings(environ=request.settings)) as client:
        while not client.status().pool["num_idle"]:
            if time.monotonic() > end:
                raise TimeoutError(f"the daemon's policy was not ready after {POLICY_DEADLINE_S:g} s")
            time.sleep(0.05)


def _prepare(request: RunRequest, engine: Engine, measured: _Measured, step: int, chunk: int) -> None:
    """Draw the ids of the next steps; those of the first are there."""
    count = min(chunk, request.steps - step)
    if step:
        engine.prepare(step, count)
    measured.prepared(engine, step, count)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()


def _write(output: Path, engine: Engine, measured: _Measured, step_ms: np.ndarray, facts: dict[str, object]) -> None:
    prefix, count = output / f"rank{engine.rank}", engine.config.tokens_per_rank
    records = measured.records.cpu().numpy()
    digest, lines = b"", []
    for record in records[:, : count + 1]:
        digest = hashlib.sha256(digest + record.tobytes()).digest()
        lines.append(digest.hex() + "\n")
    np.save(f"{prefix}.step_ms.npy", step_ms)
    np.savez_compressed(
        f"{prefix}.npz",
        rows_TL=records[:, count + 1 :],
        maps_TLP=measured.maps.cpu().numpy(),
        before_us_T=measured.before_us,
        after_us_T=measured.after_us,
        ids_T=measured.ids.cpu().numpy(),
    )
    Path(f"{prefix}.digests.txt").write_text("".join(lines), encoding="ascii")
    Path(f"{prefix}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

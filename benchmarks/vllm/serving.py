"""One case, in a process of its own: start vLLM, serve the scenario's traffic, check every slot, and write down what was seen.

decode    `batch` requests decode together; some changes of the router. Events: `kill` kills the daemon with SIGKILL, `status` runs
          `eplb-async status`, `serve` starts `eplb-async serve`, `fault` spoils what a rank expects of the next row that it pulls
prefill   steps of `batch` whole prompts, one token each
outputs   `steps` waves of `batch` requests, decoded greedily by an engine in this process, so that each run schedules alike
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from signal import SIGKILL
from typing import Any

import msgspec
import numpy as np

from benchmarks.vllm.config import MODES, Scenario, engine_arguments
from benchmarks.vllm.traffic import router_bias
from eplb_async.core.config import load_settings
from eplb_async.core.errors import EplbError
from eplb_async.runtime.client import ControlClient
from eplb_async.shm.segment import list_segments

__all__ = ["run_case", "slots_checked"]

VOCABULARY = 32_000
SETTLE_STEPS = {"decode": 200, "prefill": 30}
"""Steps before the measured ones; the daemon meets the group in them."""
READY_S = 60.0
WAITING = 16
"""Steps' worth of prompts that wait in the engine."""


def run_case(scenario: Scenario, mode: str, trace: Path | None, folder: Path) -> dict[str, Any]:
    """Serve one scenario in one mode.

    Args:
        scenario, mode: see config.py.
        trace: for the router of prefill.
        folder: for the model and the daemon's runtime directory.

    Returns:
        what was seen, to be written as JSON.
    """
    run = _Run(scenario, mode, trace, folder)
    with run.served():
        {"decode": run.decode, "prefill": run.prefill, "outputs": run.outputs}[scenario.kind]()
    return run.seen


class _Run:
    def __init__(self, scenario: Scenario, mode: str, trace: Path | None, folder: Path) -> None:
        self.scenario, self.mode, self.trace, self.folder = scenario, mode, trace, folder
        self.random = np.random.default_rng(11)
        self.marks: dict[str, float] = {}
        self.seen: dict[str, Any] = {"mode": mode, "scenario": asdict(scenario), "marks": self.marks}
        self._children: dict[str, subprocess.Popen[str]] = {}
        self._requests = 0
        self.llm: Any = None

    @contextmanager
    def served(self) -> Iterator[None]:
        """The engine, from its start to the last check."""
        chosen = MODES[self.mode]
        os.environ["EPLB_ASYNC_INTEGRATION_ENABLED"] = str(int(chosen.ours))
        os.environ["EPLB_ASYNC_RUNTIME_DIR"] = str(self.folder / "run")
        if chosen.runner == "V2":
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        if self.scenario.kind == "outputs":
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if self.scenario.record_loads:
            os.environ["EPLB_BENCH_RECORD_ALL"] = "1"
        os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / "eplb-vllm-numba"))
        from vllm import LLM

        start = time.perf_counter()
        self.llm = LLM(**engine_arguments(self.scenario, self.mode, self.folder / "model"))
        self.seen["start_s"] = time.perf_counter() - start
        self.seen["about"] = self.rpc("bench_about")
        self.router(0)
        balancer = self.seen["about"][0]["balancer"]
        if chosen.ours != (balancer == "eplb_async"):
            raise RuntimeError(f"mode {self.mode} is balanced by {balancer}")
        if chosen.ours:
            self._wait_for_daemon()
        sums = self.rpc("bench_sums") if chosen.eplb is not None else None
        maps = self.rpc("bench_maps") if chosen.eplb is not None else None
        if self.mode == "spoiled":
            self.rpc("bench_spoil")
        self.rpc("bench_probe", self.scenario.record_loads)
        yield
        self.seen["workers"] = self.rpc("bench_fetch")
        if sums is not None and maps is not None:
            self.seen["check"] = slots_checked(sums, maps, self.rpc("bench_sums"), self.rpc("bench_maps"))
        if chosen.ours:
            self._ask_daemon()
        self._stop()
        self._collect()

    def decode(self) -> None:
        """See the module."""
        scenario = self.scenario
        engine, batch = self.llm.llm_engine, scenario.batch
        self._add(batch, scenario.steps + SETTLE_STEPS["decode"] + 100)
        full = 0
        while full < SETTLE_STEPS["decode"]:
            full += len(engine.step()) == batch
        self.marks["begin"] = time.perf_counter()
        due = self._due()
        for step in range(scenario.steps):
            self._happen(due.pop(step, ()))
            engine.step()
        self.marks["end"] = time.perf_counter()
        self.seen["unfinished"] = batch - self._finish()

    def prefill(self) -> None:
        """See the module."""
        scenario, engine = self.scenario, self.llm.llm_engine
        self._add(WAITING * scenario.batch, 1)
        finished = 0
        due, measured = self._due(), 0
        while measured < scenario.steps:
            outputs = engine.step()
            finished += len(outputs)
            self._add(len(outputs), 1)
            if finished >= SETTLE_STEPS["prefill"] * scenario.batch:
                self.marks.setdefault("begin", time.perf_counter())
                measured += bool(outputs)
                self._happen(due.pop(measured, ()))
        self.marks["end"] = time.perf_counter()
        self.seen["unfinished"] = self._requests - finished - self._finish()

    def outputs(self) -> None:
        """See the module."""
        scenario, engine = self.scenario, self.llm.llm_engine
        waves = scenario.steps if self.mode != "spoiled" else max(1, scenario.steps // 6)
        self._add(waves * scenario.batch, scenario.tokens)
        self.marks["begin"] = time.perf_counter()
        tokens: dict[int, list[int]] = {}
        due, step = self._due(waves * scenario.tokens), 0
        while engine.has_unfinished_requests():
            self._happen(due.pop(step, ()))
            step += 1
            for output in engine.step():
                if output.finished:
                    tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
        self.marks["end"] = time.perf_counter()
        self.seen["unfinished"] = self._requests - len(tokens)
        # of each request, so that a shorter run can be compared with a longer one
        self.seen["digests"] = [_digest(tokens.get(number, [])) for number in range(self._requests)]
        self.seen["distinct_tokens"] = len({token for answer in tokens.values() for token in answer})
        self.seen["engine_steps"] = step

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Of every worker."""
        return [json.loads(answer) for answer in self.llm.collective_rpc(method, timeout=120, args=args)]

    def router(self, part: int) -> None:
        """Give the gates the bias of a part of the run."""
        before = time.perf_counter()
        self.rpc("bench_router", router_bias(self.scenario, self.trace, part % 2 if self.trace_driven else part))
        self.seen.setdefault("changes", []).append([before, time.perf_counter()])

    @property
    def trace_driven(self) -> bool:
        """The bias comes from two windows of a trace."""
        return self.scenario.kind == "prefill"

    def _due(self, steps: int = 0) -> dict[int, tuple[str, ...]]:
        """What happens at which step."""
        steps = steps or self.scenario.steps
        due: dict[int, tuple[str, ...]] = {}
        for name, share in [*(("change", share) for share in self.scenario.changes), *self.scenario.events]:
            due[int(share * steps)] = (*due.get(int(share * steps), ()), name)
        return due

    def _happen(self, names: tuple[str, ...]) -> None:
        for name in names:
            self.marks[f"{name}_{sum(mark.startswith(name) for mark in self.marks)}"] = time.perf_counter()
            if name == "change":
                self.router(len(self.seen["changes"]))
            elif self.mode.startswith("ours"):
                self._event(name)

    def _event(self, name: str) -> None:
        if name == "kill":
            self._ask_daemon("decisions_of_the_killed")
            os.kill(self.seen["daemon"]["pid"], SIGKILL)
        elif name == "fault":
            self.rpc("bench_fault")
        else:
            command = [sys.executable, "-m", "eplb_async", name]
            environment = {**os.environ, **self._daemon_variables()}
            log = (self.folder / f"{name}.log").open("w")
            self._children[name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
            )

    def _daemon_variables(self) -> Mapping[str, str]:
        """The scenario's settings of the daemon, for one that the engine does not start."""
        daemon = engine_arguments(self.scenario, self.mode, self.folder / "model")["additional_config"]["eplb_async"][
            "daemon"
        ]
        return {f"EPLB_ASYNC_DAEMON_{name.upper()}": str(value) for name, value in daemon.items()}

    def _collect(self) -> None:
        for name, child in self._children.items():
            try:
                code = child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                code = None
            self.seen[f"{name}_exit"] = code
            self.seen[f"{name}_output"] = (self.folder / f"{name}.log").read_text()[-4000:]

    def _wait_for_daemon(self) -> None:
        """Until it knows the group and has a policy ready: measured steps must not depend on how long that took."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            try:
                with ControlClient(load_settings()) as client:
                    status = client.status()
                if status.pool["num_idle"] and status.groups:
                    return
            except EplbError:
                pass
            time.sleep(0.1)
        raise RuntimeError("the daemon is not ready")

    def _ask_daemon(self, key: str = "decisions") -> None:
        """What it has decided, into `seen[key]`."""
        with ControlClient(load_settings()) as client:
            status, history = client.status(), client.history(most=4096)
        self.seen["daemon"] = {"pid": status.pid, "cpu_share": status.cpu_share, "uptime_s": status.uptime_s}
        self.seen[key] = [
            {name: value for name, value in msgspec.to_builtins(decision).items() if not name.endswith("_L")}
            for decision in history.get(self.seen["about"][0]["group"], [])
        ]

    def _stop(self) -> None:
        """The engine and its daemon; what they leave in shared memory."""
        self.llm.llm_engine.engine_core.shutdown()
        if MODES[self.mode].ours:
            with ControlClient(load_settings()) as client:
                client.stop_daemon()
        own = self.seen["about"][0]["group"]
        self.seen["segments_left"] = [name for name, group, _ in list_segments() if group == own]

    def _add(self, count: int, tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.FINAL_ONLY if self.scenario.kind == "outputs" else RequestOutputKind.DELTA
        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=kind
        )
        for _ in range(count):
            prompt = self.random.integers(10, VOCABULARY, size=self.scenario.prompt).tolist()
            self.llm.llm_engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, sampling)
            self._requests += 1

    def _finish(self) -> int:
        """Serve what is left; how many requests ended in it."""
        finished = 0
        while self.llm.llm_engine.has_unfinished_requests():
            finished += sum(output.finished for output in self.llm.llm_engine.step())
        return finished


def slots_checked(sums: list[Any], maps: list[Any], sums_after: list[Any], maps_after: list[Any]) -> dict[str, int]:
    """Slots whose bytes are not those of the expert that the map names, and whether ranks' maps differ.

    Args:
        sums, sums_after: per rank [L][S][tensors].
        maps, maps_after: per rank, see worker.py.
    """
    width = len(sums[0][0])
    expected: dict[tuple[int, int], Any] = {}
    differ = wrong = moved = 0
    for rank, layers in enumerate(sums):
        for layer, slots in enumerate(layers):
            for slot, found in enumerate(slots):
                expert = maps[0]["experts"][layer][rank * width + slot]
                differ += expected.setdefault((layer, expert), found) != found
    for rank, layers in enumerate(sums_after):
        for layer, slots in enumerate(layers):
            for slot, found in enumerate(slots):
                expert = maps_after[0]["experts"][layer][rank * width + slot]
                wrong += expected.get((layer, expert)) != found
                moved += expert != maps[0]["experts"][layer][rank * width + slot]
    return {
        "slots": sum(len(slots) for layers in sums_after for slots in layers),
        "wrong_slots": wrong,
        "replicas_that_differed_at_start": differ,
        "wrong_map_entries": sum(part["wrong_entries"] for part in maps_after),
        "ranks_with_other_maps": sum(part["experts"] != maps_after[0]["experts"] for part in maps_after),
        "slots_off_initial": moved,
    }


def _digest(tokens: list[int]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16] if tokens else ""

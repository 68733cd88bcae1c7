"""Runs cases of real vLLM one after the other, each in a process forked from one that has imported vLLM already.

    python -m benchmarks.vllm OUT --repeats 3 decode:off decode:ours
    python -m benchmarks.vllm OUT --trace qwen3_30b_mgsm_8lang.npz prefill:static prefill:ours
    python -m benchmarks.vllm OUT --report

Needs two GPUs, vLLM 0.26, and eplb_async installed beside it. Each run of a case writes OUT/SCENARIO-MODE-NUMBER.json and a log beside it.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks.reporting import header
from benchmarks.vllm.config import MODES, SCENARIOS, parse_case
from benchmarks.vllm.report import report

IMPORTED = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.v1.attention.backends.flash_attn",
)
"""What each case would import again for 15 s; nothing here starts CUDA, which a fork could not take along."""


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for results")
    parser.add_argument("cases", nargs="*", metavar="SCENARIO:MODE[:NAME=NUMBER...]", help=_known())
    parser.add_argument("--repeats", type=int, default=1, help="all cases so many times, interleaved")
    parser.add_argument("--trace", type=Path, help=".npz with counts [T, L, 128] and window_labels, for prefill")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a case is killed")
    parser.add_argument("--total", type=float, default=3600.0, help="seconds after which no case is begun")
    parser.add_argument("--report", action="store_true", help="only print the tables of what lies in OUT")
    parser.add_argument("--plot", type=Path, help="draw PAR and throughput of prefill into this file")
    given = parser.parse_intermixed_args()
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        cases = [(text, *parse_case(text)) for text in given.cases]
    except ValueError as error:
        parser.error(str(error))
    failed = 0
    if cases and not given.report:
        begun = time.monotonic()
        _import_all()
        (given.out / "machine.json").write_text(json.dumps(header(), default=str))
        for repeat in range(given.repeats):
            for text, *_ in cases:
                if time.monotonic() - begun > given.total:
                    print(f"{text}, round {repeat + 1}: left out, no time", flush=True)
                    continue
                failed += not _run_forked(text, given)
    print(report(given.out))
    if given.plot is not None:
        from benchmarks.vllm.plots import plot_prefill

        plot_prefill(given.out, given.plot)
    return int(failed > 0)


def _known() -> str:
    return f"scenarios: {', '.join(SCENARIOS)}; modes: " + "; ".join(
        f"{name}, {mode.about}" for name, mode in MODES.items()
    )


def _import_all() -> None:
    start = time.monotonic()
    for name in IMPORTED:
        importlib.import_module(name)
    import torch

    if torch.cuda.is_initialized():
        raise RuntimeError("importing vLLM has started CUDA; cases cannot be forked")
    gc.collect()
    gc.freeze()  # or each child's first collection copies every page
    print(f"imports: {time.monotonic() - start:.1f} s", flush=True)


def _run_forked(text: str, given: argparse.Namespace) -> bool:
    """One case in a child that has a session of its own, so that nothing of it outlives it."""
    stem = text.replace(":", "-").replace("=", "")
    number = sum("daemon" not in path.name for path in given.out.glob(f"{stem}-[0-9]*.log"))
    name = f"{stem}-{number}"
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        _child(text, name, given)
    code = None
    while code is None and time.monotonic() - start < given.limit:
        pid, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if pid else None
        time.sleep(0.05)
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal_group(child, number)
        time.sleep(0.3)
    if code is None:
        os.waitpid(child, 0)
    _kill_left()
    print(f"{name}: exit {code}, {time.monotonic() - start:.1f} s", flush=True)
    if code != 0:
        print((given.out / f"{name}.log").read_text(errors="replace")[-6000:], flush=True)
    return code == 0


def _child(text: str, name: str, given: argparse.Namespace) -> None:
    log = os.open(given.out / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    folder = Path(tempfile.mkdtemp(prefix="eplb-vllm-"))
    try:
        from benchmarks.vllm.serving import run_case

        _, scenario, mode = parse_case(text)
        seen = run_case(scenario, mode, given.trace, folder)
        (given.out / f"{name}.json").write_text(json.dumps(seen))
        code = 0
    except BaseException:  # noqa: BLE001  it ends here, in the log and the exit status
        traceback.print_exc()
    finally:
        daemon_log = folder / "run" / "daemon.log"
        if daemon_log.exists():
            shutil.copy(daemon_log, given.out / f"{name}.daemon.log")
        shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _kill_left() -> None:
    """Workers that left the case's session: whoever else uses the GPUs, a benchmark cannot be beside it."""
    found = subprocess.run(
        ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    for line in found.stdout.split():
        if line.isdecimal() and int(line) != os.getpid():
            print(f"left on a GPU, killed: {line}", flush=True)
            os.kill(int(line), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())

"""Fixtures: policies of a third party, groups of stand-in ranks, and daemons in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eplb_async.core.config import Settings, daemon_variables, load_settings
from eplb_async.core.daemon_settings import EAGER
from eplb_async.core.spec import MoESpec
from eplb_async.runtime.client import ControlClient
from eplb_async.shm.launch import group_lock_path
from tests.runtime.stand_in import StandInGroup, StandInOptions, group_info

__all__ = ["daemon_settings", "policies_path", "spec", "stand_in", "start_daemon", "start_ranks"]

ROOT = Path(__file__).resolve().parent.parent.parent

POLICIES = '''
import os, time
import msgspec
import numpy as np
from eplb_async.policies.base import Policy

class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    seconds: float = 0.0

def greedy(windows_TLE, slot_to_expert_LP, topology, options, state):
    """Redundant slots to the hottest experts, then the heaviest replica to the lightest rank with room."""
    time.sleep(options.seconds)
    result = np.empty_like(slot_to_expert_LP)
    R, S = topology.num_ranks, topology.slots_per_rank
    for layer, load_E in enumerate(windows_TLE.sum(axis=0)):
        count_E = np.ones(len(load_E), dtype=int)
        for _ in range(R * S - len(load_E)):
            count_E[np.argmax(np.where(count_E < topology.max_replicas, load_E / count_E, -1))] += 1
        ranks, used = [[] for _ in range(R)], np.zeros(R)
        for expert in sorted(np.repeat(np.arange(len(load_E)), count_E), key=lambda e: -load_E[e] / count_E[e]):
            rank = min((r for r in range(R) if len(ranks[r]) < S), key=lambda r: (expert in ranks[r], used[r]))
            ranks[rank].append(expert)
            used[rank] += load_E[expert] / count_E[expert]
        result[layer] = np.concatenate(ranks)
    return result, b"seen"

def raises(*arguments):
    raise RuntimeError("boom")

def invalid(windows_TLE, slot_to_expert_LP, topology, options, state):
    return np.zeros_like(slot_to_expert_LP), b""

def hangs(*arguments):
    while True:
        pass

def crashes(*arguments):
    os._exit(3)

def prints(windows_TLE, slot_to_expert_LP, topology, options, state):
    print("noise" * 1000, flush=True)
    os.write(1, b"native noise")
    return slot_to_expert_LP.copy(), b""

for _function in (greedy, raises, invalid, hangs, crashes, prints):
    globals()[_function.__name__ + "_policy"] = Policy(
        name="t-" + _function.__name__, function=_function, options_type=Options, summary="for tests"
    )
'''


@pytest.fixture
def policies_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with policies t-greedy, t-raises, t-invalid, t-hangs, t-crashes and t-prints, seen by children."""
    (tmp_path / "eplb_test_policies.py").write_text(POLICIES)
    info = tmp_path / "eplb_test_policies-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: eplb-test-policies\nVersion: 1.0\n")
    names = ("greedy", "raises", "invalid", "hangs", "crashes", "prints")
    points = "\n".join(f"t-{name} = eplb_test_policies:{name}_policy" for name in names)
    (info / "entry_points.txt").write_text(f"[eplb_async.policies]\n{points}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return tmp_path


@pytest.fixture
def spec() -> MoESpec:
    """4 ranks of 5 slots, 16 experts, 3 layers."""
    return MoESpec(num_layers=3, num_experts=16, num_ranks=4, num_redundant=4)


@pytest.fixture
def stand_in(group: str, spec: MoESpec) -> Iterator[Callable[..., StandInGroup]]:
    """Makes groups of ranks in this process, stepped by hand; they are removed afterwards."""
    made: list[StandInGroup] = []

    def make(**options: Any) -> StandInGroup:
        made.append(StandInGroup(group_info(group, spec), StandInOptions(**options)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def daemon_settings(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Short windows, a cheap policy and moves for any gain, for a daemon in the test's runtime directory; children read the same."""
    daemon = {
        **EAGER,
        "policy": "t-greedy",
        "window_steps": 10,
        "num_windows": 3,
        "interval_steps": 1_000_000,
        "poll_interval_s": 0.01,
        "discovery_interval_s": 0.02,
    }
    monkeypatch.setenv("EPLB_ASYNC_RUNTIME_DIR", str(runtime_dir))
    for name, value in daemon_variables(daemon).items():
        monkeypatch.setenv(name, value)
    return load_settings()


@pytest.fixture
def start_daemon(daemon_settings: Settings, policies_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `eplb-async serve` and waits until it is ready; killed afterwards if it still runs."""
    del policies_path
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "eplb_async", "serve", "--ready-fd", str(writer), *arguments]
        process = subprocess.Popen(command, pass_fds=(writer,), stderr=subprocess.PIPE, text=True)
        started.append(process)
        os.close(writer)
        try:
            os.read(reader, 1)
        finally:
            os.close(reader)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
    with ControlClient(daemon_settings) as client:
        client.stop_daemon()


@pytest.fixture
def start_ranks(group: str, spec: MoESpec, runtime_dir: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process that steps a group of stand-in ranks until its standard input is closed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**options: Any) -> subprocess.Popen[bytes]:
        shape = {name: getattr(spec, name) for name in ("num_layers", "num_experts", "num_ranks", "num_redundant")}
        name = options.pop("group", group)
        group_lock_path(runtime_dir, name).touch()
        arguments = json.dumps({"group": name, "spec": shape, **options})
        command = [sys.executable, "-m", "tests.runtime.stand_in", arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        # closing its input ends it in order
        process.communicate()

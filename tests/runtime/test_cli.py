"""The command line: help with examples, one line for a user's error, status 2 for wrong usage, JSON for programs."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eplb_async.core.config import Settings
from eplb_async.runtime.client import ControlClient

__all__: list[str] = []

COMMANDS = ["serve", "status", "history", "rebalance", "pause", "resume", "gc", "demo", "replay"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a fresh interpreter."""
    command = [sys.executable, "-m", "eplb_async", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    """Each command's help says what it does and shows how to call it."""
    done = run(command, "--help")
    assert done.returncode == 0
    assert "Example" in done.stdout
    assert f"eplb-async {command}" in done.stdout


def test_version() -> None:
    """--version prints the package's version."""
    from eplb_async import __version__

    assert run("--version").stdout == f"eplb-async {__version__}\n"


@pytest.mark.parametrize("arguments", [["no-such"], ["status", "--no-such"], ["serve", "--ready-fd", "x"], []])
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    """Unknown commands, options and values are usage errors."""
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status"], "no eplb-async daemon at"),
        (["rebalance", "--dry-run"], "no eplb-async daemon at"),
        (["status", "--config", "/no/such.toml"], "/no/such.toml: cannot be read"),
        (["serve", "--runtime-dir", "/proc/no"], "runtime_dir /proc/no cannot be used"),
    ],
)
def test_user_errors_are_one_line_and_status_1(runtime_dir: Path, arguments: list[str], message: str) -> None:
    """What a user can cause is one line on standard error that says what to do, never a traceback."""
    at = [] if "--runtime-dir" in arguments else ["--runtime-dir", str(runtime_dir)]
    done = run(*arguments, *at)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_is_quick() -> None:
    """Neither numpy nor asyncio nor the daemon is loaded before a command needs it."""
    probe = "import sys, eplb_async.runtime.cli; print(*{'numpy', 'asyncio', 'torch', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_gc_dry_run_is_json() -> None:
    """`gc --dry-run --json` lists what would go, and removes nothing."""
    found = json.loads(run("gc", "--dry-run", "--json").stdout)
    assert found["removed"] is False


def test_commands_speak_to_a_daemon(
    start_daemon: Callable[..., Any], start_ranks: Callable[..., Any], daemon_settings: Settings, group: str
) -> None:
    """Status, rebalance, history, pause and resume, for people and as JSON."""
    start_daemon()
    start_ranks()
    with ControlClient(daemon_settings) as client:
        end = time.monotonic() + 30
        while not any(found.windows for found in client.status().groups):
            assert time.monotonic() < end
            time.sleep(0.02)
    predicted = json.loads(run("rebalance", "--dry-run", "--json").stdout)
    assert predicted["outcome"] == "dry run"
    assert predicted["par_predicted"] < predicted["par_live"]
    done = run("rebalance", group)
    assert done.returncode == 0
    assert done.stdout.startswith("finished")
    (found,) = json.loads(run("status", "--json").stdout)["groups"]
    assert (found["group"], found["state"], len(found["ranks"])) == (group, "serving", 4)
    shown = run("status").stdout
    assert group in shown
    assert "finished" in shown
    assert [d["outcome"] for d in json.loads(run("history", "--json").stdout)[group]] == ["dry run", "finished"]
    assert "dry run" in run("history", group).stdout
    assert run("pause").stdout == f"paused: {group}\n"
    assert run("resume", group).stdout == f"resumed: {group}\n"
    wrong = run("rebalance", "no-such-group")
    assert wrong.returncode == 1
    assert "no-such-group" in wrong.stderr

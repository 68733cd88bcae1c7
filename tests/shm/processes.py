"""Real processes for tests: code in a fresh interpreter that can import the project, killed at the end whatever happens."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["kill", "line_of", "run_code", "running"]

ROOT = Path(__file__).resolve().parent.parent.parent


@contextlib.contextmanager
def running(code: str, *args: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that runs `code` with `sys.argv[1:] = args`, pipes for its input and output; killed at the end."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *args]
    with subprocess.Popen(
        command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[str]") -> str:
    """The next line that it prints; waits for it. Empty if it ended."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: "subprocess.Popen[str]", *, reap: bool = True) -> None:
    """SIGKILL, and wait until it is gone; with reap=False only until it is a zombie."""
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if reap:
        process.wait()


def run_code(code: str, *args: str) -> str:
    """What a process that runs `code` prints; it must succeed."""
    with running(code, *args) as process:
        output, _ = process.communicate()
        assert process.returncode == 0
        return output.strip()

"""Fuzzing of the control protocol: each input goes to the decoder, and every so many to the socket of a real daemon.

Whatever comes in, the decoder gives a request or the answer that refuses it, and the daemon answers each line with one
line, or closes the connection; it lives on, in the memory that it had. Requests to stop are not sent to the daemon.
"""

import json
import os
import select
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from eplb_async.core.config import DaemonSettings, Settings
from eplb_async.runtime import messages
from eplb_async.runtime.client import ControlClient
from eplb_async.runtime.messages import MAX_LINE, VERSION, AnswerLine, Call, decode_call, encode_line
from eplb_async.shm.launch import ensure_daemon, socket_path
from tests.faults.mutation import EDGES, Mutator, random_json, random_text

__all__ = ["ControlFuzz"]

CALLS: list[Call] = [
    messages.Status(version=VERSION, id=1),
    messages.Rebalance(version=VERSION, id=2, group="main", dry_run=True),
    messages.Pause(version=VERSION, group="main"),
    messages.Resume(version=VERSION, id=2**40),
    messages.History(version=VERSION, id=5, group="main", most=3),
    messages.Reload(version=VERSION, id=-1),
    messages.Stop(version=VERSION, id=7),
]
FIELDS = ("version", "id", "method", "group", "dry_run", "most", "result", "")
DEADLINE_S = 10.0
GROWTH_BYTES = 48 << 20
MOST_LINES = 200
"""Requests sent at once: thousands of `reload` take seconds, rightly."""


class ControlFuzz:
    """The target `control`; `close` ends its daemon."""

    name = "control"

    def __init__(self, every: int = 10) -> None:
        """`every`: one in so many inputs goes to the daemon as well; 0 starts none."""
        self._mutator = Mutator([encode_line(call) for call in CALLS])
        self._every, self._number = every, 0
        self._directory = Path(tempfile.mkdtemp(prefix="eplb-", dir="/tmp"))
        # a policy that needs no minute to compile
        daemon = DaemonSettings(policy="default", exit_when_idle_s=1e9, log_level="ERROR")
        self._settings = Settings(runtime_dir=str(self._directory), daemon=daemon)
        self._pid = self._memory = 0
        if every:
            ensure_daemon(self._settings, 60.0)
            self._path = str(socket_path(self._directory))
            with ControlClient(self._settings) as client:
                self._pid = client.status().pid

    def make(self, rng: Random) -> bytes:
        """A damaged request, or an object with some of the fields and any values."""
        if rng.random() < 0.75:
            return self._mutator.damaged(rng)
        fields: dict[str, object] = {"version": VERSION, "method": rng.choice(CALLS).__struct_config__.tag}
        for _ in range(rng.randrange(4)):
            fields[rng.choice(FIELDS)] = rng.choice((random_json(rng), random_text(rng), rng.choice(EDGES)))
        return json.dumps(fields).encode() + b"\n"

    def check(self, data: bytes) -> str:
        """What came of an input: `request`, or `refused`.

        Raises:
            AssertionError, or any other error: it was not handled as promised.
        """
        self._number += 1
        call, answer = decode_call(data)
        assert (call is None) != (answer is None)
        if call is not None:
            again, _ = decode_call(encode_line(call))
            assert again == call
        line = encode_line(answer or AnswerLine(version=VERSION, id=call.id if call else 0, ok=True))
        assert line.count(b"\n") == 1 and line.endswith(b"\n")
        assert json.loads(line)["ok"] is (call is not None)
        if self._every and self._number % self._every == 0:
            self._send(data)
        return "refused" if call is None else "request"

    def close(self) -> str:
        """End the daemon; a sentence about it.

        Raises:
            AssertionError: it died, or grew.
        """
        told = ""
        try:
            if self._every:
                now = self._status_memory()
                grown = now - self._memory if self._memory else 0
                told = f"daemon alive after {self._number // self._every} connections, {grown / 2**20:+.1f} MiB since the first 500"
                assert grown < GROWTH_BYTES, told
        finally:
            if self._pid:
                os.kill(self._pid, signal.SIGKILL)
            shutil.rmtree(self._directory, ignore_errors=True)
        return told

    def _status_memory(self) -> int:
        with ControlClient(self._settings, deadline_s=DEADLINE_S) as client:
            status = client.status()
        assert status.pid == self._pid
        return status.memory_bytes

    def _send(self, data: bytes) -> None:
        lines = data.split(b"\n")[:MOST_LINES]
        data = b"\n".join(lines)
        if any(isinstance(decode_call(line)[0], messages.Stop) for line in lines):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(DEADLINE_S)
            connection.connect(self._path)
            answers = _talk(connection, data if self._number % 3 else data + b"\n")
        assert not answers or answers.endswith(b"\n")
        found: list[dict[str, Any]] = [json.loads(answer) for answer in answers.splitlines()]
        assert len(found) <= len(lines) and all(answer["version"] == VERSION for answer in found)
        if self._number // self._every == 500:
            self._memory = self._status_memory()


def _talk(connection: socket.socket, data: bytes) -> bytes:
    """Send all, reading meanwhile, and hang up; what came back until the other end hung up too."""
    found, rest, end = bytearray(), memoryview(data), time.monotonic() + DEADLINE_S
    sending = True
    while True:
        readable, writable, _ = select.select([connection], [connection] if sending else [], [], 1.0)
        assert time.monotonic() < end, "the daemon neither answered nor hung up"
        if writable:
            try:
                rest = rest[connection.send(rest[: 1 << 16]) :]
                if not rest:
                    connection.shutdown(socket.SHUT_WR)
            except ConnectionError:
                assert len(data) > MAX_LINE
                rest = rest[:0]
            sending = bool(rest)
        if readable:
            part = connection.recv(1 << 16)
            if not part:
                return bytes(found)
            found += part

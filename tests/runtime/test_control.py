"""The control socket answers what it understands, refuses the rest in one clear line, and lets nobody else in."""

import asyncio
import contextlib
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from eplb_async.core.config import Settings
from eplb_async.core.errors import ControlError, DaemonUnavailable
from eplb_async.runtime import control
from eplb_async.runtime.client import ControlClient
from eplb_async.runtime.control import ControlServer
from eplb_async.runtime.messages import MAX_LINE, VERSION, Call, Pause, Status

__all__: list[str] = []


async def answer(call: Call) -> Any:
    """Echoes a group, refuses the group 'bad'."""
    if isinstance(call, Pause):
        if call.group == "bad":
            raise ControlError("no such group: bad")
        return [call.group]
    return {"method": type(call).__name__}


@contextlib.asynccontextmanager
async def serving(runtime_dir: Path) -> AsyncIterator[Path]:
    """A control server for the length of a block; its socket's path."""
    path, ready = runtime_dir / "daemon.sock", asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        server = tasks.create_task(ControlServer(path, answer).run(tasks, ready))
        await ready.wait()
        try:
            yield path
        finally:
            server.cancel()


async def talk(path: Path, data: bytes) -> list[dict[str, Any]]:
    """Send bytes, hang up, and return every line that came back."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(data)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        writer.write_eof()
    lines = (await asyncio.wait_for(reader.read(), 10)).splitlines()
    writer.close()
    return [json.loads(line) for line in lines]


async def test_requests_are_answered_in_order(runtime_dir: Path) -> None:
    """Several requests on one connection are answered one after the other, with their ids."""
    async with serving(runtime_dir) as path:
        lines = b"".join(b'{"version":1,"id":%d,"method":"pause","group":"g%d"}\n' % (i, i) for i in range(3))
        answers = await talk(path, lines)
    assert answers == [{"version": 1, "id": i, "ok": True, "result": [f"g{i}"]} for i in range(3)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\x80garbage\n", "not a request"),
        (b"[1, 2]\n", "not a request"),
        (b'{"version":1,"id":7,"method":"pause","group":"\xff"}\n', "not a request"),
        (b'{"version":1,"id":7,"method":"st\xc1tus"}\n', "not a request"),
        (b'{"version":1,"id":7,"method":"destroy"}\n', "destroy"),
        (b'{"version":1,"id":7,"method":"status","colour":"red"}\n', "unknown field `colour`"),
        (b'{"version":2,"id":7,"method":"status"}\n', "version 2 is not spoken here; use version 1"),
        (b'{"version":1,"id":7}\n', "method"),
        (b"[" * 5000 + b"\n", "not a request"),
        (b"x" * (MAX_LINE + 10) + b"\n", f"at most {MAX_LINE} bytes"),
        (b"x" * (4 * MAX_LINE), f"at most {MAX_LINE} bytes"),
    ],
)
async def test_what_is_not_a_request_gets_one_error_and_is_closed(runtime_dir: Path, line: bytes, message: str) -> None:
    """Garbage, unknown methods, fields and versions, and oversized lines: one JSON error, then the end."""
    async with serving(runtime_dir) as path:
        answers = await talk(path, line + b'{"version":1,"method":"status"}\n')
    assert len(answers) == 1
    assert answers[0]["ok"] is False
    assert answers[0]["error"]["kind"] == "ControlError"
    assert message in answers[0]["error"]["message"]


async def test_refused_request_leaves_the_connection_open(runtime_dir: Path) -> None:
    """An EplbError of a request is its answer; the next request is served."""
    async with serving(runtime_dir) as path:
        lines = b'{"version":1,"id":1,"method":"pause","group":"bad"}\n{"version":1,"id":2,"method":"status"}\n'
        first, second = await talk(path, lines)
    assert first["error"] == {"kind": "ControlError", "message": "no such group: bad"}
    assert second["ok"]


async def test_other_users_are_refused(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer of another user gets an error whatever it sends; root is let in."""
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    async with serving(runtime_dir) as path:
        for uid, welcome in ((4321, False), (0, True), (1234, True)):
            monkeypatch.setattr(control, "peer_uid", lambda connection, uid=uid: uid)
            (found,) = await talk(path, b'{"version":1,"method":"status"}\n')
            assert found["ok"] is welcome
            assert welcome or "user 4321 may not control it" in found["error"]["message"]


def test_peer_uid_is_the_kernels() -> None:
    """The credentials are those of the process at the other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert control.peer_uid(ours) == os.getuid()


async def test_too_many_connections_are_refused(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit a connection is told so; a place that gets free can be used."""
    monkeypatch.setattr(control, "MAX_CONNECTIONS", 2)
    async with serving(runtime_dir) as path:
        first = await asyncio.open_unix_connection(path)
        second = await asyncio.open_unix_connection(path)
        (found,) = await talk(path, b'{"version":1,"method":"status"}\n')
        assert "2 connections are open already" in found["error"]["message"]
        for _, writer in (first, second):
            writer.close()
            await writer.wait_closed()
        found = {"ok": False}
        while not found["ok"]:
            (found,) = await talk(path, b'{"version":1,"method":"status"}\n')


async def test_silent_connection_is_closed(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that sends no whole request within its time is closed."""
    monkeypatch.setattr(control, "IDLE_S", 0.05)
    async with serving(runtime_dir) as path:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b'{"version":')
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_socket_replaces_a_stale_one_and_is_private(runtime_dir: Path) -> None:
    """A file that a killed daemon left is replaced; the mode is 0600; nothing is left at the end."""
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(runtime_dir / "daemon.sock"))
    stale.close()
    async with serving(runtime_dir) as path:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert (await talk(path, b'{"version":1,"method":"status"}\n'))[0]["ok"]
    assert os.listdir(runtime_dir) == []


async def test_clients_at_once(runtime_dir: Path) -> None:
    """Ten blocking clients at once get ten answers."""
    settings = Settings(runtime_dir=str(runtime_dir))

    def ask() -> Any:
        with ControlClient(settings) as client:
            return [client.call(Status(version=VERSION)) for _ in range(3)]

    async with serving(runtime_dir):
        answers = await asyncio.gather(*(asyncio.to_thread(ask) for _ in range(10)))
    assert answers == [[{"method": "Status"}] * 3] * 10


def test_client_without_a_daemon_says_what_to_do(runtime_dir: Path) -> None:
    """No socket, or one that nobody serves: DaemonUnavailable that names the command to start one."""
    settings = Settings(runtime_dir=str(runtime_dir))
    with ControlClient(settings) as client, pytest.raises(DaemonUnavailable, match="eplb-async serve"):
        client.status()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(runtime_dir / "daemon.sock"))
    stale.close()
    with ControlClient(settings) as client, pytest.raises(DaemonUnavailable, match="eplb-async serve"):
        client.status()


async def test_requests_that_come_at_once_do_not_hold_the_loop(runtime_dir: Path) -> None:
    """Between two requests of one connection everything else in the daemon has its turn."""
    turns, flood = 0, 500

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with serving(runtime_dir) as path:
        counting = asyncio.create_task(count_turns())
        answers = await talk(path, b'{"version":1,"method":"status"}\n' * flood)
        counting.cancel()
    assert len(answers) == flood
    assert turns >= flood

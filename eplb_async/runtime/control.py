"""The control socket: who may connect, how much they may send, and how long they may think.

A connection carries one request after the other, answered in order. What breaks the rules gets one clear answer and is
closed. The socket is bound under a name of its own and moved into place with its mode set, so no moment exists in which
others could connect, and a file that a killed daemon left is replaced; the daemon's lock proves that nobody serves it.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from eplb_async.core.errors import ControlError, EplbError
from eplb_async.runtime.messages import MAX_LINE, VERSION, AnswerLine, Call, decode_call, encode_line, refusal

__all__ = ["MAX_CONNECTIONS", "ControlServer", "peer_uid"]

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
IDLE_S = 300.0
"""A connection that sends no whole request for so long is closed."""
LINGER_S = 1.0
"""Unread input is swallowed for so long before a close: closing over it would take our answer from the peer."""

Handler = Callable[[Call], Awaitable[Any]]


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end, as the kernel saw it when the connection was made."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


class ControlServer:
    """Serves one socket. `handle` gets each request and returns a result that JSON can hold, or raises EplbError."""

    def __init__(self, path: Path, handle: Handler) -> None:
        self._path, self._handle = path, handle
        self._connections: set[asyncio.Task[None]] = set()
        self._inode = 0

    async def run(self, tasks: asyncio.TaskGroup, ready: asyncio.Event) -> None:
        """Serve until cancelled; sets `ready` once connections are taken. Leaves no socket file.

        Connections are tasks of the daemon's TaskGroup; ending this one cancels them.
        """

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = tasks.create_task(self._serve(reader, writer), name="connection")
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

        server = await asyncio.start_unix_server(connected, sock=self._bind(), limit=MAX_LINE)
        ready.set()
        try:
            await asyncio.Event().wait()
        finally:
            server.close()
            for task in self._connections:
                task.cancel()
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == self._inode:
                    self._path.unlink()

    def _bind(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        try:
            listener.bind(str(temporary))
            temporary.chmod(0o600)
            self._inode = temporary.stat().st_ino
            temporary.rename(self._path)
        except OSError as error:
            listener.close()
            raise EplbError(
                f"cannot serve the control socket {self._path}: {error}; set EPLB_ASYNC_RUNTIME_DIR"
            ) from error
        return listener

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if reason := self._unwelcome(writer):
                await self._send(writer, refusal(0, ControlError(reason)))
                await _swallow(reader)
            else:
                await self._talk(reader, writer)
        except (ConnectionError, TimeoutError) as error:
            logger.debug("a control connection ended: %r", error)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    def _unwelcome(self, writer: asyncio.StreamWriter) -> str:
        uid = peer_uid(writer.get_extra_info("socket"))
        if uid not in (os.geteuid(), 0):
            logger.warning("user %d was refused on the control socket", uid)
            return f"this daemon belongs to user {os.geteuid()}; user {uid} may not control it"
        if len(self._connections) > MAX_CONNECTIONS:
            return f"{MAX_CONNECTIONS} connections are open already; close one or try again"
        return ""

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                async with asyncio.timeout(IDLE_S):
                    line = await reader.readline()
            except ValueError:
                # StreamReader's word for a line beyond its limit
                await self._send(writer, refusal(0, ControlError(f"a request has at most {MAX_LINE} bytes")))
                await _swallow(reader)
                return
            if not line.endswith(b"\n"):
                return
            call, answer = decode_call(line)
            if call is not None:
                answer = await self._answer(call)
            if answer is not None:
                await self._send(writer, answer)
            if call is None:
                await _swallow(reader)
                return
            # requests that have all come already would hold the event loop until the last is answered
            await asyncio.sleep(0)

    async def _answer(self, call: Call) -> AnswerLine:
        try:
            return AnswerLine(version=VERSION, id=call.id, ok=True, result=await self._handle(call))
        except EplbError as error:
            return refusal(call.id, error)

    async def _send(self, writer: asyncio.StreamWriter, answer: AnswerLine) -> None:
        writer.write(encode_line(answer))
        async with asyncio.timeout(IDLE_S):
            await writer.drain()


async def _swallow(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while await reader.read(MAX_LINE):
                pass

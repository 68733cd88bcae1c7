"""The blocking client of the control socket, for the command line, the demo and tests. No asyncio, quick to import."""

import socket
import time
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from eplb_async.core.config import Settings
from eplb_async.core.errors import ControlError, DaemonUnavailable
from eplb_async.observability.history import Decision
from eplb_async.runtime import messages
from eplb_async.runtime.messages import MAX_ANSWER, VERSION, AnswerLine, Call, DaemonStatus, encode_line
from eplb_async.shm.launch import daemon_running, socket_path

__all__ = ["ControlClient"]

T = TypeVar("T")
POLL_S = 0.02

_decoder = msgspec.json.Decoder(AnswerLine)


class ControlClient:
    """One connection to the daemon of a runtime directory, made at the first call. Not thread-safe.

    Every call raises
        ControlError: the daemon refused it, or its answer is no answer; the message is the daemon's.
        DaemonUnavailable: none listens, it went away, or it did not answer in time. A later call connects anew.

    Example:
        with ControlClient(load_settings()) as client:
            print(client.status().groups)
    """

    def __init__(self, settings: Settings, deadline_s: float = 10.0) -> None:
        """`deadline_s`: for connecting and for each call that does not name its own."""
        self._settings, self._path, self._deadline_s = settings, socket_path(settings.directory), deadline_s
        self._socket: socket.socket | None = None
        self._rest = b""

    def status(self) -> DaemonStatus:
        """The daemon and its groups."""
        return self._convert(self.call(messages.Status(version=VERSION)), DaemonStatus)

    def rebalance(self, group: str = "", *, dry_run: bool = False, deadline_s: float = 300.0) -> Decision:
        """Decide now and wait for what comes of it; `group` may be "" where one group runs."""
        call = messages.Rebalance(version=VERSION, group=group, dry_run=dry_run)
        return self._convert(self.call(call, deadline_s), Decision)

    def history(self, group: str = "", most: int = 32) -> dict[str, list[Decision]]:
        """The newest decisions of one group or of all, oldest first."""
        answer = self.call(messages.History(version=VERSION, group=group, most=most))
        return self._convert(answer, dict[str, list[Decision]])

    def pause(self, group: str = "") -> list[str]:
        """Stop decisions of the daemon's own, for one group or all; the groups' names."""
        return self._convert(self.call(messages.Pause(version=VERSION, group=group)), list[str])

    def resume(self, group: str = "") -> list[str]:
        """Undo `pause`."""
        return self._convert(self.call(messages.Resume(version=VERSION, group=group)), list[str])

    def reload(self) -> None:
        """Have the daemon read its settings again."""
        self.call(messages.Reload(version=VERSION))

    def stop_daemon(self, deadline_s: float = 10.0) -> None:
        """Stop the daemon in order and wait until its lock is free; nothing if none runs.

        Raises:
            DaemonUnavailable: it still runs after the deadline.
        """
        end = time.monotonic() + deadline_s
        if not daemon_running(self._settings):
            return
        self.call(messages.Stop(version=VERSION))
        self.close()
        while daemon_running(self._settings):
            if time.monotonic() > end:
                raise DaemonUnavailable(str(self._path), f"it did not stop within {deadline_s:g} s")
            time.sleep(POLL_S)

    def call(self, call: Call, deadline_s: float | None = None) -> Any:
        """Send a request and return its result as JSON gives it."""
        limit = self._deadline_s if deadline_s is None else deadline_s
        try:
            connection = self._connection(limit)
            connection.sendall(encode_line(call))
            line = self._read_line(connection, time.monotonic() + limit)
        except TimeoutError as error:
            self.close()
            raise DaemonUnavailable(str(self._path), f"it did not answer within {limit:g} s") from error
        except OSError as error:
            self.close()
            raise DaemonUnavailable(str(self._path), f"the connection broke ({error})") from error
        try:
            answer = _decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ControlError(f"the daemon's answer is not one: {error}") from error
        if not answer.ok:
            raise ControlError(answer.error.message if answer.error else "the daemon refused without a reason")
        return answer.result

    def close(self) -> None:
        """Hang up. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket, self._rest = None, b""

    def __enter__(self) -> "ControlClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connection(self, limit: float) -> socket.socket:
        if self._socket is not None and self._hung_up(self._socket):
            self.close()
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(limit)
                connection.connect(str(self._path))
            except (FileNotFoundError, ConnectionRefusedError) as error:
                connection.close()
                raise DaemonUnavailable(str(self._path)) from error
            except OSError:
                connection.close()
                raise
            self._socket = connection
        self._socket.settimeout(limit)
        return self._socket

    @staticmethod
    def _hung_up(connection: socket.socket) -> bool:
        """True if the daemon closed an idle connection, as it does after a while."""
        connection.setblocking(False)
        try:
            return connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def _read_line(self, connection: socket.socket, end: float) -> bytes:
        parts, size = [self._rest], len(self._rest)
        while b"\n" not in parts[-1]:
            if size > MAX_ANSWER:
                raise ControlError(f"the daemon's answer has more than {MAX_ANSWER} bytes")
            connection.settimeout(max(0.001, end - time.monotonic()))
            part = connection.recv(1 << 16)
            if not part:
                raise ConnectionResetError("the daemon closed it")
            parts.append(part)
            size += len(part)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    @staticmethod
    def _convert(answer: Any, kind: type[T]) -> T:
        try:
            return msgspec.convert(answer, kind)
        except msgspec.ValidationError as error:
            raise ControlError(
                f"the daemon's answer is not what was asked for: {error}; is it of another release?"
            ) from error

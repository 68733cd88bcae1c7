"""The daemon of a node: one event loop, one TaskGroup, one lock for life.

    TaskGroup
    |-- pool         policy workers
    |-- loop lag     the watchdog's measure
    |-- control      the socket; one task per connection
    |-- discovery    finds groups in shared memory; one session task per group; one plan task per decision
    `-- signals      SIGTERM, SIGINT: stop in order; SIGHUP: read the settings again

A task that dies of an error stops the daemon with that error: loudly, and without harm, since ranks need no daemon. An
active plan is left to the ranks when the daemon stops; the next daemon aborts it if they have not finished it by then.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from eplb_async.core.clock import SystemClock
from eplb_async.core.config import Settings, load_settings, policy_cache
from eplb_async.core.errors import ControlError, DaemonError, DaemonRunning, EplbError, SegmentError
from eplb_async.observability.history import DecisionHistory
from eplb_async.runtime import messages, resources, systemd
from eplb_async.runtime.control import ControlServer
from eplb_async.runtime.messages import Call, DaemonStatus, GroupStatus
from eplb_async.runtime.pool import PolicyPool
from eplb_async.runtime.session import GroupSession, SessionContext, joining_status
from eplb_async.runtime.watchdog import LoopLag
from eplb_async.shm.launch import daemon_lock_path, group_lock_path, socket_path, start_lock_path
from eplb_async.shm.segment import list_segments, prepare_runtime_dir
from eplb_async.shm.words import AgreementWords, MemberState

__all__ = ["Daemon", "serve"]

logger = logging.getLogger(__name__)

LOCK_DEADLINE_S = 0.5
"""Somebody who only looks whether a daemon runs may hold the lock for an instant."""
GROUPS_REMEMBERED = 64
"""Groups whose history and last status are kept after they ended."""


async def serve(
    settings: Settings, *, ready_fd: int | None = None, reload: Callable[[], Settings] = load_settings
) -> None:
    """Run a daemon until SIGTERM, SIGINT, a `stop` request, or its idle time.

    Args:
        settings: of this node.
        ready_fd: a descriptor that gets one byte once the control socket answers, and is closed.
        reload: reads the settings again, for SIGHUP and the `reload` request.

    Raises:
        DaemonRunning: one serves this runtime directory already.
        EplbError: the runtime directory or the socket cannot be used.
        ExceptionGroup: a task of the daemon died; our bug.
    """
    await Daemon(settings, reload).run(ready_fd)


class Daemon:
    """All state of a running daemon. `run` once; everything happens in its event loop."""

    def __init__(self, settings: Settings, reload: Callable[[], Settings]) -> None:
        self._settings, self._reload = settings, reload
        self._directory = prepare_runtime_dir(settings.directory)
        self._clock = SystemClock()
        self._pool = PolicyPool(settings.daemon.pool_workers, settings.daemon.policy, policy_cache(self._directory))
        self._lag = LoopLag()
        self._stopping = asyncio.Event()
        self._sessions: dict[str, GroupSession] = {}
        self._session_tasks: set[asyncio.Task[None]] = set()
        self._joining: dict[str, GroupStatus] = {}
        self._ended: OrderedDict[str, GroupStatus] = OrderedDict()
        self._histories: OrderedDict[str, DecisionHistory] = OrderedDict()
        self._numbers: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        self._paused: set[str] = set()
        self._usage = resources.Usage(self._clock)

    async def run(self, ready_fd: int | None = None) -> None:
        """See `serve`."""
        refused = DaemonRunning(str(self._directory))
        lock = _locked(daemon_lock_path(self._directory), LOCK_DEADLINE_S, refused)
        async with contextlib.AsyncExitStack() as until_unlocked, lock:
            logger.info("settings: %s", msgspec.json.encode(self._settings).decode())
            control, ready = ControlServer(socket_path(self._directory), self._handle), asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                services = [
                    tasks.create_task(self._pool.run(), name="pool"),
                    tasks.create_task(self._lag.run(), name="loop lag"),
                    tasks.create_task(control.run(tasks, ready), name="control"),
                    tasks.create_task(self._discover(tasks, until_unlocked), name="discovery"),
                ]
                tasks.create_task(self._stop_in_order(services), name="signals")
                await ready.wait()
                _tell_ready(ready_fd)

    async def _stop_in_order(self, services: list[asyncio.Task[None]]) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._take_settings)
        try:
            await self._stopping.wait()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)
        logger.info("stopping")
        systemd.notify("STOPPING=1")
        # discovery first, or it would serve the groups anew; then sessions, then what they use
        *others, discovery = services
        for tasks in ([discovery], list(self._session_tasks), others):
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def _discover(self, tasks: asyncio.TaskGroup, until_unlocked: contextlib.AsyncExitStack) -> None:
        idle_since = self._clock.monotonic_s()
        while True:
            self._look_for_groups(tasks)
            now, limit = self._clock.monotonic_s(), self._settings.daemon.exit_when_idle_s
            if self._sessions or self._joining:
                idle_since = now
            elif limit and now - idle_since >= limit and self._may_leave(until_unlocked):
                logger.info("no group for %g s", limit)
                self._stopping.set()
                return
            await asyncio.sleep(self._settings.daemon.discovery_interval_s)

    def _may_leave(self, until_unlocked: contextlib.AsyncExitStack) -> bool:
        """Take start.lock until our own lock is free, if nobody is starting a daemon and no group has come; see launch.py."""
        with contextlib.ExitStack() as held:
            file = held.enter_context(start_lock_path(self._directory).open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            groups = [group for _, group, kind in list_segments() if kind == "group"]
            if any(self._is_ours(group) and self._is_living(group) for group in groups):
                return False
            until_unlocked.push(held.pop_all())
            return True

    def _is_ours(self, group: str) -> bool:
        """True if its ranks use this runtime directory: shared memory belongs to the user, a daemon to a directory."""
        return group_lock_path(self._directory, group).exists()

    def _is_living(self, group: str) -> bool:
        try:
            words = AgreementWords.open(group)
        except (SegmentError, msgspec.DecodeError):
            return False
        living = not words.ended and any(words.member(rank).alive for rank in range(words.num_ranks))
        words.close()
        return living

    def _look_for_groups(self, tasks: asyncio.TaskGroup) -> None:
        self._joining.clear()
        for name, group, kind in list_segments():
            if kind != "group" or group in self._sessions or not self._is_ours(group):
                continue
            try:
                self._look_at(group, tasks)
                self._refused.pop(name, None)
            except (SegmentError, DaemonError, msgspec.DecodeError) as error:
                # it may be half made: look again, say it once
                if self._refused.get(name) != str(error):
                    logger.warning("group %s: %s", group, error)
                    self._refused[name] = str(error)

    def _look_at(self, group: str, tasks: asyncio.TaskGroup) -> None:
        words = AgreementWords.open(group)
        session = None
        try:
            members = [words.member(rank) for rank in words.info.ranks]
            if words.ended or not any(member.alive for member in members):
                return
            if words.info.num_nodes > 1:
                nodes = words.info.num_nodes
                raise DaemonError(
                    f"it is a group's part on one of {nodes} nodes; daemons serve groups of one node so far"
                )
            if any(member.state is not MemberState.READY for member in members):
                self._joining[group] = joining_status(words)
                return
            session = GroupSession(words, self._context(group, tasks))
            session.decider.paused = group in self._paused
        finally:
            if session is None:
                words.close()
        self._sessions[group] = session
        self._ended.pop(group, None)
        task = tasks.create_task(self._serve_group(session), name="session")
        self._session_tasks.add(task)
        task.add_done_callback(self._session_tasks.discard)

    def _context(self, group: str, tasks: asyncio.TaskGroup) -> SessionContext:
        history = self._histories.setdefault(group, DecisionHistory(self._settings.daemon.history_length))
        self._histories.move_to_end(group)
        while len(self._histories) > GROUPS_REMEMBERED:
            oldest = next(iter(self._histories))
            del self._histories[oldest]
        return SessionContext(
            settings=self._settings.daemon,
            hook=self._settings.hook,
            pool=self._pool,
            history=history,
            clock=self._clock,
            tasks=tasks,
            first_number=self._numbers.get(group, 1),
        )

    async def _serve_group(self, session: GroupSession) -> None:
        try:
            await session.run()
        finally:
            self._numbers[session.group] = session.decider.next_number
            self._ended[session.group] = session.status()
            while len(self._ended) > GROUPS_REMEMBERED:
                self._ended.popitem(last=False)
            del self._sessions[session.group]
            await session.close("the daemon stopped")

    def _take_settings(self) -> None:
        """SIGHUP: new settings, or the old ones if the new are wrong."""
        with contextlib.suppress(EplbError):
            self._read_settings()

    def _read_settings(self) -> None:
        systemd.notify("RELOADING=1")
        try:
            settings = self._reload()
        except EplbError as error:
            logger.warning("settings were not read again, the old ones stay: %s", error)
            raise
        finally:
            systemd.notify("READY=1")
        if settings.directory != self._directory:
            logger.warning("runtime_dir changed; it takes effect with the next start")
        self._settings = settings
        self._pool.warm_up_next(settings.daemon.policy)
        logging.getLogger("eplb_async").setLevel(settings.daemon.log_level)
        for session in self._sessions.values():
            session.configure(settings.daemon)
        for history in self._histories.values():
            history.resize(settings.daemon.history_length)
        logger.info("settings: %s", msgspec.json.encode(settings).decode())

    async def _handle(self, call: Call) -> Any:
        if isinstance(call, messages.Rebalance):
            return await self._session(call.group).decider.rebalance(call.dry_run)
        handlers: dict[type[Any], Callable[[Any], Any]] = {
            messages.Status: lambda _: self._status(),
            messages.Pause: lambda call: self._pause(call.group, paused=True),
            messages.Resume: lambda call: self._pause(call.group, paused=False),
            messages.History: lambda call: self._history(call.group, call.most),
            messages.Reload: lambda _: self._read_settings(),
            messages.Stop: lambda _: self._stopping.set(),
        }
        return handlers[type(call)](call)

    def _session(self, group: str) -> GroupSession:
        if group in self._sessions:
            return self._sessions[group]
        known = ", ".join(sorted(self._sessions)) or "none"
        if not group and len(self._sessions) == 1:
            return next(iter(self._sessions.values()))
        what = f"group {group!r} is not served" if group else "name a group"
        raise ControlError(f"{what}; groups with all their ranks: {known}")

    def _pause(self, group: str, *, paused: bool) -> list[str]:
        names = [self._session(group).group] if group else sorted(self._sessions)
        for name in names:
            self._sessions[name].decider.paused = paused
            (self._paused.add if paused else self._paused.discard)(name)
        return names

    def _history(self, group: str, most: int) -> dict[str, Any]:
        if group and group not in self._histories:
            raise ControlError(f"group {group!r} is not known; known: {', '.join(sorted(self._histories)) or 'none'}")
        return {name: kept.newest(most) for name, kept in sorted(self._histories.items()) if group in ("", name)}

    def _status(self) -> DaemonStatus:
        groups = {
            **self._ended,
            **self._joining,
            **{name: session.status() for name, session in self._sessions.items()},
        }
        usage = self._usage.now()
        return DaemonStatus(
            pid=os.getpid(),
            release=resources.release(),
            uptime_s=usage.uptime_s,
            cpu_s=usage.cpu_s,
            cpu_share=usage.cpu_s / usage.uptime_s if usage.uptime_s else 0.0,
            memory_bytes=usage.memory_bytes,
            loop_lag_s=self._lag.newest_s,
            loop_lag_worst_s=self._lag.worst_s,
            policy=self._settings.daemon.policy,
            pool=msgspec.to_builtins(self._pool.statistics()),
            groups=tuple(status for _, status in sorted(groups.items())),
        )


def _tell_ready(ready_fd: int | None) -> None:
    logger.info("ready")
    systemd.notify("READY=1")
    if ready_fd is not None:
        # whoever waited may have given up
        with contextlib.suppress(OSError):
            os.write(ready_fd, b"1")
        os.close(ready_fd)


@contextlib.asynccontextmanager
async def _locked(path: Path, deadline_s: float, refused: EplbError) -> AsyncIterator[None]:
    """Hold an exclusive file lock; `refused` is raised if somebody else keeps it."""
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if loop.time() > end:
                    raise refused from None
            await asyncio.sleep(0.01)
        yield

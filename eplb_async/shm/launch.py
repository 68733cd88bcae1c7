"""One daemon per runtime directory: who runs, and how a rank starts one when none does.

    daemon.lock   held (flock) by the daemon for life; the kernel drops it however the daemon ends
    start.lock    held while somebody starts a daemon, and by a daemon that is about to stop because it is idle
    daemon.sock   the control socket
    daemon.log    standard error of daemons that ranks started
    GROUP.lock    held by ranks while they attach; a daemon serves the groups that have one in its directory

Ranks create their group segment first and ask for a daemon then. A daemon stops as idle only while it holds start.lock
and sees no living group, and keeps that lock until daemon.lock is free. So either it sees the group, or the rank sees
that no daemon runs.
"""

import fcntl
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import eplb_async
from eplb_async.core.config import Settings, child_environment, settings_environment
from eplb_async.core.errors import DaemonUnavailable
from eplb_async.shm.segment import file_lock, prepare_runtime_dir

__all__ = [
    "daemon_lock_path",
    "daemon_running",
    "ensure_daemon",
    "group_lock_path",
    "log_path",
    "socket_path",
    "start_lock_path",
]

IDLE_S = 60
"""A daemon that a rank started stops after so long without a group."""
LOG_LIMIT = 16 << 20
"""Bytes of daemon.log beyond which it is started anew."""
# sh ends at once, so the daemon belongs to init and no rank has a zombie; the new session keeps the rank's signals away
_DETACH = '"$@" &'


def daemon_lock_path(directory: Path) -> Path:
    """The lock that a running daemon holds."""
    return directory / "daemon.lock"


def start_lock_path(directory: Path) -> Path:
    """The lock of those who start a daemon."""
    return directory / "start.lock"


def group_lock_path(directory: Path, group: str) -> Path:
    """The lock of the ranks of a group; it exists from before their segments do."""
    return directory / f"{group}.lock"


def socket_path(directory: Path) -> Path:
    """The control socket."""
    return directory / "daemon.sock"


def log_path(directory: Path) -> Path:
    """Where daemons that ranks started log."""
    return directory / "daemon.log"


def daemon_running(settings: Settings) -> bool:
    """True if a daemon holds its lock (it may not be ready yet)."""
    try:
        with daemon_lock_path(settings.directory).open("rb") as file:
            # shared: two who look at once do not see each other; a daemon that starts meanwhile tries again
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def ensure_daemon(settings: Settings, deadline_s: float = 20.0) -> bool:
    """Start a daemon for this runtime directory if none runs, and wait until it is ready. Blocks.

    Any number of processes may call this at once: one starts the daemon, the others wait for it. The daemon gets these
    settings and stops by itself when it has had no group for a minute. Call it after the group segment exists.

    Returns:
        True if this call started it.

    Raises:
        DaemonUnavailable: it did not become ready in time; names its log.
        EplbError: the runtime directory cannot be used.
    """
    directory, end = prepare_runtime_dir(settings.directory), time.monotonic() + deadline_s
    if daemon_running(settings):
        return False
    try:
        with file_lock(start_lock_path(directory), deadline_s):
            if daemon_running(settings):
                return False
            _start(settings, end)
    except TimeoutError as error:
        raise DaemonUnavailable(str(directory), f"it did not start within {deadline_s:g} s ({error})") from error
    return True


def _start(settings: Settings, end: float) -> None:
    directory = settings.directory
    log = log_path(directory)
    reader, writer = os.pipe()
    try:
        command = [sys.executable, "-m", "eplb_async", "serve", "--ready-fd", str(writer)]
        if not settings.daemon.exit_when_idle_s:
            command += ["--exit-when-idle", str(IDLE_S)]
        environment = child_environment(settings_environment(settings), str(Path(eplb_async.__path__[0]).parent))
        too_long = log.exists() and log.stat().st_size > LOG_LIMIT
        with log.open("wb" if too_long else "ab") as errors:
            log.chmod(0o600)
            subprocess.run(
                ["/bin/sh", "-c", _DETACH, "sh", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                cwd="/",
                pass_fds=(writer,),
                start_new_session=True,
                check=True,
            )
        os.close(writer)
        writer = -1
        _wait_ready(reader, end, settings)
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


def _wait_ready(reader: int, end: float, settings: Settings) -> None:
    """Wait for the byte that a ready daemon writes; the end of the pipe is a daemon that ended."""
    where, log = str(settings.directory), log_path(settings.directory)
    readable, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
    if not readable:
        raise DaemonUnavailable(where, f"the one just started is not ready in time; see {log}")
    # somebody may have started one by hand in the same moment: ours then ends, and theirs serves
    if not os.read(reader, 1) and not daemon_running(settings):
        raise DaemonUnavailable(where, f"the one just started has ended; see {log}")

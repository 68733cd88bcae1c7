"""What may happen in a chaos run. Each event leaves a group that goes on: all ranks serving, one daemon of this version."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from eplb_async.core.config import load_settings
from eplb_async.core.errors import EplbError
from eplb_async.runtime.client import ControlClient
from eplb_async.shm.launch import group_lock_path
from eplb_async.shm.ring import LoadRing
from tests.faults.chaos_group import RANKS, ChaosGroup
from tests.faults.chaos_rank import Slow
from tests.faults.harness import wait_for

__all__ = ["EVENTS", "Event"]

Event = Callable[[ChaosGroup, random.Random], str]
"""Makes it happen; a few words on what it was."""

BUSY = "while True: pass"


def kill_daemon(group: ChaosGroup, rng: random.Random) -> str:
    """At any moment; a new one follows, at once or some steps later."""
    time.sleep(rng.uniform(0, 0.4))
    group.kill_daemon()
    steps = rng.choice((0, 5, 40))
    group.wait_steps(steps)
    group.start_daemon()
    return f"{steps} steps without"


def stop_daemon(group: ChaosGroup, rng: random.Random) -> str:
    """SIGTERM, in order."""
    assert group.daemon is not None
    group.daemon.terminate()
    try:
        status = group.daemon.wait(20)
    except subprocess.TimeoutExpired:
        group.tally.surprises.append("the daemon did not stop on SIGTERM within 20 s")
        status = -1
    if status not in (0, -1):
        group.tally.surprises.append(f"the daemon ended with status {status} on SIGTERM")
    group.kill_daemon()
    group.start_daemon()
    return f"status {status}"


def freeze_daemon(group: ChaosGroup, rng: random.Random) -> str:
    """SIGSTOP, steps without it, SIGCONT."""
    assert group.daemon is not None
    with _frozen(group.daemon.pid):
        group.wait_steps(rng.choice((5, 30, 80)))
    return "frozen"


def kill_workers(group: ChaosGroup, rng: random.Random) -> str:
    """Kill -9 of policy workers."""
    pids = _workers(group)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return f"{len(pids)} workers"


def freeze_workers(group: ChaosGroup, rng: random.Random) -> str:
    """SIGSTOP of policy workers for a while."""
    with contextlib.ExitStack() as stack:
        for pid in _workers(group):
            stack.enter_context(_frozen(pid))
        group.wait_steps(rng.choice((10, 60)))
    return "frozen"


def kill_rank(group: ChaosGroup, rng: random.Random) -> str:
    """Kill -9 of a rank: the others name it, and all join again; now and then one finds no room at first."""
    rank = rng.randrange(len(RANKS))
    time.sleep(rng.uniform(0, 0.3))
    group.kill_rank(rank)
    group.join()
    return f"rank {rank}"


def kill_all_at_once(group: ChaosGroup, rng: random.Random) -> str:
    """A rank and the daemon in the same moment."""
    group.kill_daemon()
    rank = rng.randrange(len(RANKS))
    group.kill_rank(rank)
    group.join()
    group.start_daemon()
    return f"rank {rank} and the daemon"


def join_without_room(group: ChaosGroup, rng: random.Random) -> str:
    """All end in order and join again, one of them with no room for its segments at first."""
    rank = rng.randrange(len(RANKS))
    group.end_incarnation()
    before = group.tally.refused_joins
    group.join(full=rank)
    if group.tally.refused_joins != before + 1:
        group.tally.surprises.append(f"rank {rank} was not refused for want of room")
    return f"rank {rank}"


def freeze_rank(group: ChaosGroup, rng: random.Random) -> str:
    """SIGSTOP of a rank: all others wait for it, and go on with it."""
    rank = rng.randrange(len(RANKS))
    with _frozen(group.pid(rank)):
        time.sleep(rng.uniform(0.05, 1.0))
    return f"rank {rank}"


def slow_rank(group: ChaosGroup, rng: random.Random) -> str:
    """A rank whose forward takes as long as 100 of the others."""
    rank = rng.randrange(len(RANKS))
    seconds = 100 * float(group.environ["CHAOS_STEP_S"])
    group.send(rank, Slow(seconds))
    return f"rank {rank} by {seconds:g} s"


def starve(group: ChaosGroup, rng: random.Random) -> str:
    """A rank or the daemon shares one core with busy processes, at the lowest priority."""
    assert group.daemon is not None
    pid = rng.choice([group.daemon.pid, *(group.pid(rank) for rank in RANKS)])
    cpu = {rng.choice(sorted(os.sched_getaffinity(0)))}
    before = os.sched_getaffinity(pid)
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2)]
    try:
        for each in (pid, *(process.pid for process in busy)):
            os.sched_setaffinity(each, cpu)
        group.wait_steps(rng.choice((5, 15)))
    finally:
        os.sched_setaffinity(pid, before)
        for process in busy:
            process.kill()
            process.wait()
    return "starved"


def jump_clock(group: ChaosGroup, rng: random.Random) -> str:
    """The daemon's monotonic clock goes ahead as after a suspend, its wall clock anywhere."""
    ahead = rng.choice((1.0, 25.0, 100_000.0))
    now = getattr(group, "ahead_s", 0.0) + ahead
    setattr(group, "ahead_s", now)  # noqa: B010 (a clock never goes back, also not for the next daemon)
    group.jump(now, rng.choice((-86400.0 * 365, 0.0, 86400.0)))
    return f"{ahead:g} s"


def flip_board(group: ChaosGroup, rng: random.Random) -> str:
    """One to three bits of the board: its counters, its plan, or behind it."""
    watcher = group.watcher
    assert watcher is not None
    watcher.note_damage()
    data = watcher.board.segment.array(np.uint8, (192 + watcher.board.capacity,))
    places = []
    for _ in range(rng.choice((1, 1, 3))):
        place = rng.choice(
            (rng.randrange(8), 64 + rng.randrange(8), 128 + rng.randrange(32), 192 + rng.randrange(2000))
        )
        data[place] ^= 1 << rng.randrange(8)
        places.append(str(place))
    return f"bytes {' '.join(places)}"


def flip_ring(group: ChaosGroup, rng: random.Random) -> str:
    """Some bits of one rank's ring: counters or records."""
    assert group.watcher is not None
    rank = rng.randrange(len(RANKS))
    ring = LoadRing.open(group.group, rank, group.watcher.words.incarnation)
    size = 192 + ring.info.num_records * ring.info.record_bytes
    data = ring.segment.array(np.uint8, (size,))
    for _ in range(rng.choice((1, 4, 64))):
        place = rng.choice((rng.randrange(8), 64 + rng.randrange(8), 128 + rng.randrange(8), rng.randrange(192, size)))
        data[place] ^= 1 << rng.randrange(8)
    ring.close()
    return f"rank {rank}"


def second_daemon(group: ChaosGroup, rng: random.Random) -> str:
    """Another daemon for the same directory must end; one of another directory must leave the group alone."""
    if rng.random() < 0.5:
        process = group.spawn_daemon("normal", group.settings_of, ready=False)
        try:
            status = process.wait(30)
            if status == 0:
                group.tally.surprises.append("a second daemon of the same directory did not fail")
        except subprocess.TimeoutExpired:
            group.tally.surprises.append("a second daemon of the same directory did not end")
        finally:
            process.kill()
            process.wait()
        return "same directory"
    directory = Path(tempfile.mkdtemp(prefix="eplb-", dir="/tmp"))
    environ = {**group.settings_of, "EPLB_ASYNC_RUNTIME_DIR": str(directory)}
    other: subprocess.Popen[bytes] | None = None
    try:
        group_lock_path(directory, group.group).touch(mode=0o600)
        other = group.spawn_daemon("normal", environ)
        group.wait_steps(20)
        with ControlClient(load_settings(environ=environ)) as client:
            served = [each.group for each in client.status().groups if each.state in ("serving", "paused")]
        if served and group.status() is not None:
            group.tally.surprises.append(f"a second daemon serves {served}")
    except EplbError as error:
        group.tally.surprises.append(f"the second daemon: {error}")
    finally:
        if other is not None:
            other.kill()
            other.wait()
        shutil.rmtree(directory)
    return "another directory"


def other_version(group: ChaosGroup, rng: random.Random) -> str:
    """A daemon of another release in between: of another layout, or with plans that these ranks do not know."""
    kind = rng.choice(("layout", "plans"))
    group.kill_daemon()
    group.start_daemon(kind)
    group.wait_steps(rng.choice((20, 60)))
    if (
        kind == "layout"
        and (status := group.status()) is not None
        and any(each.state == "serving" for each in status.groups)
    ):
        group.tally.surprises.append("a daemon of another layout serves the group")
    group.kill_daemon()
    group.start_daemon()
    return kind


def rejoin(group: ChaosGroup, rng: random.Random) -> str:
    """All ranks end in order and join again."""
    group.end_incarnation()
    group.join()
    return ""


EVENTS: dict[str, tuple[Event, int]] = {
    "kill -9 daemon": (kill_daemon, 5),
    "SIGTERM daemon": (stop_daemon, 1),
    "SIGSTOP daemon": (freeze_daemon, 4),
    "kill -9 workers": (kill_workers, 4),
    "SIGSTOP workers": (freeze_workers, 3),
    "kill -9 rank": (kill_rank, 6),
    "kill -9 rank and daemon": (kill_all_at_once, 2),
    "full /dev/shm at attach": (join_without_room, 3),
    "SIGSTOP rank": (freeze_rank, 8),
    "rank slow by 100 steps": (slow_rank, 5),
    "CPU starvation": (starve, 5),
    "clock jump of daemon": (jump_clock, 6),
    "bits flipped on board": (flip_board, 10),
    "bits flipped in ring": (flip_ring, 8),
    "second daemon": (second_daemon, 1),
    "daemon of another version": (other_version, 2),
    "orderly rejoin": (rejoin, 2),
}
"""By name: what to call, and how often relative to the others."""


@contextlib.contextmanager
def _frozen(pid: int) -> Iterator[None]:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _workers(group: ChaosGroup) -> list[int]:
    wait_for(lambda: (status := group.status()) is not None and status.pool["pids"], 30, "policy workers")
    status = group.status()
    return list(status.pool["pids"]) if status is not None else []

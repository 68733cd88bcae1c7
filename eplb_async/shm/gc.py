"""Find and remove segments whose owners are gone.

A group's segments are stale when no process of its member table lives; segments of a group without such a table, or with
a damaged one, when the process that created them is gone. `export`, `ring` and `weights` segments belong to one rank:
they are stale as soon as that process is gone. Nothing that a living process may still use is ever removed.
"""

import os
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

import posix_ipc

from eplb_async.core.errors import SegmentMissing, SegmentRefused
from eplb_async.shm.layout import owner_alive
from eplb_async.shm.segment import SHM_DIRECTORY, list_segments
from eplb_async.shm.words import AgreementWords

__all__ = ["StaleSegment", "collect_garbage", "stale_segments"]

_OWNER = struct.Struct("<QQ")
_OWNER_OFFSET = 32
_GRACE_S = 5.0
"""A segment without a whole header may be in the making: it is left alone until it has not changed for so long."""


class StaleSegment(NamedTuple):
    """A segment that nobody uses any more."""

    name: str
    num_bytes: int
    why: str


def stale_segments(group: str | None = None) -> list[StaleSegment]:
    """This user's stale segments, of one group or of all."""
    return list(_each_stale(group))


def collect_garbage(group: str | None = None) -> list[StaleSegment]:
    """Remove what `stale_segments` finds; returns what was removed."""
    removed = []
    # each is looked at right before it goes: a rank that attaches meanwhile gives old names to new segments
    for stale in _each_stale(group):
        try:
            posix_ipc.unlink_shared_memory(stale.name)
        except posix_ipc.ExistentialError:
            continue
        removed.append(stale)
    return removed


def _each_stale(group: str | None) -> Iterator[StaleSegment]:
    for name, owner_group, kind in list_segments():
        if group not in (None, owner_group):
            continue
        pid, start, size, age_s = _owner(name)
        members = _living_members(owner_group)
        # a dead rank's own segments go even while the others live
        shared = kind in ("group", "board", "live")
        if owner_alive(pid, start) or (members and shared) or (not pid and age_s < _GRACE_S):
            continue
        why = f"process {pid} is gone" if pid else "it has no readable header"
        yield StaleSegment(name, size, why)


def _owner(name: str) -> tuple[int, int, int, float]:
    """(pid, start, bytes, age) from the raw header, checked or not: damaged segments must be removable too."""
    try:
        with open(SHM_DIRECTORY / name[1:], "rb") as file:
            status = os.fstat(file.fileno())
            head = file.read(_OWNER_OFFSET + _OWNER.size)
    except OSError:
        return 0, 0, 0, 0.0
    age_s = time.time() - status.st_mtime
    if len(head) < _OWNER_OFFSET + _OWNER.size:
        return 0, 0, status.st_size, age_s
    pid, start = _OWNER.unpack_from(head, _OWNER_OFFSET)
    return (pid, start, status.st_size, age_s) if pid < 1 << 32 else (0, 0, status.st_size, age_s)


def _living_members(group: str) -> list[int]:
    try:
        words = AgreementWords.open(group)
        living = [rank for rank in range(words.num_ranks) if words.member(rank).alive]
    except (SegmentMissing, SegmentRefused):
        return []
    words.close()
    return living

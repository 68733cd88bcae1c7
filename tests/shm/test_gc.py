"""What gc removes, and what it must never remove."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import posix_ipc
import pytest

from eplb_async.core.errors import SegmentRefused
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.gc import collect_garbage, stale_segments
from eplb_async.shm.layout import segment_name
from eplb_async.shm.live import LivePlacement
from eplb_async.shm.segment import SHM_DIRECTORY, Segment
from eplb_async.shm.words import AgreementWords, GroupInfo, MemberState
from tests.conftest import segments_left
from tests.shm.processes import kill, line_of, running

SPEC = MoESpec(num_layers=1, num_experts=4, num_ranks=2)

# argv: group, rank; makes the group's segments if rank is 0, and this rank's own
RANK = """
import os, sys
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.layout import segment_name
from eplb_async.shm.live import LivePlacement
from eplb_async.shm.segment import Segment
from eplb_async.shm.words import AgreementWords, GroupInfo, MemberState
group, rank = sys.argv[1], int(sys.argv[2])
spec = MoESpec(num_layers=1, num_experts=4, num_ranks=2)
info = GroupInfo(group=group, spec=spec, lag=1, history=4, staging_rows=2, slot_bytes=[1], tensors="x")
if rank == 0:
    board = PlanBoard.create(group, spec, 1)
    live = LivePlacement.create(group, spec, initial_placement(spec), 1)
    words = AgreementWords.create(info, 1)
else:
    words = AgreementWords.open(group)
words.join(rank, os.getpid())
own = [Segment.create(segment_name(group, f"{kind}.{rank}"), kind, 10).publish() for kind in ("ring", "export", "weights")]
words.set_state(rank, MemberState.READY)
print("ready", flush=True)
sys.stdin.read()
"""


def info(group: str) -> GroupInfo:
    """As in RANK."""
    return GroupInfo(group=group, spec=SPEC, lag=1, history=4, staging_rows=2, slot_bytes=[1], tensors="x")


def kinds(names: list[str], group: str) -> list[str]:
    """The last parts of names of a group's segments."""
    return sorted(name.removeprefix("/").split(f".{group}.", 1)[1] for name in names)


def removed(group: str) -> list[str]:
    """Kinds that gc removes."""
    return kinds([stale.name for stale in collect_garbage(group)], group)


def test_segments_of_the_dead_go_and_of_the_living_stay(group: str, make_group: Callable[[str], str]) -> None:
    """A dead rank's own segments go while another lives, the group's stay; all go when the last is killed.

    A group that lives beside it is not touched, also when its maker is dead and another rank is not.
    """
    other = make_group("other")
    with running(RANK, other, "0") as bystander, running(RANK, group, "0") as first:
        assert line_of(bystander) == line_of(first) == "ready"
        with running(RANK, group, "1") as second:
            assert line_of(second) == "ready"
            assert [stale for stale in stale_segments() if group in stale.name or other in stale.name] == []
            # rank 0 made board, live and group: they must outlive it
            kill(first, reap=False)
            assert removed(group) == ["export.0", "ring.0", "weights.0"]
            assert removed(group) == []
            left = ["board", "export.1", "group", "live", "ring.1", "weights.1"]
            assert kinds(segments_left(group), group) == left
            kill(second)
            assert removed(group) == left
        assert len(segments_left(other)) == 6
        kill(bystander)
        assert len(removed(other)) == 6


def test_what_is_reported(group: str) -> None:
    """Name, bytes and the process that is gone."""
    with running(RANK, group, "0") as process:
        assert line_of(process) == "ready"
        kill(process)
        found = stale_segments(group)
    assert {stale.why for stale in found} == {f"process {process.pid} is gone"}
    for stale in found:
        assert stale.num_bytes == (SHM_DIRECTORY / stale.name[1:]).stat().st_size
    assert collect_garbage(group) == found


def test_a_pid_given_again_does_not_keep_segments(group: str) -> None:
    """A living process with the owner's number, but another start time, is not the owner."""
    name = segment_name(group, "board")
    segment = Segment.create(name, "x", 10)
    assert removed(group) == []
    path = SHM_DIRECTORY / name[1:]
    with path.open("r+b") as file:
        file.seek(40)
        file.write((segment.header.owner_start - 1).to_bytes(8, "little"))
    assert removed(group) == ["board"]


def test_a_member_that_left_does_not_keep_a_group(group: str) -> None:
    """LEFT and FREE are not living, JOINING and READY are, for members of living processes."""
    code = RANK.replace("sys.stdin.read()", "")
    for state in (MemberState.LEFT, MemberState.JOINING, MemberState.READY, MemberState.FREE):
        with running(code, group, "0") as process:
            assert process.wait() == 0
        words = AgreementWords.open(group)
        words.join(1, os.getpid())
        words.set_state(1, state)
        kept = state in (MemberState.JOINING, MemberState.READY)
        gone = ["export.0", "ring.0", "weights.0"]
        assert removed(group) == (gone if kept else sorted([*gone, "board", "group", "live"]))
        words.set_state(1, MemberState.LEFT)
        removed(group)
        words.close()


def make_old(path: Path) -> None:
    """As if it had not changed for a minute."""
    os.utime(path, (path.stat().st_atime - 60, path.stat().st_mtime - 60))


@pytest.mark.parametrize("data", [b"", b"junk", b"\0" * 48, b"\xff" * 5000])
def test_unreadable_headers_go_once_they_are_old(group: str, data: bytes) -> None:
    """A segment without an owner may be in the making, and is left for a while; then it is removed."""
    path = SHM_DIRECTORY / segment_name(group, "weights.0")[1:]
    path.write_bytes(data)
    assert removed(group) == []
    make_old(path)
    assert [stale.why for stale in stale_segments(group)] == ["it has no readable header"]
    assert removed(group) == ["weights.0"]


def test_a_damaged_group_table_is_survived(group: str) -> None:
    """With a header or a member line that is damaged, what living processes made stays, and gc does not fail."""
    words = AgreementWords.create(info(group), 1)
    board = PlanBoard.create(group, SPEC, 1)
    live = LivePlacement.create(group, SPEC, initial_placement(SPEC), 1)
    words.join(0, os.getpid())
    lines = words.segment.array(np.int64, (8 * 3,))
    lines[8] = 99
    with pytest.raises(SegmentRefused, match="state 99 of rank 0"):
        words.member(0)
    assert removed(group) == []
    path = SHM_DIRECTORY / words.segment.name[1:]
    with path.open("r+b") as file:
        file.write(b"DAMAGED!")
    assert removed(group) == []
    for part in (words, board, live):
        part.segment.unlink()


def test_junk_beside_segments_is_survived(group: str, make_group: Callable[[str], str]) -> None:
    """Folders, links, pipes and files with other names are neither read nor removed."""
    junk = {kind: SHM_DIRECTORY / segment_name(make_group(kind), "board")[1:] for kind in ("folder", "link", "pipe")}
    junk["name"] = SHM_DIRECTORY / f"eplb_async.{os.getuid()}.{group}.unknown"
    junk["folder"].mkdir()
    junk["link"].symlink_to("/etc/hostname")
    os.mkfifo(junk["pipe"])
    junk["name"].write_bytes(b"x")
    found = [collect_garbage(make_group(kind)) for kind in junk] + [collect_garbage(group)]
    there = [os.path.lexists(path) for path in junk.values()]
    junk.pop("folder").rmdir()
    for path in junk.values():
        path.unlink()
    assert found == [[]] * 5
    assert all(there)


def test_a_name_taken_over_meanwhile_is_left(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that attach while gc runs give old names to new segments: those stay."""
    with running(RANK, group, "0") as process:
        assert line_of(process) == "ready"
        kill(process)
    unlink = posix_ipc.unlink_shared_memory
    successors: list[Segment] = []

    def unlink_and_attach(name: str) -> None:
        unlink(name)
        if not successors:
            unlink(segment_name(group, "ring.0"))
            successors.append(Segment.create(segment_name(group, "ring.0"), "x", 10))

    monkeypatch.setattr(posix_ipc, "unlink_shared_memory", unlink_and_attach)
    assert "ring.0" not in removed(group)
    assert not successors[0].replaced
    successors[0].unlink()


def test_a_name_gone_meanwhile_is_no_error(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that collect at once: what the other removed is not reported twice."""
    path = SHM_DIRECTORY / segment_name(group, "board")[1:]
    path.write_bytes(b"")
    make_old(path)
    unlink = posix_ipc.unlink_shared_memory

    def late(name: str) -> None:
        path.unlink()
        unlink(name)

    monkeypatch.setattr(posix_ipc, "unlink_shared_memory", late)
    assert collect_garbage(group) == []

"""Segments: whole or refused, gone when they could not be made, never unmapped under an array."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eplb_async.core.errors import EplbError, NoSharedMemory, SegmentMissing, SegmentRefused
from eplb_async.shm.layout import READY_OFFSET, segment_name
from eplb_async.shm.segment import SHM_DIRECTORY, Segment, file_lock, list_segments, prepare_runtime_dir
from tests.shm.processes import kill, line_of, run_code, running

LAYOUT = "a layout"
OTHER_USER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def name(group: str) -> str:
    """A name that is free."""
    return segment_name(group, "board")


@pytest.fixture
def made(name: str) -> Segment:
    """A ready segment of 100 bytes; the test unlinks it."""
    return Segment.create(name, LAYOUT, 100, text=b'{"a": 1}', incarnation=5).publish()


def path_of(segment: Segment) -> Path:
    """Where Linux shows it."""
    return SHM_DIRECTORY / segment.name[1:]


def test_another_process_sees_what_was_written(made: Segment) -> None:
    """Text, incarnation, owner and data of a segment are the same in another process, and both write to one memory."""
    made.array(np.int32, (4,), 16)[:] = (1, 2, 3, 4)
    code = """
import sys, numpy as np
from eplb_async.shm.segment import Segment
segment = Segment.open(sys.argv[1], "a layout")
data = segment.array(np.int32, (2, 2), 16)
print(segment.header.text.decode(), segment.header.incarnation, segment.header.owner_pid, data.tolist())
data[:] = 9
"""
    assert run_code(code, made.name) == f'{{"a": 1}} 5 {os.getpid()} [[1, 2], [3, 4]]'
    assert made.array(np.int32, (6,), 12).tolist() == [0, 9, 9, 9, 9, 0]
    assert made.owner_alive
    made.unlink()


def test_mode_and_size(made: Segment) -> None:
    """0600, and as large as the header says; data begins on a page."""
    status = path_of(made).stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_size == made.header.size == made.header.data_offset + 100
    assert made.address % 4096 == 0
    made.unlink()


def test_missing_segment(name: str) -> None:
    """A name that nobody made is SegmentMissing."""
    with pytest.raises(SegmentMissing, match="no shared segment"):
        Segment.open(name, LAYOUT)


def test_a_segment_is_closed_to_others_until_published(name: str) -> None:
    """Between create and publish nobody reads what may be half written."""
    segment = Segment.create(name, LAYOUT, 100)
    with pytest.raises(SegmentRefused, match="not ready"):
        Segment.open(name, LAYOUT)
    segment.publish()
    Segment.open(name, LAYOUT).unlink()


def test_owner_is_named_before_the_memory_is_reserved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserving a large segment takes long; whoever looks meanwhile must see whose it is."""
    seen = []
    reserve = os.posix_fallocate

    def slow_reserve(descriptor: int, offset: int, size: int) -> None:
        seen.append(os.pread(descriptor, 48, 0)[32:40])
        reserve(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", slow_reserve)
    Segment.create(name, LAYOUT, 100).unlink()
    assert [int.from_bytes(owner, "little") for owner in seen] == [os.getpid()]


def damage(path: Path, place: int, data: bytes) -> None:
    """Overwrite bytes of a segment from outside."""
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def test_every_damaged_header_byte_is_refused(made: Segment) -> None:
    """Whichever byte of the header or its text is damaged, open refuses; undamaged again, it opens."""
    path = path_of(made)
    whole = path.read_bytes()
    for place in range(128 + len(made.header.text)):
        for flip in (1, 0xFF):
            damage(path, place, bytes([whole[place] ^ flip]))
            with pytest.raises(SegmentRefused):
                Segment.open(made.name, LAYOUT)
        damage(path, place, whole[place : place + 1])
    Segment.open(made.name, LAYOUT).unlink()


FOREIGN: list[tuple[str, Callable[[Path], object], str]] = [
    ("another program's", lambda path: damage(path, 0, b"SOMEBODY"), "without our magic number"),
    ("another version", lambda path: damage(path, 8, b"\2"), "version 2"),
    ("not ready", lambda path: damage(path, READY_OFFSET, b"\0"), "not ready"),
    ("cut", lambda path: os.truncate(path, 4100), "4100 bytes with a header for"),
    ("cut in the header", lambda path: os.truncate(path, 100), "100 bytes"),
    ("cut before ready", lambda path: os.truncate(path, READY_OFFSET), "80 bytes"),
    ("empty", lambda path: os.truncate(path, 0), "0 bytes"),
    ("longer", lambda path: os.truncate(path, 9000), "9000 bytes with a header for"),
    ("readable by all", lambda path: path.chmod(0o644), "mode 0644"),
    ("writable by the group", lambda path: path.chmod(0o620), "mode 0620"),
]


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in FOREIGN], ids=[case[0] for case in FOREIGN])
def test_foreign_segments_are_refused(made: Segment, change: Callable[[Path], object], words: str) -> None:
    """What is not exactly a segment of ours is refused, and the message says what was found."""
    change(path_of(made))
    with pytest.raises(SegmentRefused, match=words):
        Segment.open(made.name, LAYOUT)
    made.unlink()


def test_another_layout_is_refused(made: Segment) -> None:
    """A segment of another kind under this name is not read."""
    with pytest.raises(SegmentRefused, match="needed layout"):
        Segment.open(made.name, "another layout")
    made.unlink()


@needs_root
def test_another_users_segment_is_refused_and_not_listed(made: Segment) -> None:
    """A segment that another user made under our name is neither read nor counted as ours."""
    os.chown(path_of(made), OTHER_USER, OTHER_USER)
    with pytest.raises(SegmentRefused, match=f"owner {OTHER_USER}"):
        Segment.open(made.name, LAYOUT)
    assert made.name not in [listed[0] for listed in list_segments()]
    made.unlink()


def test_a_taken_name_is_an_error_and_stays(made: Segment) -> None:
    """A second segment of one name is refused; the first is untouched."""
    with pytest.raises(NoSharedMemory, match="a segment of that name exists"):
        Segment.create(made.name, LAYOUT, 10)
    assert not made.replaced
    Segment.open(made.name, LAYOUT).unlink()


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "no room in /dev/shm"), (errno.EFBIG, "File too large")])
def test_no_room_leaves_no_name(name: str, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    """When memory cannot be reserved, the error says so and nothing is left behind."""

    def refuse(descriptor: int, offset: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(NoSharedMemory, match=words):
        Segment.create(name, LAYOUT, 100)
    assert not (SHM_DIRECTORY / name[1:]).exists()


def test_more_than_there_is_leaves_no_name(name: str) -> None:
    """The same with the real /dev/shm: a segment larger than it is refused at once, not by SIGBUS later."""
    room = os.statvfs(SHM_DIRECTORY)
    with pytest.raises(NoSharedMemory, match="--shm-size"):
        Segment.create(name, LAYOUT, room.f_blocks * room.f_frsize + (1 << 30))
    assert not (SHM_DIRECTORY / name[1:]).exists()


def test_unlink_leaves_a_successor_alone(made: Segment) -> None:
    """Whoever unlinks a segment whose name was taken over removes nothing."""
    opened = Segment.open(made.name, LAYOUT)
    replaced = [opened.replaced]
    made.unlink()
    made.unlink()
    replaced.append(opened.replaced)
    successor = Segment.create(made.name, LAYOUT, 100).publish()
    replaced.append(opened.replaced)
    assert replaced == [False, True, True]
    opened.unlink()
    assert not successor.replaced
    assert path_of(successor).exists()
    successor.unlink()


def test_arrays_outlive_close_and_unlink(made: Segment) -> None:
    """An array keeps its pages; close twice is fine."""
    data = made.array(np.int64, (4,))
    data[:] = 7
    made.unlink()
    made.close()
    made.close()
    assert data.tolist() == [7, 7, 7, 7]
    data[:] = 8
    assert data.sum() == 32


def test_arrays_beyond_the_end_are_refused(made: Segment) -> None:
    """A view ends where the segment ends, at the latest."""
    assert made.array(np.uint8, (100,)).size == 100
    for shape, offset in (((101,), 0), ((1,), 100), ((2, 50), 1)):
        with pytest.raises(SegmentRefused, match="at least"):
            made.array(np.uint8, shape, offset)
    made.unlink()


def test_owner_of_a_killed_process(name: str) -> None:
    """A segment outlives its maker, and says that it is gone."""
    code = """
import sys
from eplb_async.shm.segment import Segment
segment = Segment.create(sys.argv[1], "a layout", 100).publish()
print("made", flush=True)
sys.stdin.read()
"""
    with running(code, name) as process:
        assert line_of(process) == "made"
        segment = Segment.open(name, LAYOUT)
        alive = [segment.owner_alive]
        kill(process, reap=False)
        assert [*alive, segment.owner_alive] == [True, False]
    segment.unlink()


def test_listing(make_group: Callable[[str], str]) -> None:
    """This user's segments with group and kind, sorted; files, folders and links of other kinds are left out."""
    made = [Segment.create(segment_name(make_group(part), "live"), LAYOUT, 1) for part in ("b", "a")]
    junk = [SHM_DIRECTORY / segment_name(make_group(part), kind)[1:] for part, kind in (("c", "board"), ("d", "group"))]
    junk[0].mkdir()
    junk[1].symlink_to("/etc/hostname")
    fifo = SHM_DIRECTORY / segment_name(make_group("e"), "ring.0")[1:]
    os.mkfifo(fifo)
    ours = [listed for listed in list_segments() if listed[1].startswith(make_group("")[:-1])]
    junk[0].rmdir()
    for path in (junk[1], fifo):
        path.unlink()
    for segment in made:
        segment.unlink()
    assert ours == [(segment_name(make_group(part), "live"), make_group(part), "live") for part in ("a", "b")]


def test_runtime_dir_is_made_private(runtime_dir: Path) -> None:
    """It is made with its parents, mode 0700; one that is there and ours is taken as it is."""
    wanted = runtime_dir / "a" / "b"
    for _ in range(2):
        assert prepare_runtime_dir(wanted) == wanted
    assert wanted.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_runtime_dir_that_others_may_write_is_refused(runtime_dir: Path, mode: int) -> None:
    """Others could put their socket or lock there."""
    runtime_dir.chmod(mode)
    with pytest.raises(EplbError, match=f"mode {mode:04o}; needed user {os.geteuid()} and mode 0700"):
        prepare_runtime_dir(runtime_dir)


@needs_root
def test_runtime_dir_of_another_user_is_refused(runtime_dir: Path) -> None:
    """Not ours, not used."""
    os.chown(runtime_dir, OTHER_USER, OTHER_USER)
    with pytest.raises(EplbError, match=f"belongs to user {OTHER_USER}"):
        prepare_runtime_dir(runtime_dir)


def test_runtime_dir_that_is_a_file_is_refused(runtime_dir: Path) -> None:
    """The error names it and the variable that chooses another."""
    path = runtime_dir / "file"
    path.touch()
    for wanted in (path, path / "below"):
        with pytest.raises(EplbError, match=r"cannot be used.*EPLB_ASYNC_RUNTIME_DIR"):
            prepare_runtime_dir(wanted)


COUNT_UNDER_LOCK = """
import sys
from pathlib import Path
from eplb_async.shm.segment import file_lock
lock, counter = map(Path, sys.argv[1:3])
for _ in range(100):
    with file_lock(lock, 60):
        counter.write_text(str(int(counter.read_text()) + 1))
"""
HOLD_LOCK = """
import sys
from pathlib import Path
from eplb_async.shm.segment import file_lock
with file_lock(Path(sys.argv[1]), 60):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_excludes_other_processes(runtime_dir: Path) -> None:
    """Three processes that read, add one and write lose no addition."""
    lock, counter = str(runtime_dir / "lock"), runtime_dir / "counter"
    counter.write_text("0")
    with (
        running(COUNT_UNDER_LOCK, lock, str(counter)) as first,
        running(COUNT_UNDER_LOCK, lock, str(counter)) as second,
        running(COUNT_UNDER_LOCK, lock, str(counter)) as third,
    ):
        for process in (first, second, third):
            assert process.wait() == 0
    assert counter.read_text() == "300"


def test_lock_of_a_killed_process_is_free(runtime_dir: Path) -> None:
    """While it is held others time out, and not before the deadline; kill -9 frees it."""
    path = runtime_dir / "lock"
    with running(HOLD_LOCK, str(path)) as process:
        assert line_of(process) == "held"
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"held by another process for 0\.05 s"), file_lock(path, 0.05):
            pass
        assert time.monotonic() - start >= 0.05
        kill(process)
        with file_lock(path, 0.0):
            pass


def test_lock_is_free_after_an_error(runtime_dir: Path) -> None:
    """Leaving the block by an exception leaves the lock too."""
    path = runtime_dir / "lock"
    with pytest.raises(KeyError), file_lock(path, 1.0):
        raise KeyError
    with file_lock(path, 0.0):
        pass

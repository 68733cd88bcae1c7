"""Names, owners and headers of segments."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_async.core.errors import SegmentRefused
from eplb_async.shm.layout import (
    DATA_ALIGNMENT,
    READY_OFFSET,
    Header,
    decode_text,
    owner_alive,
    parse_name,
    process_start,
    segment_name,
)
from eplb_async.shm.ring import RingInfo
from tests.shm.processes import kill, line_of, running

WAIT = "import sys; print('up', flush=True); sys.stdin.read()"
ODD_NAME = r"""
import ctypes, sys
ctypes.CDLL(None).prctl(15, b"\xff) Z 1 (\n", 0, 0, 0)
print("up", flush=True)
sys.stdin.read()
"""
GROUPS = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", fullmatch=True)
KINDS = st.sampled_from(["group", "board", "live"]) | st.builds(
    "{}.{}".format, st.sampled_from(["ring", "export", "weights"]), st.integers(0, 999)
)


@given(group=GROUPS, kind=KINDS)
def test_names_lead_back_to_group_and_kind(group: str, kind: str) -> None:
    """Every group's name, dots and words of ours in it included, is found in the segment's name again."""
    name = segment_name(group, kind)
    assert name.startswith("/")
    assert parse_name(name[1:]) == (os.getuid(), group, kind)


@pytest.mark.parametrize(
    "name",
    """|board|eplb_async|eplb_async.0.main|eplb_async.0.main.map|eplb_async.x.main.board|eplb_async.0.main.ring
eplb_async.0.main.ring.x|eplb_async.0.main.board.1|eplb_async.0..board|xeplb_async.0.main.board|eplb_async.0.main.boards
sem.eplb_async.0.main.board|eplb_async.0.a\t.board.""".replace("\n", "|").split("|"),
)
def test_other_names_are_not_ours(name: str) -> None:
    """What another program may have put there is not taken for a segment."""
    assert parse_name(name) is None


def test_living_processes() -> None:
    """This process lives under its own start time and under no other: a pid that is given again is another process."""
    start = process_start(os.getpid())
    assert start > 0
    assert owner_alive(os.getpid(), start)
    assert not owner_alive(os.getpid(), start + 1)
    assert not owner_alive(os.getpid(), start - 1)


def test_no_process_is_not_alive() -> None:
    """Numbers that cannot be a process, and the start time 0 that stands for none, are never alive."""
    for pid in (0, -1, 1 << 31, 1 << 63):
        assert process_start(pid) == 0
        assert not owner_alive(pid, 0)
        assert not owner_alive(pid, 1)


def test_dead_processes_are_not_alive() -> None:
    """A killed process counts as gone as soon as it is a zombie, and when it was reaped."""
    with running(WAIT) as process:
        assert line_of(process) == "up"
        start = process_start(process.pid)
        assert owner_alive(process.pid, start)
        kill(process, reap=False)
        assert not owner_alive(process.pid, start)
        process.wait()
        assert not owner_alive(process.pid, start)


def test_a_process_may_call_itself_anything() -> None:
    """The command's name in /proc may hold bytes that are no UTF-8, parentheses and spaces."""
    with running(ODD_NAME) as process:
        assert line_of(process) == "up"
        start = process_start(process.pid)
        assert start >= process_start(os.getpid()) > 0
        assert owner_alive(process.pid, start)


def header(text: bytes = b'{"a": 1}', size: int = 0) -> Header:
    """A header of this process."""
    draft = Header(Header.hash_of("a layout"), 5, os.getpid(), process_start(os.getpid()), 0, text)
    return draft._replace(size=size or draft.data_offset + 100)


@given(text=st.binary(max_size=3 * DATA_ALIGNMENT))
def test_headers_lead_back(text: bytes) -> None:
    """What is decoded equals what was encoded; data begins at the next page after the text."""
    written = header(text)
    data = memoryview(written.encode().ljust(written.size, b"\0"))
    assert Header.decode("/x", data, "a layout") == written
    assert written.data_offset % DATA_ALIGNMENT == 0
    assert 128 + len(text) <= written.data_offset < 128 + len(text) + DATA_ALIGNMENT


def test_every_damaged_bit_is_found() -> None:
    """Any flipped bit of the header or its text is refused, except in `ready`, which Segment.open looks at."""
    written = header()
    whole = written.encode().ljust(written.size, b"\0")
    for place in (*range(READY_OFFSET), *range(READY_OFFSET + 8, 128 + len(written.text))):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            with pytest.raises(SegmentRefused):
                Header.decode("/x", memoryview(damaged), "a layout")


@pytest.mark.parametrize("length", [0, 7, 8, 80, 128, 4095, 4096, 4195])
def test_cut_segments_are_refused(length: int) -> None:
    """A segment shorter than its header says is refused, whatever is missing."""
    whole = header().encode().ljust(4196, b"\0")
    assert Header.decode("/x", memoryview(whole), "a layout").size == 4196
    with pytest.raises(SegmentRefused):
        Header.decode("/x", memoryview(whole[:length]), "a layout")


def test_refusals_say_what_is_different() -> None:
    """Another program's bytes, another version and another layout each have their own message."""
    whole = header().encode().ljust(4196, b"\0")
    version_2 = whole[:8] + b"\2" + whole[9:]
    for data, layout, word in (
        (b"X" * 4196, "a layout", "without our magic number"),
        (version_2, "a layout", "found version 2, needed version 1"),
        (whole, "another layout", f"layout {Header.hash_of('a layout'):016x}"),
    ):
        with pytest.raises(SegmentRefused, match=word):
            Header.decode("/x", memoryview(data), layout)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"group": 3}', b"\xff", b'{"group": "\xff"}'])
def test_a_text_of_something_else_is_refused(text: bytes) -> None:
    """A text that is whole, but not of this kind or release, refuses the segment and is no other error."""
    with pytest.raises(SegmentRefused, match="a text that is not RingInfo"):
        decode_text("/x", text, RingInfo)

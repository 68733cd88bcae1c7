"""The group segment: members and agreement words."""

import os
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eplb_async.core.errors import SegmentMissing, SegmentRefused
from eplb_async.core.plan import FIRST_COUNTER, NO_PLAN
from eplb_async.core.spec import MoESpec
from eplb_async.shm.layout import process_start, segment_name
from eplb_async.shm.segment import Segment
from eplb_async.shm.words import INVALID, LAYOUT, AgreementWords, GroupInfo, Member, MemberState, Reduced, Word
from tests.shm.processes import kill, line_of, run_code, running

SPEC = MoESpec(num_layers=2, num_experts=6, num_ranks=3)
COUNTER = st.integers(-(1 << 62), 1 << 62)


def info(group: str, lag: int = 2, history: int = 6) -> GroupInfo:
    """Of three ranks."""
    return GroupInfo(
        group=group, spec=SPEC, lag=lag, history=history, staging_rows=2, slot_bytes=[8, 16], tensors="digest"
    )


@pytest.fixture
def words(group: str) -> Iterator[AgreementWords]:
    """A new incarnation 3 of three ranks, lag 2, history 6."""
    words = AgreementWords.create(info(group), 3)
    yield words
    words.segment.unlink()


def counters(step: int, rank: int) -> tuple[int, int, int, int]:
    """Words that follow from step and rank."""
    return 10 * step + rank, 5 * step - rank, rank, 7 - rank


def test_words_before_step_0(words: AgreementWords) -> None:
    """The words of the lag steps before step 0 are there and say that nothing has happened; older ones and step 0 are not."""
    for step in (-1, -2):
        assert words.reduce(step) == Reduced(FIRST_COUNTER, FIRST_COUNTER, 0, NO_PLAN, NO_PLAN)
    assert words.reduce(-3) == (0, INVALID)
    assert words.reduce(0) == (0, INVALID)
    for rank in range(3):
        assert words.newest(rank) == Word(-1, FIRST_COUNTER, FIRST_COUNTER, 0, NO_PLAN)
        assert words.member(rank) == Member(MemberState.FREE, 0, 0, -1)
    assert not words.ended


def test_another_process_reads(words: AgreementWords, group: str) -> None:
    """Description, words and members arrive in another process."""
    for rank in range(3):
        words.publish(rank, 0, counters(0, rank))
    words.join(1, os.getpid())
    code = """
import sys
from eplb_async.shm.words import AgreementWords
words = AgreementWords.open(sys.argv[1])
print(words.info.slot_bytes, words.incarnation, tuple(words.reduce(0)), tuple(words.newest(2)), words.member(1).alive)
"""
    assert run_code(code, group) == "[8, 16] 3 (0, -2, 2, 5, 7) (0, 2, -2, 2, 5) True"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    published=st.lists(st.tuples(st.integers(0, 2), COUNTER, COUNTER, COUNTER, COUNTER), max_size=40),
    lag=st.integers(1, 2),
    history=st.integers(1, 7),
)
def test_words_equal_a_table(
    group: str, published: list[tuple[int, int, int, int, int]], lag: int, history: int
) -> None:
    """Ranks that step as they like: every step is reduced while all have its record, and names the first that has not.

    The model is a table of all words ever published.
    """
    words = AgreementWords.create(info(group, min(lag, history), history), 3)
    try:
        first = (FIRST_COUNTER, FIRST_COUNTER, 0, NO_PLAN)
        table = [dict.fromkeys(range(-words.info.lag, 0), first) for _ in range(3)]
        for rank, *values in published:
            step = max(table[rank]) + 1
            words.publish(rank, step, (values[0], values[1], values[2], values[3]))
            table[rank][step] = (values[0], values[1], values[2], values[3])
            table[rank].pop(step - history, None)
            assert words.newest(rank) == Word(step, *table[rank][step])
            assert words.member(rank).newest_step == step
        for step in range(-words.info.lag, max(map(max, table)) + 1):
            missing = [rank for rank in range(3) if step not in table[rank]]
            found = words.reduce(step)
            if missing:
                held = [held for held in table[missing[0]] if (held - step) % history == 0]
                assert found == (missing[0], held[0] if held else INVALID)
            else:
                staged, committed, error, digest = zip(*(ranks[step] for ranks in table), strict=True)
                assert found == Reduced(min(staged), min(committed), max(error), min(digest), max(digest))
    finally:
        words.segment.unlink()


def test_a_repeated_word_tells_whether_the_reduced_ones_are_the_same(words: AgreementWords) -> None:
    """It is published like any other; a rank that is behind, failed or holds a plan, or a missing word, makes it false."""
    mine = (5, 4, 3, 77)
    for rank in (1, 2, 0):
        words.publish(rank, 0, mine)
    assert words.repeat(1, 0)
    assert words.newest(0) == Word(1, *mine)
    assert not words.repeat(2, 1)
    for field, change in ((0, -1), (1, -1), (2, 1), (3, 1), (3, -1)):
        other = list(mine)
        other[field] += change
        for rank in (1, 2):
            words.publish(rank, 1, mine if rank == 1 else (other[0], other[1], other[2], other[3]))
        words.publish(0, 1, mine)
        assert not words.repeat(2, 1)
    words.publish(2, 1, mine)
    words.publish(0, 1, mine)
    assert words.repeat(2, 1)


def test_layout(words: AgreementWords) -> None:
    """One line for the end, one for each member, one for each word: the drawing in the module, byte by byte."""
    words.join(1, os.getpid())
    words.publish(1, 8, (1, 2, 3, 4))
    words.end()
    data = words.segment.array(np.int64, (8 * (1 + 3 + 18),)).reshape(-1, 8)
    assert data[0, 0] == 1
    assert data[2, :4].tolist() == [MemberState.JOINING, os.getpid(), process_start(os.getpid()), 8]
    assert data[4 + 6 + 2, :5].tolist() == [8, 1, 2, 3, 4]


def test_a_word_that_is_being_written_is_not_read(words: AgreementWords) -> None:
    """A record whose step is invalid, or that was overwritten, is no word: not reduced, and not the newest."""
    for rank in range(3):
        words.publish(rank, 0, counters(0, rank))
    data = words.segment.array(np.int64, (8 * (1 + 3 + 18),)).reshape(-1, 8)
    data[4 + 6, 0] = INVALID
    assert words.reduce(0) == (1, INVALID)
    assert words.newest(1) is None
    data[4 + 6, 0] = 6
    assert words.reduce(0) == (1, 6)
    assert words.newest(1) is None
    assert words.newest(2) == Word(0, *counters(0, 2))


def test_members_live_from_joining_to_leaving(words: AgreementWords, group: str) -> None:
    """FREE and LEFT are not alive; JOINING and READY are while the process is, and not when it is a zombie."""
    code = """
import os, sys
from eplb_async.shm.words import AgreementWords, MemberState
words = AgreementWords.open(sys.argv[1])
states = [None, MemberState.JOINING, MemberState.READY, MemberState.LEFT, MemberState.READY]
for state in states:
    if state is MemberState.JOINING:
        words.join(2, os.getpid())
    elif state is not None:
        words.set_state(2, state)
    print(state, flush=True)
    sys.stdin.readline()
"""
    with running(code, group) as process:
        assert process.stdin is not None
        for expected in (False, True, True, False, True):
            line_of(process)
            assert words.member(2).alive is expected
            process.stdin.write("\n")
            process.stdin.flush()
        process.wait()
        assert words.member(2).state is MemberState.READY
        assert words.member(2).pid == process.pid
        assert not words.member(2).alive


def test_a_killed_member_is_not_alive(words: AgreementWords, group: str) -> None:
    """Kill -9, unreaped: the others see it at once."""
    code = """
import os, sys
from eplb_async.shm.words import AgreementWords
AgreementWords.open(sys.argv[1]).join(0, os.getpid())
print("joined", flush=True)
sys.stdin.read()
"""
    with running(code, group) as process:
        assert line_of(process) == "joined"
        assert words.member(0).alive
        kill(process, reap=False)
        assert not words.member(0).alive


def test_the_end_is_seen_by_all(words: AgreementWords, group: str) -> None:
    """Whoever ends an incarnation ends it for everybody, for good."""
    other = AgreementWords.open(group)
    before = other.ended
    words.end()
    words.end()
    assert (before, other.ended) == (False, True)
    other.close()


def test_differences_are_named() -> None:
    """Two descriptions that differ say in which fields, those of the spec included; equal ones say nothing."""
    ours = info("a")
    assert ours.differences(info("a")) == []
    spec = msgspec.structs.replace(SPEC, num_ranks=6)
    theirs = msgspec.structs.replace(ours, lag=1, slot_bytes=[8], spec=spec)
    assert ours.differences(theirs) == [
        "lag is 2 here and 1 in the group",
        "slot_bytes is [8, 16] here and [8] in the group",
        "num_ranks is 3 here and 6 in the group",
    ]


@pytest.mark.parametrize("history", [6, 7, None])
def test_a_description_that_does_not_fit_is_refused(group: str, history: int | None) -> None:
    """Words are read by address: a text that promises more of them than there are, or is another, refuses the segment."""
    text = b"{}" if history is None else msgspec.json.encode(info(group, history=history))
    segment = Segment.create(segment_name(group, "group"), LAYOUT, 64 * (1 + 3 * 7), text=text).publish()
    if history == 6:
        AgreementWords.open(group).close()
    else:
        with pytest.raises(SegmentRefused):
            AgreementWords.open(group)
    segment.unlink()


def test_missing_group(group: str) -> None:
    """A group that nobody made."""
    with pytest.raises(SegmentMissing):
        AgreementWords.open(group)

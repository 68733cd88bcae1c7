"""Words from rank to rank: reduced over all, waited for, and the missing one named."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eplb_async.core.errors import PeerLost, StepDrift
from eplb_async.core.plan import FIRST_COUNTER, counter
from eplb_async.core.spec import MoESpec
from eplb_async.rank.exchange import SharedMemoryExchange
from eplb_async.rank.streams import HostStream
from eplb_async.shm.words import AgreementWords, GroupInfo, MemberState, Reduced

TRIO = MoESpec(num_layers=1, num_experts=3, num_ranks=3)
OWN = (FIRST_COUNTER, FIRST_COUNTER, 0, 0)


@pytest.fixture
def words(group: str, runtime_dir: Path) -> Iterator[AgreementWords]:
    """A group segment in which this process is all three ranks."""
    info = GroupInfo(
        group=group, spec=TRIO, lag=2, history=8, staging_rows=1, slot_bytes=[1], tensors=str(runtime_dir.name)
    )
    found = AgreementWords.create(info, 1)
    for rank in range(3):
        found.join(rank, os.getpid())
        found.set_state(rank, MemberState.READY)
    yield found
    found.segment.unlink()
    found.close()


def test_words_are_reduced_over_all_ranks(words: AgreementWords) -> None:
    """Least counters, greatest error, least and greatest digest, of one step."""
    exchanges = [SharedMemoryExchange(words, rank, 5.0) for rank in range(3)]
    for rank, exchange in enumerate(exchanges):
        exchange.publish(0, (counter(2, rank), counter(1, 5 - rank), rank, 40 + rank))
        exchange.publish(1, OWN)
    for exchange in exchanges:
        assert exchange.collect(0) == Reduced(counter(2, 0), counter(1, 3), 2, 40, 42)


def test_the_words_before_step_0_are_there(words: AgreementWords) -> None:
    """The first `lag` steps decide on words of ranks that have done nothing."""
    exchange = SharedMemoryExchange(words, 0, 5.0)
    assert [exchange.collect(step) for step in (-2, -1)] == [Reduced(FIRST_COUNTER, FIRST_COUNTER, 0, 0, 0)] * 2


def test_a_word_that_comes_late_is_waited_for(words: AgreementWords) -> None:
    """The reader goes on as soon as the word is there."""
    exchanges = [SharedMemoryExchange(words, rank, 20.0) for rank in range(3)]
    for exchange in exchanges[:2]:
        exchange.publish(0, OWN)
    stream = HostStream("late")

    def come_late() -> None:
        time.sleep(0.1)  # what is late here, not what is waited for
        exchanges[2].publish(0, OWN)

    late = stream.submit(come_late)
    assert exchanges[0].collect(0).error == 0
    stream.close()
    assert late.done


def test_the_missing_rank_is_named_after_the_deadline(words: AgreementWords) -> None:
    """Its process lives, so it is given the whole deadline."""
    for rank in (0, 2):
        SharedMemoryExchange(words, rank, 0.2).publish(0, OWN)
    start = time.monotonic()
    with pytest.raises(PeerLost, match="rank 1 is lost: no word for step 0") as caught:
        SharedMemoryExchange(words, 0, 0.2).collect(0)
    assert time.monotonic() - start >= 0.2
    assert (caught.value.rank, caught.value.step) == (1, 0)
    assert f"its process {os.getpid()} lives" in caught.value.why


def test_a_rank_that_left_is_not_waited_for(words: AgreementWords) -> None:
    """The deadline is for those who live."""
    words.set_state(2, MemberState.LEFT)
    for rank in (0, 1):
        SharedMemoryExchange(words, rank, 1000.0).publish(0, OWN)
    with pytest.raises(PeerLost, match="it detached after step -1"):
        SharedMemoryExchange(words, 0, 1000.0).collect(0)


def test_a_rank_whose_process_ended_is_not_waited_for(words: AgreementWords) -> None:
    """The start time tells it from another process with the same number."""
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    words.join(1, ended.pid)
    ended.communicate(b"\n")
    for rank in (0, 2):
        SharedMemoryExchange(words, rank, 1000.0).publish(0, OWN)
    with pytest.raises(PeerLost, match=f"its process {ended.pid} has ended"):
        SharedMemoryExchange(words, 0, 1000.0).collect(0)


def test_a_word_that_was_overwritten_is_an_error(words: AgreementWords) -> None:
    """A rank that ran away over the whole history is named; nothing is decided from its newer word."""
    for step in range(10):
        SharedMemoryExchange(words, 1, 5.0).publish(step, OWN)
    for rank in (0, 2):
        SharedMemoryExchange(words, rank, 5.0).publish(0, OWN)
    with pytest.raises(StepDrift, match="needs the word of rank 1 for step 0, but that rank is at step 8") as caught:
        SharedMemoryExchange(words, 0, 5.0).collect(0)
    assert (caught.value.peer, caught.value.step) == (1, 0)

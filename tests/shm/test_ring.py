"""The load ring against a plain list: whatever is written, read, lapped and taken over, nothing is wrong or uncounted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eplb_async.core.errors import SegmentMissing, SegmentRefused
from eplb_async.core.load import LoadKind, Phase
from eplb_async.shm.layout import segment_name
from eplb_async.shm.ring import _PUBLISHED, _RESERVED, _TAKEN, LAYOUT, PHASES, Batch, LoadRing, RingInfo
from eplb_async.shm.segment import Segment
from tests.shm.processes import run_code

LAYERS, WIDTH = 2, 3
Step = tuple[str, int]


def info(group: str, num_records: int = 4, width: int = WIDTH) -> RingInfo:
    """A ring of logical loads."""
    kind = LoadKind.LOGICAL
    return RingInfo(group=group, rank=1, kind=kind, num_layers=LAYERS, width=width, num_records=num_records)


@contextmanager
def ring_of(group: str, num_records: int = 4, width: int = WIDTH) -> Iterator[LoadRing]:
    """A new ring, unlinked afterwards."""
    ring = LoadRing.create(info(group, num_records, width), 3)
    try:
        yield ring
    finally:
        ring.segment.unlink()


def begin(ring: LoadRing, number: int) -> None:
    """Write a record whose every field follows from its number."""
    counts = ring.begin(number, PHASES[number % 5], 7 * number, 11 * number, 13 * number, 17 * number)
    counts[:] = number * 100 + np.arange(6).reshape(2, 3)


def check(batch: Batch, first: int) -> None:
    """The batch holds the records from number `first` on, whole."""
    numbers = np.arange(first, first + len(batch.step))
    assert batch.step.tolist() == numbers.tolist()
    assert batch.phase.tolist() == (numbers % 5).tolist()
    assert batch.version.tolist() == (7 * numbers).tolist()
    assert batch.tokens.tolist() == (11 * numbers).tolist()
    assert batch.previous_us.tolist() == (13 * numbers).tolist()
    assert batch.pulled.tolist() == (17 * numbers).tolist()
    counts = numbers[:, None, None] * 100 + np.arange(6).reshape(2, 3)
    assert batch.counts.tolist() == counts.tolist()


STEPS = st.lists(
    st.tuples(st.just("write"), st.integers(1, 12))
    | st.tuples(st.sampled_from(["read", "read all", "begin", "restart writer", "restart reader"]), st.integers(0, 7)),
    max_size=25,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_records=st.integers(1, 9), steps=STEPS)
def test_ring_equals_a_list(group: str, num_records: int, steps: list[Step]) -> None:
    """Records come in order, none twice; lost are exactly those that were overwritten, or are being, when it was read.

    The model is the list of all records ever published. New readers go on where the last one was, and new writers after
    the last record that was published, also when one died in the middle of a record.
    """
    with ring_of(group, num_records) as writer:
        reader = LoadRing.open(writer.info.group, 1, 3)
        published, begun, expected = 0, False, 0
        for action, amount in [*steps, ("read all", 0)]:
            if action == "write":
                for _ in range(amount):
                    begin(writer, published)
                    writer.publish()
                    published, begun = published + 1, False
            elif action == "begin":
                begin(writer, published)
                begun = True
            elif action == "restart writer":
                writer = LoadRing.open(writer.info.group, 1, 3)
            elif action == "restart reader":
                reader = LoadRing.open(writer.info.group, 1, 3)
            else:
                batch = reader.read(amount) if action == "read" else reader.read()
                # the place of the record that is begun is its predecessor's no more
                oldest = max(published + begun - num_records, 0)
                overwritten = max(min(oldest, published) - expected, 0)
                assert batch.lost <= overwritten
                check(batch, expected + batch.lost)
                if len(batch.step) or action == "read all":
                    assert batch.lost == overwritten
                if action == "read":
                    assert len(batch.step) <= amount
                else:
                    assert expected + batch.lost + len(batch.step) == published
                expected += batch.lost + len(batch.step)
        assert writer.num_published == published == expected


def test_record_layout(group: str) -> None:
    """Three counters on lines of their own, then N records of whole lines: the drawing in the module, byte by byte."""
    with ring_of(group, num_records=2, width=15) as ring:
        assert ring.info.record_bytes == 192
        for number in range(3):
            ring.begin(number + 40, Phase.MIXED, 50, 60)[:] = number
            ring.publish()
        assert ring.read(1).lost == 1
        words = ring.segment.array(np.int64, (24 + 2 * 24,))
        assert words[[0, 8, 16]].tolist() == [3, 3, 2]
        assert words[24:28].tolist() == [42, 2, 50, 60]
        assert words[48:52].tolist() == [41, 2, 50, 60]
        counts = ring.segment.array(np.int32, (LAYERS * 15,), 192 + 192 + 64)
        assert counts.tolist() == [1] * 30


def test_batches_are_copies(group: str) -> None:
    """What was read stays as it is while the ring goes on."""
    with ring_of(group, num_records=1) as ring:
        begin(ring, 0)
        ring.publish()
        batch = ring.read()
        begin(ring, 1)
        ring.publish()
        check(batch, 0)


def test_empty_ring(group: str) -> None:
    """Nothing read, nothing lost, and arrays of the right shapes."""
    with ring_of(group) as ring:
        batch = ring.read()
        assert (batch.counts.shape, batch.step.shape, batch.lost) == ((0, LAYERS, WIDTH), (0,), 0)


def test_another_process_reads(group: str) -> None:
    """A reader in another process gets the records and says so to the next reader here."""
    with ring_of(group) as ring:
        for number in range(6):
            begin(ring, number)
            ring.publish()
        code = """
import sys
from eplb_async.shm.ring import LoadRing
ring = LoadRing.open(sys.argv[1], 1, 3)
batch = ring.read(2)
print(ring.info.kind.value, batch.lost, batch.step.tolist(), batch.counts.sum(axis=(1, 2)).tolist())
"""
        assert run_code(code, group) == "logical 2 [2, 3] [1215, 1815]"
        check(ring.read(), 4)


def test_other_incarnations_are_refused(group: str, make_group: Callable[[str], str]) -> None:
    """A ring of another incarnation is not read; one that nobody made is missing."""
    with ring_of(group), pytest.raises(SegmentRefused, match="found incarnation 3, needed incarnation 4"):
        LoadRing.open(group, 1, 4)
    with pytest.raises(SegmentMissing):
        LoadRing.open(make_group("none"), 1, 3)


@pytest.mark.parametrize("change", [{"width": 400}, {"num_records": 99}, None])
def test_a_description_that_does_not_fit_is_refused(group: str, change: dict[str, int] | None) -> None:
    """A ring whose text promises more than the segment holds, or is another text, is not read."""
    text = b"{}" if change is None else msgspec.json.encode(msgspec.structs.replace(info(group), **change))
    name = segment_name(group, "ring.1")
    segment = Segment.create(name, LAYOUT, 192 + 4 * info(group).record_bytes, text=text, incarnation=3).publish()
    with pytest.raises(SegmentRefused):
        LoadRing.open(group, 1, 3)
    segment.unlink()


@pytest.mark.parametrize("place", [_TAKEN, _PUBLISHED, _RESERVED])
@pytest.mark.parametrize("bit", [3, 40, 62, 63])
def test_damaged_counters_heal(group: str, place: int, bit: int) -> None:
    """A flipped bit in a counter costs what the ring held and what it shows twice; later records come whole again."""
    with ring_of(group) as ring:
        for number in range(6):
            begin(ring, number)
            ring.publish()
        ring.read()
        words = ring.segment.array(np.uint64, (24,))
        words[place // 8] ^= np.uint64(1 << bit)
        ring.read()
        found: list[int] = []
        for number in range(6, 12):
            begin(ring, number)
            ring.publish()
            batch = ring.read()
            found = batch.step.tolist()
            assert 0 <= batch.lost <= 12
        assert found[-1:] == [11]
        assert (ring.read().step).tolist() == []


def test_pace_is_shown_beside_the_records(group: str) -> None:
    """Budget, pauses and slow-downs, for whoever looks; records are not touched."""
    with ring_of(group) as writer:
        begin(writer, 0)
        writer.show_pace(1 << 40, 3, 5)
        writer.publish()
        reader = LoadRing.open(group, 1, 3)
        assert reader.pace == (1 << 40, 3, 5)
        check(reader.read(), 0)
        assert reader.pace == (1 << 40, 3, 5)
        reader.close()

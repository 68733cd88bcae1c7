"""From the board to a plan for one rank: prepared beside the steps, refused with a reason, or ignored."""

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from eplb_async.core.diff import moves_between
from eplb_async.core.placement import initial_placement
from eplb_async.core.plan import Plan, PlanEntry, counter, encode_plan
from eplb_async.core.spec import MoESpec
from eplb_async.rank.plan_reader import BREATH_S, BadPlan, PlanReader, PreparedPlan, Snapshot
from eplb_async.rank.streams import HostStream
from eplb_async.rank.transfer.base import Pull
from eplb_async.shm.board import PlanBoard

SPEC = MoESpec(num_layers=2, num_experts=3, num_ranks=2, num_redundant=1)
NOW = Snapshot(initial_placement(SPEC), (0, 0))


class _Inline(HostStream):
    """Runs each job to its end before `submit` returns."""

    def submit(self, job):  # type: ignore[no-untyped-def]
        completion = super().submit(job)
        barrier = super().submit(self._idle)
        while not barrier.done:
            self._thread.join(0.001)
        return completion

    def _idle(self) -> None:
        return None


@pytest.fixture
def board(group: str) -> Iterator[PlanBoard]:
    """Of incarnation 9."""
    board = PlanBoard.create(group, SPEC, 9)
    yield board
    board.segment.unlink()
    board.close()


@pytest.fixture
def reader(board: PlanBoard) -> Iterator[PlanReader]:
    """Of rank 1; prepares before `poll` returns."""
    reader = PlanReader(board, SPEC, 1, 2, _Inline("reader"))
    yield reader
    reader.close()


def entry_of(layer: int, old: list[int], new: list[int], base: int) -> PlanEntry:
    """From one row to another."""
    rows = np.array(old, dtype=np.int32), np.array(new, dtype=np.int32)
    moves_M3 = moves_between(*rows, SPEC.topology, np.zeros(2, dtype=np.int64))
    return PlanEntry(layer, base, rows[1].tobytes(), moves_M3.tobytes())


def twice() -> Plan:
    """Layer 0 two times, layer 1 once."""
    entries = [
        entry_of(0, [0, 1, 2, 0], [0, 1, 2, 1], 0),
        entry_of(1, [0, 1, 2, 0], [2, 1, 0, 0], 0),
        entry_of(0, [0, 1, 2, 1], [0, 2, 2, 1], counter(1, 1)),
    ]
    return Plan(incarnation=9, generation=1, entries=entries)


def test_a_plan_is_prepared_for_its_rank(board: PlanBoard, reader: PlanReader) -> None:
    """Own pulls only, with local slots; dispatch rows of an even split; each layer's entry before."""
    assert reader.poll(NOW) is None
    digest = board.post(1, encode_plan(twice()))
    found = reader.poll(NOW)
    assert isinstance(found, PreparedPlan)
    assert (found.generation, found.digest, found.length) == (1, digest, 3)
    assert found.against is NOW
    assert [(entry.layer, entry.position, entry.previous) for entry in found.entries] == [
        (0, 1, 0),
        (1, 2, 0),
        (0, 3, 1),
    ]
    # expert 1 from slot 1 of rank 0 into slot 3; expert 0 from the own slot 3 into slot 2; nothing
    assert [entry.pulls for entry in found.entries] == [(Pull(1, 0, 1, 1),), (Pull(0, 1, 1, 0),), ()]
    assert found.entries[0].table_EK[:, :2].tolist() == [[0, -1], [1, 3], [2, -1]]
    assert found.entries[0].count_E.tolist() == [1, 2, 1]
    assert reader.poll(NOW) is found
    reader.forget()
    assert reader.poll(NOW) is None


def test_preparing_gives_the_interpreter_up_after_each_entry(
    board: PlanBoard, reader: PlanReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that computed on would hold the one that steps up for 5 ms at each of its calls into torch."""
    naps: list[float] = []
    monkeypatch.setattr("eplb_async.rank.plan_reader.time.sleep", naps.append)
    reader.poll(NOW)
    board.post(1, encode_plan(twice()))
    assert isinstance(reader.poll(NOW), PreparedPlan)
    assert naps == [BREATH_S] * 3


def test_a_plan_can_be_checked_again(board: PlanBoard, reader: PlanReader) -> None:
    """What was refused against an older placement may fit a newer one, and the other way round."""
    rows_LP = NOW.rows_LP.copy()
    rows_LP[0] = [1, 0, 2, 0]
    newer = Snapshot(rows_LP, (77, 0))
    plan = Plan(incarnation=9, generation=2, entries=[entry_of(0, [1, 0, 2, 0], [0, 1, 2, 0], 77)])
    board.post(2, encode_plan(plan))
    refused = reader.poll(NOW)
    assert isinstance(refused, BadPlan)
    assert "layer 0 is at version 0x0, the plan starts from 0x4d" in refused.why
    reader.check_again()
    assert isinstance(reader.poll(newer), PreparedPlan)


def test_the_base_is_the_version_even_where_rows_are_equal(board: PlanBoard, reader: PlanReader) -> None:
    """I4: a plan computed before a drop does not fit, although the row looks right."""
    wrong = msgspec.structs.replace(twice().entries[0], base_version=3)
    board.post(1, encode_plan(Plan(incarnation=9, generation=1, entries=[wrong])))
    assert isinstance(reader.poll(NOW), BadPlan)


@pytest.mark.parametrize(
    "fields", [{"layer": 2}, {"layer": -1}, {"slots": b"123"}, {"moves": b"1"}, {"moves": b""}], ids=str
)
def test_an_entry_that_is_none_is_refused(board: PlanBoard, reader: PlanReader, fields: dict[str, object]) -> None:
    """Whatever a daemon wrote, it is a reason and not an exception."""
    entry = msgspec.structs.replace(twice().entries[0], **fields)
    board.post(1, encode_plan(Plan(incarnation=9, generation=1, entries=[entry])))
    found = reader.poll(NOW)
    assert isinstance(found, BadPlan)
    assert found.generation == 1


def test_plans_of_other_incarnations_are_nothing(board: PlanBoard, reader: PlanReader) -> None:
    """I10."""
    board.post(1, encode_plan(msgspec.structs.replace(twice(), incarnation=8)))
    assert reader.poll(NOW) is None


def test_a_newer_plan_takes_the_place_of_an_older(board: PlanBoard, reader: PlanReader) -> None:
    """The newest whole one, as the board has it; nothing while it is being written."""
    board.post(1, encode_plan(twice()))
    assert reader.poll(NOW) is not None
    board.post(2, encode_plan(msgspec.structs.replace(twice(), generation=2, entries=twice().entries[:1])))
    found = reader.poll(NOW)
    assert found is not None
    assert found.generation == 2
    board._atomics.store_then_fence(board._address, board.sequence | 1)
    reader.forget()
    assert reader.poll(NOW) is None

"""The plan board: the newest whole plan or nothing."""

import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eplb_async.core.errors import PlanInvalid, SegmentMissing, SegmentRefused
from eplb_async.core.plan import plan_digest
from eplb_async.core.spec import MoESpec
from eplb_async.shm.board import PlanBoard, Posted
from tests.shm.processes import kill, line_of, run_code, running

SPEC = MoESpec(num_layers=2, num_experts=6, num_redundant=2, num_ranks=2)


@pytest.fixture
def board(group: str) -> Iterator[PlanBoard]:
    """An empty board of incarnation 3."""
    board = PlanBoard.create(group, SPEC, 3)
    yield board
    board.segment.unlink()


def test_empty_board(board: PlanBoard) -> None:
    """Nothing was posted, nothing is aborted."""
    assert (board.read(), board.sequence, board.abort) == (None, 0, 0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(plans=st.lists(st.tuples(st.integers(1, 1 << 40), st.binary(max_size=300)), min_size=1, max_size=5))
def test_the_newest_plan_is_read(board: PlanBoard, group: str, plans: list[tuple[int, bytes]]) -> None:
    """After each post, shorter and empty plans among them, every reader sees that plan and a new even sequence."""
    reader = PlanBoard.open(group, 3)
    for generation, data in plans:
        before = reader.sequence
        digest = board.post(generation, data)
        assert digest == plan_digest(data)
        assert reader.read() == Posted(generation, digest, data)
        assert reader.sequence > before
        assert reader.sequence % 2 == 0


def test_another_process_reads(board: PlanBoard, group: str) -> None:
    """Plan, digest and abort word arrive in another process."""
    digest = board.post(5, b"a plan")
    board.order_abort(4)
    code = """
import sys
from eplb_async.shm.board import PlanBoard
board = PlanBoard.open(sys.argv[1], 3)
print(*board.read(), board.abort)
"""
    assert run_code(code, group) == f"5 {digest} b'a plan' 4"


def test_layout(board: PlanBoard) -> None:
    """Sequence and abort on lines of their own, four fields, then the plan: the drawing in the module, byte by byte."""
    digest = board.post(5, b"a plan")
    board.order_abort(9)
    words = board.segment.array(np.int64, (24,))
    fields = np.array([5, 6, digest], dtype="<i8").tobytes()
    assert words[[0, 8]].tolist() == [2, 9]
    assert words[16:20].tolist() == [5, 6, digest, zlib.crc32(fields + b"a plan")]
    assert board.segment.array(np.uint8, (6,), 192).tobytes() == b"a plan"


def test_a_plan_that_is_being_written_is_not_seen(board: PlanBoard) -> None:
    """While the sequence is odd there is nothing; the next writer goes on from that number, and all is well again."""
    board.post(1, b"old")
    words = board.segment.array(np.int64, (1,))
    words[0] = 3
    assert board.read() is None
    board.post(2, b"new")
    assert words[0] == 4
    assert board.read() == Posted(2, plan_digest(b"new"), b"new")


def test_a_daemon_killed_while_it_writes(board: PlanBoard, group: str) -> None:
    """Kill -9 between the halves of a plan: ranks see nothing, and the next daemon's plan as soon as it is there."""
    board.post(1, b"old")
    code = """
import sys
from eplb_async.shm import board as module
board = module.PlanBoard.open(sys.argv[1], 3)
class Halting:
    def __getitem__(self, key): return self
    def __setitem__(self, key, value):
        print("writing", flush=True)
        sys.stdin.read()
board._plan = Halting()
board.post(2, b"half")
"""
    with running(code, group) as daemon:
        assert line_of(daemon) == "writing"
        assert board.read() is None
        kill(daemon)
    assert board.read() is None
    assert board.sequence % 2 == 1
    PlanBoard.open(group, 3).post(3, b"whole")
    assert board.read() == Posted(3, plan_digest(b"whole"), b"whole")


class Overtaken(PlanBoard):
    """A reader that is overtaken by a writer right after it has copied the plan."""

    writer: PlanBoard

    def overtake(self) -> None:
        """From now on."""
        load = self._atomics.fence_then_load

        def late(address: int) -> int:
            self.writer.post(9, b"newer")
            return load(address)

        self._atomics = self._atomics._replace(fence_then_load=late)


def test_a_reader_that_is_overtaken_sees_nothing(board: PlanBoard, group: str) -> None:
    """A plan that was rewritten while it was copied is not returned, whole or torn."""
    board.post(1, b"a plan")
    reader = Overtaken.open(group, 3)
    assert isinstance(reader, Overtaken)
    reader.writer = board
    reader.overtake()
    assert reader.read() is None


@pytest.mark.parametrize("place", [*range(128, 160), *range(192, 198)])
def test_damaged_bytes_are_found(board: PlanBoard, place: int) -> None:
    """Any damaged byte of the plan, of its generation, length, digest or checksum is PlanInvalid."""
    board.post(5, b"a plan")
    data = board.segment.array(np.uint8, (200,))
    for flip in (1, 0x80, 0xFF):
        data[place] ^= flip
        with pytest.raises(PlanInvalid, match="is damaged"):
            board.read()
        data[place] ^= flip
    assert board.read() is not None


def test_plans_up_to_the_capacity(board: PlanBoard) -> None:
    """A plan as large as the board fits, one byte more is refused and the plan before stays."""
    data = bytes(board.capacity)
    board.post(1, data)
    with pytest.raises(PlanInvalid, match="does not fit a board of"):
        board.post(2, data + b"\0")
    assert board.read() == Posted(1, plan_digest(data), data)


def test_abort_only_grows(board: PlanBoard) -> None:
    """A lower abort after a higher one changes nothing, and no abort changes the plan."""
    board.post(4, b"a plan")
    sequence = board.sequence
    for order, expected in ((2, 2), (5, 5), (3, 5), (5, 5), (6, 6)):
        board.order_abort(order)
        assert board.abort == expected
    assert board.sequence == sequence


def test_other_incarnations_are_refused(board: PlanBoard, group: str, make_group: Callable[[str], str]) -> None:
    """A board of another incarnation is not read; one that nobody made is missing."""
    with pytest.raises(SegmentRefused, match="found incarnation 3, needed incarnation 4"):
        PlanBoard.open(group, 4)
    with pytest.raises(SegmentMissing):
        PlanBoard.open(make_group("none"), 3)
    board.close()
    assert PlanBoard.open(group, 3).read() is None

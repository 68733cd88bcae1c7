"""The live placement: rows and versions of one moment."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from eplb_async.core.errors import SegmentMissing, SegmentRefused
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.shm.live import LivePlacement
from tests.shm.processes import kill, line_of, run_code, running

SPEC = MoESpec(num_layers=3, num_experts=15, num_redundant=2, num_ranks=1)
ROW = np.arange(17, dtype=np.int32)[::-1] - 1


@pytest.fixture
def live(group: str) -> Iterator[LivePlacement]:
    """A new one of incarnation 3 from the initial placement."""
    live = LivePlacement.create(group, SPEC, initial_placement(SPEC), 3)
    yield live
    live.segment.unlink()


def test_it_starts_from_what_was_loaded(live: LivePlacement) -> None:
    """All rows as given, all versions 0."""
    found = live.read()
    assert found is not None
    assert found[0].tolist() == initial_placement(SPEC).tolist()
    assert found[1].tolist() == [0, 0, 0]


def test_commits_replace_rows(live: LivePlacement, group: str) -> None:
    """Each commit changes its layer's row and version, and nothing else, for every reader; what was read stays."""
    reader = LivePlacement.open(group, SPEC, 3)
    before = reader.read()
    live.commit(1, ROW, 77)
    live.commit(2, ROW[::-1], 78)
    live.commit(1, ROW + 1, 79)
    found = reader.read()
    assert before is not None
    assert found is not None
    rows_LP = initial_placement(SPEC)
    assert before[0].tolist() == rows_LP.tolist()
    rows_LP[1], rows_LP[2] = ROW + 1, ROW[::-1]
    assert found[0].tolist() == rows_LP.tolist()
    assert found[1].tolist() == [0, 79, 78]


def test_another_process_reads(live: LivePlacement, group: str) -> None:
    """A new daemon adopts the state without asking."""
    live.commit(2, ROW, 5)
    code = """
import sys
from eplb_async.core.spec import MoESpec
from eplb_async.shm.live import LivePlacement
live = LivePlacement.open(sys.argv[1], MoESpec(num_layers=3, num_experts=15, num_redundant=2, num_ranks=1), 3)
rows, versions = live.read()
print(rows[2].tolist(), versions.tolist())
"""
    assert run_code(code, group) == f"{ROW.tolist()} [0, 0, 5]"


def test_layout(live: LivePlacement) -> None:
    """The sequence, then whole lines for each layer, version before row: the drawing in the module, byte by byte."""
    live.commit(1, ROW, 77)
    words = live.segment.array(np.int64, (8 + 3 * 16,))
    assert words[0] == 2
    assert words[[8, 24, 40]].tolist() == [0, 77, 0]
    assert live.segment.array(np.int32, (17,), 64 + 128 + 8).tolist() == ROW.tolist()


def test_a_row_that_is_being_written_is_not_seen(live: LivePlacement) -> None:
    """While the sequence is odd there is nothing; the next commit goes on from that number, and all is well again."""
    live.commit(0, ROW, 1)
    words = live.segment.array(np.int64, (1,))
    words[0] = 3
    assert live.read() is None
    live.commit(0, ROW + 1, 2)
    assert words[0] == 4
    found = live.read()
    assert found is not None
    assert found[0][0].tolist() == (ROW + 1).tolist()


def test_a_writer_killed_in_the_middle(live: LivePlacement, group: str) -> None:
    """Kill -9 between row and version: readers see nothing rather than a row with another's version."""
    code = """
import sys, numpy as np
from eplb_async.core.spec import MoESpec
from eplb_async.shm.live import LivePlacement
live = LivePlacement.open(sys.argv[1], MoESpec(num_layers=3, num_experts=15, num_redundant=2, num_ranks=1), 3)
class Halting:
    def __setitem__(self, key, value):
        print("writing", flush=True)
        sys.stdin.read()
live._version_L = Halting()
live.commit(1, np.zeros(17, dtype=np.int32), 9)
"""
    with running(code, group) as writer:
        assert line_of(writer) == "writing"
        assert live.read() is None
        kill(writer)
    assert live.read() is None


def test_a_reader_that_is_overtaken_reads_again(live: LivePlacement, group: str) -> None:
    """A copy during which a row was committed is thrown away; the next one is returned."""
    reader = LivePlacement.open(group, SPEC, 3)
    load = reader._atomics.fence_then_load
    times: list[int] = []

    def late(address: int) -> int:
        if len(times) < 3:
            live.commit(0, ROW + len(times), 10 + len(times))
            times.append(address)
        return load(address)

    reader._atomics = reader._atomics._replace(fence_then_load=late)
    found = reader.read()
    assert found is not None
    assert found[0][0].tolist() == (ROW + 2).tolist()
    assert found[1].tolist() == [12, 0, 0]


def test_what_does_not_fit_is_refused(live: LivePlacement, group: str, make_group: Callable[[str], str]) -> None:
    """Another incarnation, a larger model, and a name that nobody made."""
    with pytest.raises(SegmentRefused, match="found incarnation 3, needed incarnation 4"):
        LivePlacement.open(group, SPEC, 4)
    with pytest.raises(SegmentRefused, match="at least"):
        LivePlacement.open(group, MoESpec(num_layers=300, num_experts=15, num_redundant=2, num_ranks=1), 3)
    with pytest.raises(SegmentMissing):
        LivePlacement.open(make_group("none"), SPEC, 3)
    live.close()

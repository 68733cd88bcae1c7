"""A plan goes to the board only when the ranks are done with the one before, and what came of it is told right."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from eplb_async.core.clock import SystemClock
from eplb_async.core.errors import InternalError
from eplb_async.core.plan import Plan, PlanEntry, counter, encode_plan
from eplb_async.runtime.publisher import Publisher
from eplb_async.shm.words import Word
from tests.runtime.stand_in import StandInGroup

__all__: list[str] = []

Make = Callable[..., StandInGroup]


def words(ranks: StandInGroup) -> list[Word]:
    """The newest of every rank."""
    return [word for rank in range(ranks.words.num_ranks) if (word := ranks.words.newest(rank)) is not None]


def publisher_of(ranks: StandInGroup) -> Publisher:
    """A publisher that adopts the group as it stands."""
    return Publisher(ranks.board, ranks.live, words(ranks), SystemClock())


def swaps(ranks: StandInGroup, generation: int, num_entries: int = 3) -> Plan:
    """A plan that swaps two slots of one layer after the other."""
    entries = []
    for layer in range(num_entries):
        row_P = ranks.rows_LP[layer].copy()
        row_P[[0, 1]] = row_P[[1, 0]]
        entries.append(PlanEntry(layer=layer, base_version=0, slots=row_P.tobytes(), moves=b""))
    return Plan(incarnation=1, generation=generation, entries=entries)


def test_plan_is_followed_to_its_end(stand_in: Make) -> None:
    """Published at the ranks' generation; progress grows; the end says finished; rows and versions are adopted."""
    ranks = stand_in()
    ranks.step()
    publisher = publisher_of(ranks)
    publisher.publish(swaps(ranks, 1), words(ranks))
    progress, end = [], None
    while end is None:
        ranks.step()
        end = publisher.observe(words(ranks))
        if publisher.active is not None:
            progress.append((publisher.active.staged, publisher.active.committed))
    assert end.finished
    assert end.num_committed == 3
    assert end.publish_to_first_stage_s is not None
    assert progress == sorted(progress)
    assert publisher.version_L.tolist() == [counter(1, 1), counter(1, 2), counter(1, 3)]
    np.testing.assert_array_equal(publisher.rows_LP, ranks.rows_LP)
    assert publisher.may_publish(words(ranks)) == 2


@pytest.mark.parametrize(
    "change", [{"committed": counter(1, 1)}, {"staged": counter(1, 1)}, {"committed": counter(2, 0)}]
)
def test_nothing_is_published_before_all_ranks_are_quiet(stand_in: Make, change: dict[str, int]) -> None:
    """One rank that is in the middle, or already further than the others, holds the board back."""
    ranks = stand_in()
    ranks.step()
    publisher = publisher_of(ranks)
    newest = words(ranks)
    newest[2] = newest[2]._replace(**change)
    assert publisher.may_publish(newest) is None
    with pytest.raises(InternalError, match="may not be published"):
        publisher.publish(swaps(ranks, 1), newest)


def test_board_is_not_rewritten_before_every_rank_has_committed(stand_in: Make) -> None:
    """While one rank's committed does not cover the plan on the board, there is no next one (I13)."""
    ranks = stand_in()
    ranks.step()
    publisher, late = publisher_of(ranks), words(ranks)[3]
    publisher.publish(swaps(ranks, 1), words(ranks))
    for _ in range(10):
        ranks.step()
        newest = [*words(ranks)[:3], late]
        assert publisher.observe(newest) is None
        assert publisher.may_publish(newest) is None
    assert publisher.observe(words(ranks)) is not None
    assert publisher.may_publish(words(ranks)) == 2


def test_aborted_plan_is_told_as_dropped_with_what_was_committed(stand_in: Make) -> None:
    """An abort after some commits: dropped, with their number from the live versions; the next generation is the ranks'."""
    ranks = stand_in()
    ranks.step()
    publisher = publisher_of(ranks)
    publisher.publish(swaps(ranks, 1), words(ranks))
    while ranks.decided < counter(1, 1):
        ranks.step()
        assert publisher.observe(words(ranks)) is None
    publisher.abort("too slow")
    end = None
    while end is None:
        assert publisher.may_publish(words(ranks)) is None
        ranks.step()
        end = publisher.observe(words(ranks))
    assert not end.finished
    assert end.why == "too slow"
    assert 1 <= end.num_committed < 3
    assert publisher.may_publish(words(ranks)) == 2


def test_plan_of_an_earlier_daemon_is_aborted(stand_in: Make) -> None:
    """A daemon that finds a plan on the board whose generation is not covered aborts it, and then may publish (I11)."""
    ranks = stand_in(stuck=True)
    ranks.step()
    ranks.board.post(1, encode_plan(swaps(ranks, 1)))
    for _ in range(3):
        ranks.step()
    publisher = publisher_of(ranks)
    assert ranks.board.abort == 1
    assert publisher.may_publish(words(ranks)) is None
    for _ in range(3):
        ranks.step()
        publisher.observe(words(ranks))
    assert publisher.may_publish(words(ranks)) == 2


def test_finished_plan_of_an_earlier_daemon_is_left_alone(stand_in: Make) -> None:
    """A plan that all ranks have committed needs no abort, and does not hold the next one back."""
    ranks = stand_in()
    ranks.step()
    first = publisher_of(ranks)
    first.publish(swaps(ranks, 1), words(ranks))
    while first.observe(words(ranks)) is None:
        ranks.step()
    second = publisher_of(ranks)
    assert ranks.board.abort == 0
    assert second.may_publish(words(ranks)) == 2


def test_damaged_board_is_aborted(stand_in: Make) -> None:
    """A plan that cannot be read has no generation: the ranks' own is aborted, so that nothing of it can run."""
    ranks = stand_in()
    ranks.step()
    ranks.board.post(1, encode_plan(swaps(ranks, 1)))
    ranks.board._plan[3] ^= 0xFF
    publisher = publisher_of(ranks)
    assert ranks.board.abort == 1
    # a plan published now would be dropped at once
    assert publisher.may_publish(words(ranks)) is None


@pytest.mark.parametrize("table", [b"\0" * 12, b"\0" * 7])
def test_plan_of_an_earlier_daemon_with_wrong_tables_is_no_harm(stand_in: Make, table: bytes) -> None:
    """A daemon must not die of what it finds on a board, each time it starts."""
    ranks = stand_in()
    ranks.step()
    plan = swaps(ranks, 1)
    plan = msgspec.structs.replace(plan, entries=[msgspec.structs.replace(plan.entries[0], table=table, count=b"x")])
    ranks.board.post(1, encode_plan(plan))
    ranks.live.commit(0, ranks.rows_LP[0], counter(1, 1))
    publisher = publisher_of(ranks)
    assert publisher.dispatch.unknown == [0]


@pytest.mark.parametrize("bit", [4, 41, 62, 63])
def test_damaged_abort_word_is_repaired(stand_in: Make, bit: int) -> None:
    """An abort of a generation that has not come cannot be a daemon's: it holds nothing back, now or after a restart."""
    ranks = stand_in()
    ranks.step()
    publisher = publisher_of(ranks)
    damaged = ranks.board.segment.array(np.uint64, (9,))
    damaged[8] ^= np.uint64(1 << bit)
    assert publisher.may_publish(words(ranks)) == 1
    assert ranks.board.abort == 0
    damaged[8] ^= np.uint64(1 << bit)
    assert publisher_of(ranks).may_publish(words(ranks)) == 1


def test_board_of_a_generation_that_has_not_come_holds_nothing_back(stand_in: Make) -> None:
    """No rank can hold such a plan: the next one takes its place."""
    ranks = stand_in()
    ranks.step()
    ranks.board.post(9, encode_plan(swaps(ranks, 9)))
    publisher = publisher_of(ranks)
    assert publisher.may_publish(words(ranks)) == 1
    assert ranks.board.abort == 0

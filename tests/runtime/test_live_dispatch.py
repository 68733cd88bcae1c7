"""What a daemon knows of the live dispatch tables: all of its own plans, the plan on the board, and no more."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from eplb_async.core.clock import SystemClock
from eplb_async.core.placement import initial_placement
from eplb_async.core.plan import Plan, PlanEntry, counter, encode_plan
from eplb_async.core.score import even_share, rank_load, table_share
from eplb_async.core.spec import MoESpec
from eplb_async.policies.registry import run_dispatch
from eplb_async.runtime.live_dispatch import LiveDispatch
from eplb_async.runtime.publisher import Publisher
from tests.runtime.stand_in import StandInGroup

__all__: list[str] = []

SPEC = MoESpec(num_layers=3, num_experts=16, num_ranks=4, num_redundant=4)
ROWS = initial_placement(SPEC)
EVEN = even_share(ROWS, SPEC.num_experts)


def weighted_entry(layer: int, base_version: int = 0) -> PlanEntry:
    """New tables for the initial row, fitted to some load, without a move."""
    windows_TLE = np.ones((1, 3, 16))
    windows_TLE[:, :, 1:4] += [0.5, 1, 1.5]
    windows_TLE[:, :, 4] = 4 + np.arange(3)  # rank 0 has it, and shares experts 0 to 3 with rank 3
    fitted = run_dispatch("any", windows_TLE, ROWS, SPEC, {"dispatch": "weighted"})
    assert fitted is not None
    assert not fitted.even_L[layer]
    table, count = fitted.table_LEK[layer].tobytes(), fitted.count_LE[layer].tobytes()
    return PlanEntry(layer, base_version, ROWS[layer].tobytes(), b"", table, count)


def share_of(entry: PlanEntry) -> Any:
    """The shares of its tables."""
    table_EK = np.frombuffer(entry.table, dtype="<i4").reshape(SPEC.num_experts, SPEC.max_replicas)
    return table_share(table_EK, np.frombuffer(entry.count, dtype="<i4"), SPEC.num_slots)


def plan_of(*entries: PlanEntry, generation: int = 1, incarnation: int = 1) -> Plan:
    """A plan of these."""
    return Plan(incarnation=incarnation, generation=generation, entries=list(entries))


def versions(*values: int) -> Any:
    """Of the layers."""
    return np.array(values, dtype=np.int64)


def test_tables_come_with_the_versions_of_a_known_plan() -> None:
    """Committed entries count, those after them do not; the array is another one after each change, and only then."""
    plan = plan_of(weighted_entry(0), weighted_entry(2), weighted_entry(1))
    live = LiveDispatch(SPEC, ROWS, versions(0, 0, 0), None)
    shares = [live.share_LP]
    live.advance(ROWS, versions(counter(1, 1), 0, counter(1, 2)), plan)
    shares.append(live.share_LP)
    first = shares[1]
    assert shares[0] is None
    assert first is not None
    for layer, expected in enumerate((share_of(plan.entries[0]), EVEN[1], share_of(plan.entries[1]))):
        np.testing.assert_allclose(first[layer], expected)
    live.advance(ROWS, versions(counter(1, 1), 0, counter(1, 2)), plan)
    assert live.share_LP is first
    live.advance(ROWS, versions(counter(1, 1), counter(1, 3), counter(1, 2)), plan)
    assert live.share_LP is not first
    assert live.unknown == []
    assert live.to_renew(weighted=True) == []


def test_an_entry_without_table_is_even_again() -> None:
    """A layer whose new entry has no table, under another row: its shares are those of an even split of that row."""
    moved_P = np.roll(ROWS[0], 1)
    live = LiveDispatch(
        SPEC, ROWS, versions(counter(1, 1), counter(1, 2), 0), plan_of(weighted_entry(0), weighted_entry(1))
    )
    rows_LP = np.stack([moved_P, ROWS[1], ROWS[2]])
    entry = PlanEntry(0, counter(1, 1), moved_P.tobytes(), b"")
    live.advance(rows_LP, versions(counter(2, 1), counter(1, 2), 0), plan_of(entry, generation=2))
    assert live.share_LP is not None
    np.testing.assert_allclose(live.share_LP[0], even_share(moved_P[None], SPEC.num_experts)[0])
    np.testing.assert_allclose(live.share_LP[1], share_of(weighted_entry(1)))


@pytest.mark.parametrize("generation", [0, 3, 1])
def test_what_cannot_be_told_is_counted_as_even_and_renewed(generation: int) -> None:
    """A new daemon knows version 0 and the plan on the board; other layers are unknown, to be set anew if tables are to be
    expected: asked for, or in that plan.
    """
    on_board = plan_of(weighted_entry(1), generation=generation) if generation else None
    live = LiveDispatch(SPEC, ROWS, versions(counter(2, 1), counter(3, 1), 0), on_board)
    known = generation == 3
    assert live.unknown == ([0] if known else [0, 1])
    assert live.to_renew(weighted=True) == live.unknown
    assert live.to_renew(weighted=False) == (live.unknown if on_board else [])
    if known:
        assert live.share_LP is not None
        np.testing.assert_allclose(live.share_LP[1], share_of(weighted_entry(1)))
        np.testing.assert_allclose(live.share_LP[0], EVEN[0])
    else:
        assert live.share_LP is None
    live.advance(
        ROWS, versions(counter(4, 1), counter(4, 2), 0), plan_of(weighted_entry(0), weighted_entry(1), generation=4)
    )
    assert live.unknown == []


def publisher_of(ranks: StandInGroup) -> Publisher:
    """A daemon's publisher for the group, as it is at its start."""
    words = [ranks.words.newest(rank) for rank in range(SPEC.num_ranks)]
    return Publisher(ranks.board, ranks.live, [word for word in words if word is not None], SystemClock())


def follow(publisher: Publisher, ranks: StandInGroup, steps: int) -> None:
    """Step the ranks, and look after each."""
    for _ in range(steps):
        ranks.step()
        words = [ranks.words.newest(rank) for rank in range(SPEC.num_ranks)]
        publisher.observe([word for word in words if word is not None])


def test_publisher_knows_the_tables_of_its_plans_and_its_successor_those_on_the_board(
    stand_in: Callable[..., StandInGroup],
) -> None:
    """Refits without moves are committed like any entry; a second daemon reads the last plan's tables off the board, and
    layers of plans before it are unknown to it.
    """
    ranks = stand_in()
    for _ in range(4):
        ranks.step()
    first = publisher_of(ranks)
    for generation, entries in ((1, [weighted_entry(2)]), (2, [weighted_entry(0), weighted_entry(1)])):
        words = [ranks.words.newest(rank) for rank in range(SPEC.num_ranks)]
        first.publish(plan_of(*entries, generation=generation), [word for word in words if word is not None])
        follow(first, ranks, 12)
        assert first.active is None
    expected_LP = np.stack([share_of(weighted_entry(layer)) for layer in range(3)])
    assert first.dispatch.share_LP is not None
    np.testing.assert_allclose(first.dispatch.share_LP, expected_LP)
    second = publisher_of(ranks)
    assert second.dispatch.unknown == [2]
    assert second.dispatch.share_LP is not None
    np.testing.assert_allclose(second.dispatch.share_LP[:2], expected_LP[:2])
    np.testing.assert_allclose(second.dispatch.share_LP[2], EVEN[2])
    load_TLR = rank_load(np.ones((1, 3, 16)), ROWS, SPEC.topology, second.dispatch.share_LP)
    np.testing.assert_allclose(load_TLR.sum(axis=-1), 16)


@pytest.mark.parametrize(("generation", "incarnation"), [(0, 1), (1, 7)])
def test_a_plan_on_the_board_that_is_none_of_ours_is_not_believed(
    stand_in: Callable[..., StandInGroup], generation: int, incarnation: int
) -> None:
    """Bytes that are no plan, or a plan of another incarnation: nothing is known from them, not even that there may be
    tables in a layer whose version is of another plan; and the daemon starts.
    """
    ranks = stand_in()
    for _ in range(4):
        ranks.step()
    ranks.live.commit(1, ROWS[1], counter(1, 5))
    plan = plan_of(weighted_entry(0), incarnation=incarnation)
    ranks.board.post(1, encode_plan(plan) if generation else b"\xc1 garbage")
    publisher = publisher_of(ranks)
    assert publisher.dispatch.unknown == [1]
    assert publisher.dispatch.to_renew(weighted=False) == []
    assert publisher.dispatch.share_LP is None

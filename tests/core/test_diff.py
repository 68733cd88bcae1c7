"""From placement to placement: what stays, what is committed together, and where rows come from."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from eplb_async.core.diff import aligned_target, commit_rows, least_staging_rows, moves_between
from eplb_async.core.errors import InternalError, SettingError
from eplb_async.core.placement import EMPTY, validate_placement
from eplb_async.core.spec import Topology
from tests.core.placements import Case, cases

IntArray = NDArray[np.int32]


def ranks_of(row_P: IntArray, topology: Topology) -> list[list[int]]:
    """The contents of each rank."""
    rows: list[list[int]] = row_P.reshape(topology.num_ranks, -1).tolist()
    return rows


def incoming(before_P: IntArray, after_P: IntArray, topology: Topology) -> list[int]:
    """Rows that each rank receives."""
    arrives = (before_P != after_P) & (after_P != EMPTY)
    counts: list[int] = arrives.reshape(topology.num_ranks, -1).sum(axis=1).tolist()
    return counts


def test_worked_example() -> None:
    """The module's example: rank 0 keeps 1, slot 0 gets 2 from slot 2, slot 2 gets 0 from slot 3 of its own rank."""
    topology = Topology(num_ranks=2, slots_per_rank=2)
    current = np.array([0, 1, 2, 0], dtype=np.int32)
    target = aligned_target(current, np.array([1, 2, 0, 0], dtype=np.int32), topology)
    assert target.tolist() == [2, 1, 0, 0]
    moves = moves_between(current, target, topology, np.zeros(2, dtype=np.int64))
    assert sorted(moves.tolist()) == [[0, 3, 2], [2, 2, 0]]


@given(cases())
def test_aligned_target_keeps_what_can_stay(case: Case) -> None:
    """Each rank holds the same experts as in the target, and as many slots as can be keep theirs."""
    topology, (current_P, target_P) = case.spec.topology, case.rows
    before = (current_P.copy(), target_P.copy())
    result_P = aligned_target(current_P, target_P, topology)
    assert result_P.dtype == np.int32
    ranks = zip(*(ranks_of(row, topology) for row in (current_P, target_P, result_P)), strict=True)
    for current, target, result in ranks:
        assert Counter(result) == Counter(target)
        kept = Counter(new for old, new in zip(current, result, strict=True) if old == new)
        assert kept == Counter(current) & Counter(target)
    assert np.array_equal(before, (current_P, target_P))


@given(case=cases(most_slots=6), data=st.data(), align=st.booleans())
def test_commit_rows_lead_to_the_target_by_valid_placements(case: Case, data: st.DataObject, align: bool) -> None:
    """Every row is valid (each expert in 1..K slots), no rank receives more than its staging rows, the last is the target.

    Each brings some slot to its target for good, so there are at most P; one is enough when all fits. Every row can be
    moved to from the one before, since each expert has a live source.
    """
    spec, (current_P, target_P) = case.spec, case.rows
    topology = spec.topology
    target_P = aligned_target(current_P, target_P, topology) if align else target_P
    staging_rows = data.draw(st.integers(least_staging_rows(topology), topology.slots_per_rank))
    rows = commit_rows(current_P, target_P, topology, staging_rows)
    before_P = current_P
    sent_R = np.zeros(topology.num_ranks, dtype=np.int64)
    for row_P in rows:
        validate_placement(row_P[None], spec)
        assert max(incoming(before_P, row_P, topology)) <= staging_rows
        settled = before_P == target_P
        assert (row_P[settled] == target_P[settled]).all()
        assert np.count_nonzero(row_P == target_P) > np.count_nonzero(settled)
        moves_between(before_P, row_P, topology, sent_R)
        before_P = row_P
    assert np.array_equal(before_P, target_P)
    if max(incoming(current_P, target_P, topology)) <= staging_rows:
        assert len(rows) == int(not np.array_equal(current_P, target_P))


def test_a_cycle_that_does_not_fit_is_cut() -> None:
    """No redundancy, two staging rows: three slots of one rank rotate by a swap and then the rest."""
    topology = Topology(num_ranks=1, slots_per_rank=3, max_replicas=1)
    rows = commit_rows(np.array([0, 1, 2], np.int32), np.array([1, 2, 0], np.int32), topology, 2)
    assert [row.tolist() for row in rows] == [[1, 0, 2], [1, 2, 0]]


def test_no_row_between_has_more_replicas_than_a_dispatch_row_holds() -> None:
    """Experts 0 and 3 both have their two copies, before and after; taking slots one by one would make a third."""
    topology = Topology(num_ranks=3, slots_per_rank=4, max_replicas=2)
    current_P = np.array([0, -1, 1, 3, -1, 4, 6, 1, 0, 2, 5, 2], dtype=np.int32)
    target_P = np.array([3, 6, 1, 2, -1, -1, 5, 4, 0, 2, 1, 3], dtype=np.int32)
    for target in (target_P, np.array([4, 6, 5, 2, -1, -1, 3, 1, 0, 3, 1, 0], dtype=np.int32)):
        for row_P in commit_rows(current_P, target, topology, 3):
            assert np.bincount(row_P[row_P >= 0]).max() <= 2


def test_commit_rows_need_two_staging_rows() -> None:
    """With one row two slots of a rank could never swap; with one slot per rank one row is enough."""
    topology = Topology(num_ranks=2, slots_per_rank=2)
    row = np.arange(4, dtype=np.int32)
    with pytest.raises(SettingError, match="staging_rows is 1; splitting a plan needs 2"):
        commit_rows(row, row, topology, 1)
    assert least_staging_rows(Topology(num_ranks=4, slots_per_rank=1)) == 1
    assert commit_rows(row, row, Topology(num_ranks=4, slots_per_rank=1), 1) == []


@given(cases(most_ranks=6))
def test_moves_have_the_nearest_and_least_used_source(case: Case) -> None:
    """One move fills each changed slot from a live replica: own rank, else own node, else the rank that has sent least.

    The ranks' counts of sent rows go on from plan to plan and do not count what stays on a rank. Each rank pulls from
    its right-hand neighbour first, then from the next, itself before all.
    """
    topology, (current_P, next_P) = case.spec.topology, case.rows
    width, per_node = topology.slots_per_rank, topology.ranks_per_node
    sent_R = np.arange(topology.num_ranks, dtype=np.int64)[::-1] // 2
    sent = sent_R.tolist()
    moves = moves_between(current_P, next_P, topology, sent_R).tolist()
    changed = np.flatnonzero((current_P != next_P) & (next_P != EMPTY)).tolist()
    source_of = {destination: (expert, source) for expert, source, destination in moves}
    assert sorted(source_of) == changed
    assert len(moves) == len(changed)
    # sources are given in order of the slots
    for slot in changed:
        expert, source = source_of[slot]
        rank, other = slot // width, source // width
        assert next_P[slot] == current_P[source] == expert

        def distance(candidate: int, rank: int = rank) -> int:
            return 0 if candidate == rank else 1 if candidate // per_node == rank // per_node else 2

        holders = {int(holder) // width for holder in np.flatnonzero(current_P == expert)}
        nearest = min(map(distance, holders))
        assert distance(other) == nearest
        if nearest:
            assert sent[other] == min(sent[holder] for holder in holders if distance(holder) == nearest)
            sent[other] += 1
    assert sent_R.tolist() == sent
    for rank in range(topology.num_ranks):
        pulls = [(source // width - rank) % topology.num_ranks for _, source, slot in moves if slot // width == rank]
        assert pulls == sorted(pulls)


def test_sources_are_spread_over_replicas() -> None:
    """Six ranks want an expert that two ranks hold: each of the two sends three times."""
    topology = Topology(num_ranks=8, slots_per_rank=2)
    current_P = np.array([0, 1, 0, 2] + [3, 4] * 6, dtype=np.int32)
    next_P = current_P.copy()
    next_P[4::2] = 0
    next_P[4] = 3
    next_P[5] = 0
    sent_R = np.zeros(8, dtype=np.int64)
    moves_between(current_P, next_P, topology, sent_R)
    assert sent_R.tolist() == [3, 3, 0, 0, 0, 0, 0, 0]


def test_a_move_without_a_source_is_our_bug() -> None:
    """An expert that is nowhere cannot be moved."""
    with pytest.raises(InternalError, match="expert 9 has no live slot"):
        moves_between(
            np.zeros(2, np.int32), np.array([0, 9], np.int32), Topology(num_ranks=1, slots_per_rank=2), np.zeros(1, int)
        )

"""Staging: budgets, free rows, order, the wait for all ranks, and drops that drain."""

from collections.abc import Iterator
from typing import Any

import pytest

from eplb_async.core.config import HookSettings
from eplb_async.core.errors import TransferFailed
from eplb_async.core.plan import FIRST_COUNTER, counter
from eplb_async.rank.stager import Stager
from tests.rank.prepared import ROW_BYTES, HeldTransfer, held_transfer, prepared


@pytest.fixture
def transfer() -> Iterator[HeldTransfer]:
    """With four staging rows."""
    held = held_transfer(4)
    yield held
    held.close()


def stager_of(transfer: HeldTransfer, **fields: Any) -> Stager:
    """With a budget."""
    return Stager(transfer, HookSettings(**fields), lambda layer, expert: None)


def test_copies_are_issued_within_the_steps_budget(transfer: HeldTransfer) -> None:
    """By number and by bytes, but one row at least; what is left goes on in the next step."""
    stager = stager_of(transfer, copies_per_step=3, pull_bytes_per_step=2 * ROW_BYTES)
    stager.start(prepared((0, 2), (1, 2)))
    stager.issue(FIRST_COUNTER)
    assert len(transfer.pulls) == 2
    stager.issue(FIRST_COUNTER)
    assert [layer for layer, *_ in transfer.pulls] == [0, 0, 1, 1]
    assert (stager.rows_pulled, stager.bytes_pulled) == (4, 4 * ROW_BYTES)
    assert len({row for _, _, row, _ in transfer.pulls}) == 4


def test_at_least_one_row_is_issued(transfer: HeldTransfer) -> None:
    """A row that is larger than the budget would else never move."""
    stager = stager_of(transfer, pull_bytes_per_step=1)
    stager.start(prepared((0, 3)))
    stager.issue(FIRST_COUNTER)
    assert len(transfer.pulls) == 1


def test_a_smaller_budget_is_kept(transfer: HeldTransfer) -> None:
    """What pacing grants: whole rows only, none for nothing; a row above the limit goes only for all of it."""
    stager = stager_of(transfer, pull_bytes_per_step=3 * ROW_BYTES)
    stager.start(prepared((0, 4)))
    budgets = (0, ROW_BYTES - 1, ROW_BYTES + 1, 2 * ROW_BYTES)
    assert [stager.issue(FIRST_COUNTER, budget) for budget in budgets] == [0, 0, ROW_BYTES, 2 * ROW_BYTES]
    stager.finish()
    tight = stager_of(transfer, pull_bytes_per_step=ROW_BYTES - 2)
    tight.start(prepared((0, 4)))
    assert [tight.issue(FIRST_COUNTER, ROW_BYTES - at) for at in (4, 3, 2)] == [0, 0, ROW_BYTES]


def test_entries_without_pulls_need_no_budget(transfer: HeldTransfer) -> None:
    """A rank that pauses does not hold others up for nothing."""
    stager = stager_of(transfer)
    stager.start(prepared((0, 0), (1, 0)))
    stager.issue(FIRST_COUNTER, 0)
    assert stager.poll() == (2, None)


def test_bytes_in_flight_are_bounded(transfer: HeldTransfer) -> None:
    """What has not ended counts, over steps and entries; at least one row is on its way."""
    stager = stager_of(transfer, pull_bytes_in_flight=2 * ROW_BYTES + 1)
    stager.start(prepared((0, 3), (1, 1)))
    stager.issue(FIRST_COUNTER)
    stager.issue(FIRST_COUNTER)
    assert len(transfer.pulls) == 2
    transfer.pulls[0][-1].done = True
    stager.poll()
    assert stager.bytes_in_flight == ROW_BYTES
    stager.issue(FIRST_COUNTER)
    assert len(transfer.pulls) == 3
    transfer.end_pulls()
    stager.poll()
    assert stager.bytes_in_flight == 0
    stager.drop([])
    small = stager_of(transfer, pull_bytes_in_flight=1)
    small.start(prepared((0, 2)))
    small.issue(FIRST_COUNTER)
    small.issue(FIRST_COUNTER)
    assert len(transfer.pulls) == 4


def test_copies_that_have_ended_make_room_whatever_their_entry(transfer: HeldTransfer) -> None:
    """A later entry that is done does not count as in flight while the first one still waits."""
    stager = stager_of(transfer)
    stager.start(prepared((0, 1), (1, 2)))
    stager.issue(FIRST_COUNTER)
    for *_, completion in transfer.pulls[1:]:
        completion.done = True
    assert stager.poll() == (0, None)
    assert stager.bytes_in_flight == ROW_BYTES


def test_entries_count_as_staged_in_order(transfer: HeldTransfer) -> None:
    """I1: a later entry that is complete waits for those before it; an entry without pulls is complete at once."""
    stager = stager_of(transfer)
    stager.start(prepared((0, 1), (1, 1), (1, 0)))
    stager.issue(counter(1, 3))
    assert stager.poll() == (0, None)
    transfer.pulls[1][-1].done = True
    assert stager.poll() == (0, None)
    transfer.pulls[0][-1].done = True
    assert stager.poll() == (3, None)


def test_a_layers_second_entry_waits_for_all_ranks(transfer: HeldTransfer) -> None:
    """I12: it is issued once every rank has committed the first, and entries behind it wait too."""
    stager = stager_of(transfer)
    stager.start(prepared((0, 1), (0, 1), (1, 1)))
    stager.issue(counter(1, 0))
    assert len(transfer.pulls) == 1
    stager.issue(counter(1, 1))
    assert len(transfer.pulls) == 3


def test_an_entry_waits_for_free_rows(transfer: HeldTransfer) -> None:
    """I13: rows are free when the own commit has ended, not when it was issued."""
    stager = stager_of(transfer)
    stager.start(prepared((0, 3), (1, 2)))
    stager.issue(FIRST_COUNTER)
    transfer.end_pulls()
    assert stager.poll() == (1, None)
    assert [slot for _, slot in stager.take(1)] == [0, 1, 2]
    stager.issue(FIRST_COUNTER)
    assert len(transfer.pulls) == 3
    stager.release(1)
    stager.issue(FIRST_COUNTER)
    assert len(transfer.pulls) == 5


def test_a_failed_pull_is_reported_and_never_staged(transfer: HeldTransfer) -> None:
    """I5: the entry stays where it is until the drop."""
    stager = stager_of(transfer)
    stager.start(prepared((0, 1), (1, 1)))
    stager.issue(FIRST_COUNTER)
    transfer.pulls[1][-1].done = True
    transfer.pulls[0][-1].error = TransferFailed("broken")
    transfer.pulls[0][-1].done = True
    position, error = stager.poll()
    assert position == 0
    assert str(error) == "broken"
    assert stager.poll() == (0, None)


def test_a_drop_drains(transfer: HeldTransfer) -> None:
    """I5: pulls in flight keep their rows and show as orphaned until they end; what was staged is free at once."""
    stager = stager_of(transfer)
    stager.start(prepared((0, 1), (1, 2)))
    stager.issue(FIRST_COUNTER)
    transfer.pulls[0][-1].done = True
    stager.poll()
    stager.drop([])
    assert stager.orphaned
    assert not stager.idle
    stager.start(prepared((0, 3), generation=2))
    stager.issue(counter(2, 0))
    assert len(transfer.pulls) == 3
    transfer.end_pulls(TransferFailed("of a dropped plan: nobody's error"))
    assert stager.poll() == (0, None)
    assert stager._orphans == []
    stager.issue(counter(2, 0))
    assert len(transfer.pulls) == 6


def test_a_drop_keeps_the_rows_of_running_commits(transfer: HeldTransfer) -> None:
    """I13: they are read until the commit has ended."""
    stager = stager_of(transfer)
    stager.start(prepared((0, 2), (1, 2)))
    stager.issue(FIRST_COUNTER)
    transfer.end_pulls()
    stager.poll()
    stager.drop([1])
    stager.start(prepared((0, 3), generation=2))
    stager.issue(counter(2, 0))
    assert len(transfer.pulls) == 4
    stager.release(1)
    stager.issue(counter(2, 0))
    assert len(transfer.pulls) == 7


def test_pulls_that_do_not_end_are_given_up(transfer: HeldTransfer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the deadline they hold nothing back; the next plan has all rows, which are others."""
    stager = stager_of(transfer, drain_deadline_s=10.0, pull_bytes_in_flight=2 * ROW_BYTES)
    now_s, asked = 100.0, list[float]()

    def abandon() -> bool:
        asked.append(now_s)
        return True

    monkeypatch.setattr("eplb_async.rank.stager.time.monotonic", lambda: now_s)
    monkeypatch.setattr(transfer, "abandon", abandon)
    stager.start(prepared((0, 2)))
    stager.issue(FIRST_COUNTER)
    stager.drop([])
    now_s = 109.0
    stager.poll()
    assert stager.orphaned
    now_s = 111.0
    stager.poll()
    assert (stager.orphaned, stager.pulls_abandoned, stager.bytes_in_flight, asked) == (False, 2, 0, [111.0])
    stager.start(prepared((0, 2), (1, 2), generation=2))
    stager.issue(counter(2, 0))
    for *_, completion in transfer.pulls:
        completion.done = True
    assert stager.poll() == (1, None)
    stager.issue(counter(2, 0))
    assert len({row for _, _, row, _ in transfer.pulls[2:]}) == 4


def test_rows_of_a_running_commit_are_not_given_up(transfer: HeldTransfer, monkeypatch: pytest.MonkeyPatch) -> None:
    """I13: pulls are given up only when the commit of what was staged has ended."""
    stager = stager_of(transfer, drain_deadline_s=1e-9)
    monkeypatch.setattr(transfer, "abandon", lambda: True)
    stager.start(prepared((0, 2), (1, 2)))
    stager.issue(FIRST_COUNTER)
    for *_, completion in transfer.pulls[:2]:
        completion.done = True
    assert stager.poll() == (1, None)
    stager.drop([1])
    stager.poll()
    assert stager.orphaned
    stager.release(1)
    stager.poll()
    assert not stager.orphaned


def test_pulls_that_cannot_be_given_up_are_waited_for(transfer: HeldTransfer) -> None:
    """A transfer whose messages must all end (two-sided ones) keeps the next plan waiting."""
    stager = stager_of(transfer, drain_deadline_s=1e-9)
    stager.start(prepared((0, 1)))
    stager.issue(FIRST_COUNTER)
    stager.drop([])
    stager.poll()
    assert stager.orphaned
    transfer.end_pulls()
    stager.poll()
    assert stager.idle

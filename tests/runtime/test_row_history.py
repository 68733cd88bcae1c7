"""A record is folded with the row under which it was counted, or not at all."""

import numpy as np

from eplb_async.core.plan import Plan, PlanEntry, counter
from eplb_async.runtime.row_history import RowHistory

__all__: list[str] = []

START = np.array([[0, 1], [0, 1]], dtype=np.int32)
SWAPPED = np.array([1, 0], dtype=np.int32)
BACK = np.array([0, 1], dtype=np.int32)


def plan_of(*layers: int) -> Plan:
    """A plan of generation 1 that swaps the layers' slots, one after the other (a layer twice: back again)."""
    entries, seen = [], set()
    for layer in layers:
        row = BACK if layer in seen else SWAPPED
        entries.append(PlanEntry(layer=layer, base_version=0, slots=row.tobytes(), moves=b""))
        seen.add(layer)
    return Plan(incarnation=1, generation=1, entries=entries)


def history() -> RowHistory:
    """Two layers at the start of generation 1."""
    return RowHistory(START.copy(), np.zeros(2, dtype=np.int64), counter(1, 0))


def rows_at(rows: RowHistory, version: int) -> list[list[int]]:
    """What placement_at gives, as lists."""
    found = rows.placement_at(version)
    assert found is not None
    rows_LP: list[list[int]] = found[0].tolist()
    return rows_LP


def test_record_after_what_is_certain_waits() -> None:
    """A version beyond the least committed of all ranks cannot be told yet."""
    assert history().placement_at(counter(1, 1)) is None


def test_each_position_has_the_rows_committed_by_then() -> None:
    """A record of (1, k) sees entries 1..k, never a newer one, also where a layer has two entries."""
    rows, plan = history(), plan_of(0, 0, 1)
    live_LP = np.array([BACK, SWAPPED], dtype=np.int32)
    rows.advance(counter(2, 0), live_LP, np.array([counter(1, 2), counter(1, 3)]), plan)
    assert rows_at(rows, counter(1, 0)) == [[0, 1], [0, 1]]
    assert rows_at(rows, counter(1, 1)) == [[1, 0], [0, 1]]
    assert rows_at(rows, counter(1, 2)) == [[0, 1], [0, 1]]
    assert rows_at(rows, counter(2, 0)) == [[0, 1], [1, 0]]


def test_dropped_plan_counts_as_far_as_the_live_versions_say() -> None:
    """After a drop at entry 1 of 2 a record of (2, 0) sees the first entry's row and not the second's."""
    rows = history()
    live_LP = np.array([SWAPPED, BACK], dtype=np.int32)
    rows.advance(counter(2, 0), live_LP, np.array([counter(1, 1), 0]), plan_of(0, 1))
    assert rows_at(rows, counter(2, 0)) == [[1, 0], [0, 1]]


def test_rows_of_an_unknown_plan_leave_a_gap() -> None:
    """Somebody else's commit: before and after it rows are known, between the two looks they are not."""
    rows = history()
    live_LP = np.array([SWAPPED, BACK], dtype=np.int32)
    rows.advance(counter(2, 0), live_LP, np.array([counter(1, 5), 0]), None)
    assert rows_at(rows, counter(1, 0)) == [[0, 1], [0, 1]]
    between = rows.placement_at(counter(1, 3))
    assert between is not None
    assert between[1].tolist() == [False, True]
    assert rows_at(rows, counter(2, 0)) == [[1, 0], [0, 1]]


def test_record_older_than_the_snapshot_is_not_known() -> None:
    """A row whose version is newer than the record is never used."""
    rows = RowHistory(START, np.array([counter(1, 2), 0]), counter(2, 0))
    found = rows.placement_at(counter(1, 1))
    assert found is not None
    assert found[1].tolist() == [False, True]
    assert found[0][0].tolist() == [-1, -1]

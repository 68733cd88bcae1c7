"""Ranks of a replay pull, stage and commit as the hook does: in order, within budgets, lag steps after the words."""

import numpy as np

from eplb_async.core.config import HookSettings
from eplb_async.core.plan import Plan, PlanEntry
from eplb_async.runtime.replay_ranks import ReplayRanks

__all__: list[str] = []

SLOTS_PER_RANK = 4


def plan_of(*entries: tuple[int, list[int]]) -> Plan:
    """Entries of (layer, destination slots)."""
    made = []
    for layer, slots in entries:
        moves = np.array([[0, 0, slot] for slot in slots], dtype="<i4").reshape(-1, 3)
        made.append(PlanEntry(layer=layer, base_version=0, slots=b"", moves=moves.tobytes()))
    return Plan(incarnation=1, generation=1, entries=made)


def commits(
    plan: Plan, staging_rows: int = 4, step_us: float = 100.0, bytes_per_us: float = 1e9, **hook: int
) -> list[tuple[int, int]]:
    """(step, layer) of all commits; slots have 10 bytes, two ranks."""
    ranks = ReplayRanks(2, staging_rows, HookSettings(**hook), bytes_per_us)  # type: ignore[arg-type]
    ranks.publish(plan, SLOTS_PER_RANK, [10, 10, 10])
    seen = []
    for step in range(200):
        if entry := ranks.step(step * step_us):
            seen.append((step, entry.layer))
        if not ranks.busy:
            return seen
    raise AssertionError(f"not done: {seen}")


def test_lag_and_one_commit_a_step() -> None:
    """Pulled at step 0, arrived and told of at step 1, committed at 1 + lag; the next one a step later."""
    assert commits(plan_of((0, [0]), (1, [4]))) == [(3, 0), (4, 1)]
    assert commits(plan_of((0, [0]), (1, [4])), lag=1) == [(2, 0), (3, 1)]


def test_bytes_per_step() -> None:
    """A rank pulls so many bytes in a step, but at least a row: three rows of 10 within 5 bytes take three steps."""
    assert commits(plan_of((0, [0, 1, 2])), pull_bytes_per_step=5) == [(5, 0)]
    assert commits(plan_of((0, [0, 1, 2])), pull_bytes_per_step=20) == [(4, 0)]
    assert commits(plan_of((0, [0, 1, 2])), copies_per_step=2) == [(4, 0)]


def test_bandwidth_and_bytes_in_flight() -> None:
    """Rows arrive one after the other: 4 rows of 10 bytes at 0.05 bytes/us take 800 us; with one in flight they are asked for later."""
    assert commits(plan_of((0, [0, 1, 2, 3])), bytes_per_us=0.05) == [(10, 0)]
    assert commits(plan_of((0, [0, 1, 2, 3])), bytes_per_us=0.08, pull_bytes_in_flight=10) == [(10, 0)]


def test_staging_rows() -> None:
    """An entry waits for rows until the one before is committed; a rank without rows to pull waits for nobody."""
    assert commits(plan_of((0, [0, 1]), (1, [0, 1])), staging_rows=2) == [(3, 0), (6, 1)]
    assert commits(plan_of((0, [0, 1]), (1, [4, 5])), staging_rows=2) == [(3, 0), (4, 1)]


def test_a_layers_next_entry_waits_for_the_commit() -> None:
    """I12: it is pulled only in the step after the commit of the one before, though there were rows for it."""
    assert commits(plan_of((0, [0]), (0, [1]))) == [(3, 0), (7, 0)]

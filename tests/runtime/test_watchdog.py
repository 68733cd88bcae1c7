"""What the watchdog says of ranks, plans and the event loop."""

import asyncio
import os
import time

from eplb_async.core.plan import Plan, PlanEntry
from eplb_async.runtime.publisher import ActivePlan
from eplb_async.runtime.watchdog import LoopLag, gone_ranks, late_plan
from eplb_async.shm.layout import process_start
from eplb_async.shm.words import Member, MemberState

__all__: list[str] = []


def test_gone_ranks_are_named() -> None:
    """A dead, a left and a free rank are gone, each with its own sentence; a living one is not."""
    pid, start = os.getpid(), process_start(os.getpid())
    members = [
        Member(MemberState.READY, pid, start, 5),
        Member(MemberState.READY, pid, start + 1, 5),
        Member(MemberState.LEFT, 77, 1, 5),
        Member(MemberState.FREE, 0, 0, -1),
    ]
    assert gone_ranks(members) == {
        1: f"rank 1 (pid {pid}) is gone",
        2: "rank 2 (pid 77) has left",
        3: "rank 3 has not attached",
    }


def test_late_plan_is_late_once() -> None:
    """A plan is late after its deadline, with how far it came; an aborted one is not told again."""
    entry = PlanEntry(layer=0, base_version=0, slots=b"", moves=b"")
    active = ActivePlan(Plan(incarnation=1, generation=1, entries=[entry]), published_s=10.0)
    assert late_plan(None, 99.0, 5.0) == ""
    assert late_plan(active, 15.0, 5.0) == ""
    assert late_plan(active, 15.1, 5.0) == "not done after 5 s (0 of 1 entries staged, 0 committed)"
    active.abort_reason = "told"
    assert late_plan(active, 99.0, 5.0) == ""


async def test_blocked_loop_is_measured() -> None:
    """Something that holds the loop for 0.6 s shows as lag of about that."""
    lag = LoopLag()
    task = asyncio.create_task(lag.run())
    await asyncio.sleep(0.01)
    time.sleep(0.6)  # noqa: ASYNC251 - this is what is measured
    await asyncio.sleep(0.3)
    task.cancel()
    assert lag.worst_s > 0.15

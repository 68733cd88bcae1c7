"""What the daemon watches beside its work: ranks that are gone, plans that are late, its own event loop.

The watchdog stops nothing but plans: a rank that is gone is the group's own business (PeerLost), the daemon says so.
"""

import asyncio
import logging
from collections.abc import Sequence

from eplb_async.runtime.publisher import ActivePlan
from eplb_async.shm.words import Member, MemberState

__all__ = ["LoopLag", "gone_ranks", "late_plan"]

logger = logging.getLogger(__name__)

LAG_INTERVAL_S = 0.25
LAG_WARNING_S = 0.5
"""A loop that is held for longer loses records at 200 steps/s with the default ring."""


def gone_ranks(members: Sequence[Member]) -> dict[int, str]:
    """Ranks that do not take part any more, each with a sentence for people."""
    gone = {}
    for rank, member in enumerate(members):
        if member.state is MemberState.LEFT:
            gone[rank] = f"rank {rank} (pid {member.pid}) has left"
        elif member.state is MemberState.FREE:
            gone[rank] = f"rank {rank} has not attached"
        elif not member.alive:
            gone[rank] = f"rank {rank} (pid {member.pid}) is gone"
    return gone


def late_plan(active: ActivePlan | None, now_s: float, deadline_s: float) -> str:
    """Why an active plan must be aborted; "" if it need not be."""
    if active is None or active.abort_reason or now_s - active.published_s <= deadline_s:
        return ""
    done = f"{active.staged} of {len(active.plan.entries)} entries staged, {active.committed} committed"
    return f"not done after {deadline_s:g} s ({done})"


class LoopLag:
    """Measures how late the event loop runs what is due.

    Attributes:
        newest_s, worst_s: the last delay, and the greatest of the daemon's life.
    """

    def __init__(self) -> None:
        self.newest_s = self.worst_s = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self.newest_s = max(0.0, loop.time() - due)
            self.worst_s = max(self.worst_s, self.newest_s)
            if self.newest_s > LAG_WARNING_S:
                logger.warning("the event loop was held for %.2f s", self.newest_s)

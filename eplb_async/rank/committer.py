"""Commits: staged rows into live slots, then the maps, between two forwards. All ranks do the same one at the same step.

A commit is issued when it is decided and has ended when the device says so; on the CPU that is the same moment. Only
then are its staging rows free, and only then does the rank's `committed` count it.
"""

from collections import deque

from eplb_async.core.plan import counter
from eplb_async.rank.maps import Maps
from eplb_async.rank.plan_reader import PreparedPlan
from eplb_async.rank.stager import Stager
from eplb_async.rank.streams import Completion
from eplb_async.rank.transfer.base import Transfer
from eplb_async.shm.live import LivePlacement

__all__ = ["Committer"]


class Committer:
    """Commits of one rank. Only the thread that steps may call it.

    Attributes:
        num_commits: since attach.
    """

    def __init__(self, transfer: Transfer, maps: Maps, stager: Stager, live: LivePlacement | None) -> None:
        """`live` is given to the one rank of the node that writes the live placement."""
        self._transfer, self._maps, self._stager, self._live = transfer, maps, stager, live
        self._running: deque[tuple[int, int, Completion[None]]] = deque()
        self.num_commits = 0

    @property
    def running(self) -> list[int]:
        """Positions of commits that were issued and have not ended."""
        return [position for _, position, _ in self._running]

    def commit(self, plan: PreparedPlan, position: int) -> None:
        """Issue the commit of an entry that was decided."""
        entry = plan.entries[position - 1]
        version = counter(plan.generation, position)
        more = self._maps.commit(entry, version)
        done = self._transfer.commit(entry.layer, self._stager.take(position), more)
        if self._live is not None:
            self._live.commit(entry.layer, entry.slot_to_expert_P, version)
        self._running.append((plan.generation, position, done))
        self.num_commits += 1

    def poll(self) -> tuple[int, int] | None:
        """(generation, position) of the newest commit that has ended since the last call; its rows are released."""
        ended = None
        while self._running and self._running[0][2].done:
            generation, position, completion = self._running.popleft()
            if completion.error is not None:
                raise completion.error
            self._stager.release(position)
            ended = generation, position
        return ended

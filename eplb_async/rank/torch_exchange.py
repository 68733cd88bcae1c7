"""Words between nodes: one all-reduce of five numbers, posted every k steps and read at the same step by all ranks.

    step s, s mod k = 0    vector of the own word  --all-reduce, maximum-->  Reduced of step s
    step t                 acts on the vector of the last such s <= t - lag, in k steps on the same one

A group on several nodes decides from these vectors alone, ranks of one node too (design, I7): all see the same vector at
the same step, so all decide alike. That a vector is used for k steps changes nothing of that, and lets each of them commit
an entry: what it says stays true, since counters only grow, and a rank holds the plan that it said it held until
`decided` passes it, which all ranks know. An error that came after s is seen by all at the same later step, as with k = 1.

Least values are found by a maximum too: max(~x) = ~min(x), and ~ maps the 64-bit integers onto themselves in reverse
order, so nothing overflows, whatever bits a digest has (-x would, for the least one). So one reduction carries all:

    staged 7 and 9     ~7 = -8, ~9 = -10; the maximum is -8 = ~7: least staged 7

A rank starts the forward of step t after it has the vector of s > t - lag - k, so no rank is more than lag + k steps ahead.
The vector is copied at the post: there is no ring of records between nodes that could be overwritten.

The words also go into the node's segment, for its daemon. Nothing here reads them, except to name a rank that is missing.
"""

import time
import weakref
from collections import deque

import torch
from torch._C._distributed_c10d import ReduceOp, Work

from eplb_async.core.errors import InternalError, PeerLost
from eplb_async.core.plan import FIRST_COUNTER, NO_PLAN
from eplb_async.rank.exchange import ALIVE_CHECK_S, SLEEP_S, SPIN_S
from eplb_async.rank.meeting import GlooGroup, abort
from eplb_async.shm.layout import owner_alive
from eplb_async.shm.words import AgreementWords, MemberState, Reduced

__all__ = ["TorchDistExchange", "reduced_of", "vector_of"]

PROBE_TAG = 0xA1
LONGEST_CHECK_S = 1.0
DRAIN_S = 0.5
"""At a detach: ranks that stop after the same step have all posted the same vectors, and need so long at most for them."""


def vector_of(counters: tuple[int, int, int, int]) -> torch.Tensor:
    """What a rank puts into the maximum for its word (staged, committed, error, digest)."""
    staged, committed, error, digest = counters
    return torch.tensor([~staged, ~committed, error, ~digest, digest], dtype=torch.int64)


def reduced_of(vector: torch.Tensor) -> Reduced:
    """The reduced words of the maximum over all ranks."""
    staged, committed, error, least, greatest = vector.tolist()
    return Reduced(~staged, ~committed, error, ~least, greatest)


class TorchDistExchange:
    """An Exchange of ranks on several nodes. Only the thread that steps may call it."""

    def __init__(self, group: GlooGroup, words: AgreementWords, rank: int, deadline_s: float) -> None:
        """`group`: gloo, of all ranks, used by nothing else any more."""
        self._group, self._words, self._rank, self._deadline_s = group, words, rank, deadline_s
        self._every, self._local = words.info.reduce_every, words.info.ranks
        self._others = [other for other in range(words.num_ranks) if other != rank]
        self._remote = [other for other in self._others if other not in self._local]
        self._posted: deque[tuple[int, torch.Tensor, Work]] = deque()
        self._newest = Reduced(FIRST_COUNTER, FIRST_COUNTER, 0, NO_PLAN, NO_PLAN)
        self._newest_step = -self._every
        self._last = (FIRST_COUNTER, FIRST_COUNTER, 0, NO_PLAN)
        self._failed = False
        # an engine that ends without a detach must not wait for what is pending either
        self._abort = weakref.finalize(self, abort, group, self._others)

    def publish(self, step: int, counters: tuple[int, int, int, int]) -> None:
        """See Exchange; every k steps it posts an all-reduce.

        Raises:
            PeerLost: a connection is closed.
        """
        self._words.publish(self._rank, step, counters)
        self._last = counters
        if step % self._every:
            return
        vector = vector_of(counters)
        try:
            work = self._group.allreduce([vector], ReduceOp(ReduceOp.MAX))
        except RuntimeError as error:
            raise self._lost(step, 0.0, error) from error
        self._posted.append((step, vector, work))

    def repeat(self, step: int, collected: int) -> bool:
        """See Exchange. Waits, as `collect` does.

        Raises:
            PeerLost: as in `publish` and `collect`.
        """
        staged, committed, error, digest = self._last
        self.publish(step, self._last)
        return self.collect(collected) == Reduced(staged, committed, error, digest, digest)

    def collect(self, step: int) -> Reduced:
        """The reduced words of the last step up to `step` whose words were posted; waits for them alone.

        Raises:
            PeerLost: they did not come within the deadline, or a rank or its connection is gone.
        """
        due = step - step % self._every
        while self._newest_step < due:
            posted, vector, work = self._posted.popleft()
            if posted > due:
                raise InternalError(f"the words of step {due} were not posted")
            self._wait(posted, work)
            self._newest, self._newest_step = reduced_of(vector), posted
        return self._newest

    def close(self) -> None:
        """Let others have what was posted, and close all connections. Idempotent."""
        end = time.monotonic() + DRAIN_S
        while not self._failed and time.monotonic() < end and not all(work.is_completed() for *_, work in self._posted):
            time.sleep(SLEEP_S)
        self._failed = True
        self._abort()
        self._posted.clear()

    def _wait(self, step: int, work: Work) -> None:
        start = time.monotonic()
        pause_s = ALIVE_CHECK_S
        next_check = start + pause_s
        while not work.is_completed():
            now = time.monotonic()
            if now > next_check:
                self._check(step, work, now - start)
                pause_s = min(2 * pause_s, LONGEST_CHECK_S)
                next_check = now + min(pause_s, max(SLEEP_S, self._deadline_s - (now - start)))
            if now - start > SPIN_S:
                time.sleep(SLEEP_S)
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(step, time.monotonic() - start, error) from error

    def _check(self, step: int, work: Work, waited_s: float) -> None:
        """Give up if a rank is gone, or the time is over."""
        gone = self._gone()
        late = not gone and waited_s > self._deadline_s
        # its vector may have come right before it ended
        if (gone or late) and not work.is_completed():
            self._failed = True
            raise self._named(step, waited_s, gone, "all connections are open")

    def _lost(self, step: int, waited_s: float, error: RuntimeError) -> PeerLost:
        """What to raise when the process group has failed."""
        self._failed = True
        return self._named(step, waited_s, self._gone(), str(error))

    def _named(self, step: int, waited_s: float, gone: dict[int, str], why: str) -> PeerLost:
        """Names who is gone; else ranks of this node whose word is not out. Else it may be any other rank: one that waits for
        the same vector looks like one that hangs after its word."""
        group = self._words.info.group
        if gone:
            return PeerLost(group, list(gone), step, waited_s, "; ".join(dict.fromkeys(gone.values())))
        newest = {rank: self._words.member(rank).newest_step for rank in self._local if rank != self._rank}
        behind = [rank for rank, its_step in newest.items() if its_step < step]
        if behind:
            steps = ", ".join(str(newest[rank]) for rank in behind)
            return PeerLost(group, behind, step, waited_s, f"its process lives, but its last step is {steps}")
        return PeerLost(group, self._others, step, waited_s, f"the words of this node's ranks are out; {why}")

    def _gone(self) -> dict[int, str]:
        """Ranks that ended or left, and how that is known: on this node from the member table, elsewhere by connections."""
        gone = {}
        for rank in self._local:
            member = self._words.member(rank)
            if member.state is MemberState.LEFT:
                gone[rank] = f"it detached after step {member.newest_step}"
            elif not owner_alive(member.pid, member.start):
                gone[rank] = f"its process {member.pid} has ended"
        for rank in self._remote:
            try:
                # never received: a send is refused at once if the connection is closed, and costs nothing if it is not
                self._group.send([torch.zeros(1, dtype=torch.uint8)], rank, PROBE_TAG)
            except RuntimeError:
                gone[rank] = "its connection is closed: it ended, or left"
        return gone

"""How words get from rank to rank: one interface; shared memory inside a node, torch_exchange.py between nodes.

A rank publishes its word for step s before it reads any, and reads the words of step s - lag. In a lock-step engine they
are there when it looks. If one is not, the reader waits, first spinning, then in short sleeps, and gives up with the name
of the rank that is missing: at once if that process has ended or left, else after the deadline.
"""

import time
from typing import Protocol

from eplb_async.core.errors import PeerLost, StepDrift
from eplb_async.shm.layout import owner_alive
from eplb_async.shm.words import AgreementWords, MemberState, Reduced

__all__ = ["ALIVE_CHECK_S", "SLEEP_S", "SPIN_S", "Exchange", "SharedMemoryExchange"]

SPIN_S = 0.0005
"""Waiting this long without sleep covers the jitter between ranks of a running engine."""
SLEEP_S = 0.0002
ALIVE_CHECK_S = 0.05


class Exchange(Protocol):
    """What the hook needs from an agreement backend."""

    def publish(self, step: int, counters: tuple[int, int, int, int]) -> None:
        """Make the own word for a step readable by all: (staged, committed, error, digest)."""
        ...

    def repeat(self, step: int, collected: int) -> bool:
        """Publish the counters of the last `publish` for another step; true if the reduced words of `collected` are these.

        False also where that cannot be told yet; `collect` then can.
        """
        ...

    def collect(self, step: int) -> Reduced:
        """The words of all ranks for a step, reduced.

        Raises:
            PeerLost, StepDrift: they cannot be had.
        """
        ...

    def close(self) -> None:
        """Let go of what this backend holds by itself. Idempotent."""
        ...


class SharedMemoryExchange:
    """Words in the group segment; all ranks on this node."""

    def __init__(self, words: AgreementWords, rank: int, deadline_s: float) -> None:
        self._words, self._rank, self._deadline_s = words, rank, deadline_s

    def publish(self, step: int, counters: tuple[int, int, int, int]) -> None:
        """See Exchange."""
        self._words.publish(self._rank, step, counters)

    def repeat(self, step: int, collected: int) -> bool:
        """See Exchange."""
        return self._words.repeat(step, collected)

    def collect(self, step: int) -> Reduced:
        """See Exchange. Raises PeerLost after the deadline, or as soon as the missing rank's process is gone."""
        found = self._words.reduce(step)
        return found if isinstance(found, Reduced) else self._wait(step)

    def close(self) -> None:
        """See Exchange. The segment belongs to the membership."""

    def _wait(self, step: int) -> Reduced:
        start = time.monotonic()
        next_check = start + ALIVE_CHECK_S
        while True:
            found = self._words.reduce(step)
            if isinstance(found, Reduced):
                return found
            missing, its_step = found
            if its_step > step:
                group, history = self._words.info.group, self._words.history
                raise StepDrift(group, self._rank, missing, step, its_step, history)
            now = time.monotonic()
            if now > next_check:
                next_check = now + ALIVE_CHECK_S
                self._check(missing, step, now - start)
            if now - start > SPIN_S:
                time.sleep(SLEEP_S)

    def _check(self, missing: int, step: int, waited_s: float) -> None:
        member = self._words.member(missing)
        why = ""
        if member.state is MemberState.LEFT:
            why = f"it detached after step {member.newest_step}"
        elif not owner_alive(member.pid, member.start):
            why = f"its process {member.pid} has ended"
        elif waited_s > self._deadline_s:
            why = f"its process {member.pid} lives, but its last step is {member.newest_step}"
        # a word may have come right before its writer ended
        if why and not isinstance(self._words.reduce(step), Reduced):
            raise PeerLost(self._words.info.group, missing, step, waited_s, why)

"""Ranks that record what they do, in the words of tests/model/trace_events.py, and ranks with one rule of the protocol left out.

The product has no switch for either: everything here is a subclass, or replaces a part of one hook.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from eplb_async.core.plan import NO_PLAN, generation_of, position_of
from eplb_async.rank.agreement import Agreement, Decision, PlanFacts
from eplb_async.rank.hook import RankHook
from eplb_async.rank.streams import Completion
from eplb_async.rank.transfer.base import Copy, Pull, Transfer
from eplb_async.rank.transfer.shm import ShmTransfer
from eplb_async.shm.words import Reduced

__all__ = ["Event", "Gate", "TracedAgreement", "TracedHook", "delay_commits", "gate_pulls"]

Event = dict[str, Any]


def pair(packed: int) -> list[int]:
    """A counter as traces have it."""
    return [generation_of(packed), position_of(packed)]


class TracedAgreement(Agreement):
    """Records every change of a counter and every word, before others can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.step = -1

    def record(self, event: str, **fields: Any) -> None:
        """Add an event."""
        self.events.append({"event": event, **fields})

    def word(self) -> tuple[int, int, int, int]:
        """Called once a step, right before the word goes out."""
        self.step += 1
        staged, committed, error, digest = word = super().word()
        plan = digest if digest != NO_PLAN else -1
        self.record("publish", step=self.step, staged=pair(staged), committed=pair(committed), error=error, digest=plan)
        return word

    def decide(self, words: Reduced) -> Decision:
        """Recorded before what was decided is issued."""
        decision = super().decide(words)
        self.record("decide", step=self.step, decided=pair(self.decided))
        return decision

    def adopt(self, plan: PlanFacts) -> None:
        """See Agreement."""
        self.record("adopt", step=self.step, generation=plan.generation, plan=plan.digest)
        super().adopt(plan)

    def stage(self, position: int) -> None:
        """See Agreement."""
        before = self.staged
        super().stage(position)
        if self.staged > before:
            self.record("staged", counter=pair(self.staged))

    def finish_commit(self, generation: int, position: int) -> None:
        """See Agreement."""
        before = self.committed
        super().finish_commit(generation, position)
        self._committed(before)

    def settle(self, busy: bool) -> None:
        """See Agreement."""
        before = self.committed
        super().settle(busy)
        self._committed(before)

    def fail(self, generation: int, why: str) -> bool:
        """An abort, a plan that was refused, or a failure of the plan that is held."""
        news = super().fail(generation, why)
        if news and why == "a daemon aborted it":
            self.record("error", generation=generation, why="abort")
        elif news and self.plan is None:
            self.record("refuse", step=self.step, generation=generation)
        elif news:
            self.record("error", generation=generation, why=why)
        return news

    def _committed(self, before: int) -> None:
        if self.committed > before:
            self.record("committed", counter=pair(self.committed))


class TracedHook(RankHook):
    """A hook whose agreement and forwards are recorded."""

    agreement_class: type[Agreement] = TracedAgreement
    may_repeat = False

    @property
    def events(self) -> list[Event]:
        """What was recorded so far."""
        assert isinstance(self._agreement, TracedAgreement)
        return self._agreement.events

    def before_forward(self, *arguments: Any, **fields: Any) -> None:
        """Recorded before the forward reads the maps."""
        super().before_forward(*arguments, **fields)
        self.events.append({"event": "forward", "step": self._step, "maps": self.slot_to_expert_LP.tolist()})


# -- slow devices -------------------------------------------------------------------------------------------------------


class _Late(Completion[None]):
    """A commit that the device runs when somebody has asked for its end `polls` times."""

    def __init__(self, run: Callable[[], object], polls: int) -> None:
        self._run, self._polls = run, polls
        super().__init__()

    @property
    def done(self) -> bool:
        """True from the last of the polls on."""
        self._polls -= 1
        if self._polls == 0:
            self._run()
        return self._polls <= 0

    @done.setter
    def done(self, value: bool) -> None:
        pass


def delay_commits(transfer: Transfer, polls: int) -> None:
    """Make a transfer's commits asynchronous, as on a GPU: each runs some steps after it was issued."""
    commit = transfer.commit

    def late(layer: int, rows: Sequence[tuple[int, int]], more: Sequence[Copy]) -> Completion[None]:
        return _Late(lambda: commit(layer, list(rows), more), polls)

    setattr(transfer, "commit", late)  # noqa: B010 (mypy knows that methods cannot be assigned)


class Gate:
    """Holds pulls back, in the middle of their copy, until it is opened.

    Attributes:
        entered: set when a pull waits.
        overwritten: pulls whose source changed while they waited.
    """

    def __init__(self, transfer: ShmTransfer) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.overwritten: list[Pull] = []
        self._transfer, self._pull = transfer, transfer._pull_now

    def pull_now(self, layer: int, pull: Pull, row: list[torch.Tensor], fingerprints: Sequence[int] | None) -> None:
        """In place of the transfer's own."""
        sources = self._transfer._peers[pull.source_rank][layer]
        before = [source[pull.source_slot].clone() for source in sources]
        self.entered.set()
        if not self.opened.wait(60.0):
            raise TimeoutError("nobody opened the gate")
        if any(not old.equal(source[pull.source_slot]) for old, source in zip(before, sources, strict=True)):
            self.overwritten.append(pull)
        self._pull(layer, pull, row, fingerprints)


def gate_pulls(transfer: Transfer) -> Gate:
    """Put a gate before the pulls of a transfer."""
    assert isinstance(transfer, ShmTransfer)
    gate = Gate(transfer)
    setattr(transfer, "_pull_now", gate.pull_now)  # noqa: B010
    return gate

r"""The counters of one rank and the only function that moves them by what others say. No I/O, no clock, no device.

Three packed counters (core/plan.py) that only grow, `committed <= decided <= staged`:

    staged      entries whose incoming experts are in staging memory, verified   } published in the word of each step
    committed   entries whose commit has finished on the device                  }
    decided     entries applied or dropped by the host; equal on all ranks at the same step

    adopt -> stage 1, 2, ... -> decide: COMMIT 1, 2, ... -> (g + 1, 0)      a plan that is applied
                           \-> decide: DROP             -> (g + 1, 0)      any rank failed, or contents differ

`decide` is a function of the reduced words of one step, which all ranks read alike, so all decide alike. Everything else
a rank does on its own and only shows in its word. tests/model holds the executable specification.
"""

from enum import Enum
from typing import NamedTuple, Protocol

from eplb_async.core.plan import FIRST_COUNTER, NO_PLAN, counter, generation_of, position_of
from eplb_async.shm.words import Reduced

__all__ = ["Agreement", "Decision", "PlanFacts", "Verdict"]


class PlanFacts(Protocol):
    """What the agreement needs to know of a plan."""

    @property
    def generation(self) -> int:
        """The plan's number, g."""
        ...

    @property
    def digest(self) -> int:
        """Of its bytes."""
        ...

    @property
    def length(self) -> int:
        """Number of entries."""
        ...


class Verdict(Enum):
    """What a step's words ask for."""

    NOTHING = "nothing"
    COMMIT = "commit"
    DROP = "drop"


class Decision(NamedTuple):
    """The verdict of a step: COMMIT names the entry's position, DROP the last generation dropped and why."""

    verdict: Verdict
    position: int = 0
    generation: int = 0
    why: str = ""


_NOTHING = Decision(Verdict.NOTHING)


class Agreement:
    """Counters of one rank in one incarnation. Only the thread that steps may call it.

    Attributes:
        staged, committed, decided: packed counters.
        error: highest generation that this rank wants dropped.
        plan: the plan it holds, or None.
    """

    def __init__(self) -> None:
        self.staged = self.committed = self.decided = FIRST_COUNTER
        self.error = 0
        self.plan: PlanFacts | None = None

    @property
    def generation(self) -> int:
        """The generation that `decided` is in: of the active plan, or of the next one."""
        return generation_of(self.decided)

    @property
    def failed(self) -> bool:
        """True while this rank waits for its own error to drop the current generation."""
        return self.error >= self.generation

    def word(self) -> tuple[int, int, int, int]:
        """What to publish: (staged, committed, error, digest); an error only until `decided` has passed it (I5)."""
        error = self.error if self.failed else 0
        return self.staged, self.committed, error, self.plan.digest if self.plan else NO_PLAN

    def decide(self, words: Reduced) -> Decision:
        """Act on the words of step s - lag (I2): an error wins, else at most one entry is committed."""
        decision = self._verdict(words)
        if decision is _NOTHING:
            return decision
        if decision.verdict is Verdict.DROP:
            self.decided = counter(decision.generation + 1, 0)
            self.plan = None
        elif decision.verdict is Verdict.COMMIT and self.plan is not None:
            last = decision.position == self.plan.length
            self.decided = counter(self.generation + 1, 0) if last else counter(self.generation, decision.position)
            self.plan = None if last else self.plan
        self.staged = max(self.staged, self.decided)
        return decision

    def may_adopt(self, generation: int, words: Reduced) -> bool:
        """I4: the plan is the next one, and every rank has finished or dropped the one before, on its device too."""
        start = counter(generation, 0)
        return self.plan is None and not self.failed and self.decided == start and words.committed >= start

    def adopt(self, plan: PlanFacts) -> None:
        """Hold a plan; only if `may_adopt`."""
        self.plan = plan

    def stage(self, position: int) -> None:
        """The incoming experts of this entry of the plan are in staging memory, and of all before it."""
        self.staged = max(self.staged, counter(self.generation, position))

    def finish_commit(self, generation: int, position: int) -> None:
        """The commit of this entry has ended on the device."""
        self.committed = max(self.committed, counter(generation, position))

    def settle(self, busy: bool) -> None:
        """`committed` reaches `decided` once neither commits nor pulls of dropped plans run on the device (I5).

        Args:
            busy: one of them still does.
        """
        if not busy:
            self.committed = self.decided

    def fail(self, generation: int, why: str) -> bool:
        """Ask for the drop of all plans up to this generation; true if that is news. `why` is for logs and tests."""
        if generation <= self.error or generation < self.generation:
            return False
        self.error = generation
        return True

    def _verdict(self, words: Reduced) -> Decision:
        if words.error >= self.generation:
            return Decision(Verdict.DROP, generation=words.error, why="a rank asked for it")
        if self.plan is None or words.staged <= self.decided:
            return _NOTHING
        if words.least_digest != words.greatest_digest:
            return Decision(
                Verdict.DROP, generation=self.generation, why="ranks hold different plans of one generation"
            )
        return Decision(Verdict.COMMIT, position=position_of(self.decided) + 1, generation=self.generation)

"""Many ranks in one process: real `Agreement` objects, words in memory, everything else at random.

A rank's step is what the hook does: publish, decide on the words of step - lag, look at its board, issue. Between any two
of them devices may finish work, pulls may fail, daemons may publish or abort. `Simulation.check` looks at the invariants
after each action; all that is random comes from one generator.
"""

import random
from dataclasses import dataclass, field

from eplb_async.core.plan import FIRST_COUNTER, NO_PLAN, counter, generation_of, position_of
from eplb_async.rank.agreement import Agreement, Decision, Verdict
from eplb_async.shm.words import Reduced

__all__ = ["Facts", "SimulatedRank", "Simulation"]

Word = tuple[int, int, int, int]


@dataclass(frozen=True)
class Facts:
    """A plan: `layers` says which layer each entry changes; `name` tells contents of one generation apart."""

    generation: int
    name: int
    layers: tuple[int, ...]

    @property
    def digest(self) -> int:
        """See PlanFacts."""
        return self.generation * 1000 + self.name + 1

    @property
    def length(self) -> int:
        """See PlanFacts."""
        return len(self.layers)


@dataclass
class SimulatedRank:
    """One rank: its agreement, its device, and what it has shown."""

    agreement: Agreement
    words: list[Word] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    decided: list[int] = field(default_factory=list)
    plan: Facts | None = None
    pulling: int = 0
    commits: list[tuple[int, int]] = field(default_factory=list)
    orphans: list[int] = field(default_factory=list)
    looked: bool = True

    @property
    def step(self) -> int:
        """The next word's step."""
        return len(self.words)


class Simulation:
    """N ranks; `forked`: their boards may hold different plans of one generation."""

    def __init__(
        self, num_ranks: int, lag: int, seed: int, forked: bool, agreement: type[Agreement] = Agreement
    ) -> None:
        self.random, self.lag, self.forked = random.Random(seed), lag, forked
        self.ranks = [SimulatedRank(agreement()) for _ in range(num_ranks)]
        self.boards: list[Facts | None] = [None] * num_ranks
        self.abort = 0
        self.before = [(FIRST_COUNTER,) * 3] * num_ranks

    def run(self, num_actions: int) -> None:
        """Take random actions; checks after each."""
        for _ in range(num_actions):
            index = self.random.randrange(len(self.ranks))
            rank = self.ranks[index]
            choice = self.random.random()
            if choice < 0.55:
                self.advance(index, rank)
            elif choice < 0.75:
                self.device(rank)
            elif choice < 0.77 and rank.plan is not None:
                rank.agreement.fail(rank.plan.generation, "at random")
            elif choice < 0.78:
                self.abort = max(self.abort, generation_of(rank.agreement.decided) - self.random.randrange(2))
            elif choice < 0.85:
                self.publish(index)
            self.check(index)

    def advance(self, index: int, rank: SimulatedRank) -> None:
        """The next part of a rank's step, if it can be made."""
        step = rank.step - 1
        if rank.looked:
            self.settle(rank)
            if self.abort >= rank.agreement.generation:
                rank.agreement.fail(self.abort, "a daemon aborted it")
            rank.words.append(rank.agreement.word())
            rank.looked = False
        elif all(other.step > step - self.lag for other in self.ranks):
            words = self.reduced(step - self.lag)
            self.decide(rank, words)
            self.adopt(index, rank, words)
            self.issue(rank, words)
            rank.looked = True

    def decide(self, rank: SimulatedRank, words: Reduced) -> None:
        """As RankHook._apply."""
        decision = rank.agreement.decide(words)
        rank.decisions.append(decision)
        rank.decided.append(rank.agreement.decided)
        if decision.verdict is Verdict.DROP:
            if rank.plan is not None and rank.pulling:
                rank.orphans.append(rank.plan.generation)
            rank.plan, rank.pulling = None, 0
        elif decision.verdict is Verdict.COMMIT and rank.plan is not None:
            rank.commits.append((decision.generation, decision.position))
            if decision.position == rank.plan.length:
                rank.plan = None

    def adopt(self, index: int, rank: SimulatedRank, words: Reduced) -> None:
        """As RankHook._adopt."""
        board, agreement = self.boards[index], rank.agreement
        if board is None or not agreement.may_adopt(board.generation, words):
            return
        # other ranks may have dropped this one already, so only older work counts
        running = [g for other in self.ranks for g in [*other.orphans, *(commit[0] for commit in other.commits)]]
        slowest = min(other.agreement.committed for other in self.ranks)
        early = f"rank {index} starts plan {board.generation} before all have ended the one before"
        assert slowest >= counter(board.generation, 0), early
        assert min(running, default=board.generation) >= board.generation, early
        agreement.adopt(board)
        rank.plan = board

    def issue(self, rank: SimulatedRank, words: Reduced) -> None:
        """Start pulling the next entry; one at a time, half of the entries have nothing to pull."""
        plan, agreement = rank.plan, rank.agreement
        while plan is not None and not rank.pulling and not agreement.failed:
            position = position_of(agreement.staged) + 1
            same = [k for k in range(1, position) if plan.layers[k - 1] == plan.layers[min(position, plan.length) - 1]]
            if position > plan.length or (same and words.committed < counter(plan.generation, same[-1])):
                return
            if self.random.random() < 0.5:
                rank.pulling = position
                return
            agreement.stage(position)

    def device(self, rank: SimulatedRank) -> None:
        """Something ends on a rank's device."""
        kind = self.random.randrange(3)
        if kind == 0 and rank.pulling and rank.plan is not None:
            rank.agreement.stage(rank.pulling)
            rank.pulling = 0
        elif kind == 1 and rank.commits:
            rank.agreement.finish_commit(*rank.commits.pop(0))
        elif kind == 2 and rank.orphans:
            rank.orphans.pop()
        self.settle(rank)

    def settle(self, rank: SimulatedRank) -> None:
        """As RankHook._poll_committed."""
        rank.agreement.settle(bool(rank.commits) or bool(rank.orphans))

    def publish(self, index: int) -> None:
        """A rank's daemon (each has a node of its own): the next plan by the rank's counter, when it has ended the one before."""
        words = self.ranks[index].words
        committed, board = words[-1][1] if words else FIRST_COUNTER, self.boards[index]
        generation = generation_of(committed)
        if position_of(committed) or (board is not None and board.generation >= generation):
            return
        others = [other for other in self.boards if other is not None and other.generation == generation]
        if others and not self.forked:
            self.boards[index] = others[0]
        else:
            layers = tuple(self.random.randrange(2) for _ in range(self.random.randint(1, 4)))
            self.boards[index] = Facts(generation, index, layers)

    def reduced(self, step: int) -> Reduced:
        """What AgreementWords.reduce gives."""
        first = (FIRST_COUNTER, FIRST_COUNTER, 0, NO_PLAN)
        staged, committed, error, digest = zip(
            *(r.words[step] if step >= 0 else first for r in self.ranks), strict=True
        )
        return Reduced(min(staged), min(committed), max(error), min(digest), max(digest))

    def check(self, index: int) -> None:
        """The invariants, after something happened to a rank."""
        agreement = self.ranks[index].agreement
        now = (agreement.committed, agreement.decided, agreement.staged)
        assert now[0] <= now[1] <= now[2], f"rank {index}: committed <= decided <= staged does not hold: {now}"
        assert all(new >= old for new, old in zip(now, self.before[index], strict=True)), "a counter shrinks"
        self.before[index] = now
        longest = max(self.ranks, key=lambda rank: len(rank.decided))
        for rank in self.ranks:
            assert rank.decided == longest.decided[: len(rank.decided)], "decided differs at one step"
            assert [d[:3] for d in rank.decisions] == [d[:3] for d in longest.decisions[: len(rank.decisions)]]
        plans = {rank.plan for rank in self.ranks if rank.plan is not None}
        if len(plans) > 1 and len({plan.generation for plan in plans}) == 1:
            forked = counter(next(iter(plans)).generation, 0)
            assert all(rank.agreement.decided <= forked for rank in self.ranks if rank.plan), (
                "a forked plan was committed"
            )

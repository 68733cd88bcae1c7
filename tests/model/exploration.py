"""Breadth-first search over every interleaving of a model, with a check that the ranks alone can always end a plan."""

from typing import NamedTuple

from tests.model.choices import daemon_actions, quiet, rank_actions
from tests.model.rules import Model, Violation
from tests.model.states import LOST, State

__all__ = ["Outcome", "explore"]

HOST_STEPS = ("publishes its word", "decides", "looks", "steps", "loses a peer")


class Outcome(NamedTuple):
    """How many states were seen, the violation's text or None, and the shortest way to it."""

    num_states: int
    violation: str | None
    steps: list[str]


class _Graph:
    """The states seen so far, in the order of breadth-first search."""

    def __init__(self, first: State) -> None:
        self.number = {first: 0}
        self.states = [first]
        self.parents: list[tuple[int, str]] = [(0, "start")]
        self.before: list[list[int]] = [[]]  # predecessors by actions of ranks: what is possible with all daemons dead

    def add(self, following: State, i: int, label: str) -> int:
        j = self.number.setdefault(following, len(self.states))
        if j == len(self.states):
            self.states.append(following)
            self.parents.append((i, label))
            self.before.append([])
        return j

    def steps_to(self, i: int) -> list[str]:
        steps = []
        while i:
            i, label = self.parents[i]
            steps.append(label)
        return steps[::-1]


def explore(model: Model) -> Outcome:
    """All states that can be reached. (e): in each the slowest rank can step, and ranks alone can reach a quiet state."""
    graph = _Graph(model.initial())
    for i, state in enumerate(graph.states):  # grows while we walk it: breadth first
        going_on = [(rank.ahead, rank.phase, r) for r, rank in enumerate(state.ranks) if rank.phase != LOST]
        slowest = min(going_on)[2] if going_on else -1
        wanted = {f"rank {slowest} {step}" for step in HOST_STEPS}
        could_step = not going_on
        for by_rank, actions in ((True, rank_actions(model, state)), (False, daemon_actions(model, state))):
            for label, apply in actions:
                try:
                    j = graph.add(apply(), i, label)
                except Violation as violation:
                    return Outcome(len(graph.states), str(violation), [*graph.steps_to(i), label])
                if by_rank:
                    graph.before[j].append(i)
                    could_step = could_step or label in wanted
        if not could_step:
            return Outcome(len(graph.states), "(e) the slowest rank cannot step", graph.steps_to(i))
    return _liveness(model, graph)


def _liveness(model: Model, graph: _Graph) -> Outcome:
    good = bytearray(quiet(model, state) for state in graph.states)
    queue = [i for i in range(len(good)) if good[i]]
    while queue:
        for i in graph.before[queue.pop()]:
            if not good[i]:
                good[i] = 1
                queue.append(i)
    if not all(good):
        worst = good.index(0)
        return Outcome(len(good), "(e) the ranks can never finish or drop the plan", graph.steps_to(worst))
    return Outcome(len(good), None, [])

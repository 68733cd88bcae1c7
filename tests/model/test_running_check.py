"""Traces checked while they grow: the same verdict as for whole traces, whatever the cuts."""

import random

import pytest

from tests.model.agreement_model import SCENARIOS
from tests.model.running_check import RunningCheck
from tests.model.states import Scenario
from tests.model.trace_events import Event
from tests.model.trace_walk import Walker

__all__: list[str] = []

CASE = SCENARIOS[0]
STEPS, PLANS = 60, 12


def problems_in_cuts(scenario: Scenario, seed: int, broken: str = "") -> list[str]:
    """Walk, and check after a random number of steps each time."""
    rng = random.Random(seed)
    walker = Walker(scenario, seed, broken, PLANS)
    check = RunningCheck(scenario.start, len(scenario.nodes), scenario.lag, scenario.rows)
    seen, problems, steps = [0] * (len(scenario.nodes) + 1), [], 0
    while steps < STEPS:
        steps += rng.randrange(1, 12)
        walker.run(steps)
        traces: list[list[Event]] = [*walker.traces.ranks, walker.traces.daemons]
        new = [trace[done:] for trace, done in zip(traces, seen, strict=True)]
        seen = [len(trace) for trace in traces]
        problems += check.extend(new[:-1], new[-1])
    assert check.num_events == sum(seen)
    return problems + check.end()


@pytest.mark.parametrize("seed", range(12))
def test_cuts_of_a_right_walk_are_accepted(seed: int) -> None:
    """Every cut of a behaviour of the model is one."""
    assert problems_in_cuts(CASE, seed) == []


@pytest.mark.parametrize("broken", ["newest_words", "drop_at_once", "rows_at_issue"])
def test_broken_walks_are_rejected_once(broken: str) -> None:
    """A rule left out shows in some walk, and is said once, however many cuts follow."""
    problems = next(found for seed in range(60) if (found := problems_in_cuts(CASE, seed, broken)))
    assert sum(problem.startswith("rejected") for problem in problems) <= 1


def test_damage_allows_what_nothing_else_does() -> None:
    """A refused generation that no board has held is wrong, unless somebody wrote to the board."""
    word = {"event": "publish", "step": 0, "staged": [1, 0], "committed": [1, 0], "error": 0, "digest": -1}
    refuse = {"event": "refuse", "step": 0, "generation": 1}
    for damage, wrong in (([], True), ([{"event": "damage", "generation": 1}], False)):
        check = RunningCheck(CASE.start, 2, CASE.lag, CASE.rows)
        assert bool(check.extend([[word, refuse], [word]], damage)) is wrong

"""Executable specification of the commit agreement (design, section 5): explores all interleavings of small cases.

`python -m tests.model.agreement_model` runs all scenarios, then all broken variants; status 1 on any surprise.
`--variant NAME` prints the shortest counterexample of one variant. The rules themselves are in rules.py, what may
happen next is in choices.py.
"""

import argparse
import sys
import time

from tests.model.exploration import explore
from tests.model.rules import Model
from tests.model.states import Plan, Scenario

__all__ = ["BACK", "FINE", "SCENARIOS", "SWAP", "VARIANTS", "check", "main"]

SWAP, BACK = (1, 0), (0, 1)
FIRST = Plan(1, ((0, BACK),), ((0, SWAP),))
# the second generation is right after a commit of the first, or after its drop; the ranks must refuse the wrong one
SECOND = (Plan(2, ((0, SWAP),), ((0, BACK),)), Plan(2, ((0, BACK),), ((0, SWAP),)))
LAYERS = Plan(1, ((0, BACK), (1, BACK)), ((0, SWAP), (1, SWAP)))
TWICE = Plan(1, ((0, BACK),), ((0, SWAP), (0, BACK)))
# rank 1 pulls expert 0 from slot 0 of rank 0; the next plan overwrites that slot and gives rank 1 nothing to pull
ONE_SIDED = (
    Plan(1, ((0, (0, 0, 1, -1)),), ((0, (0, 0, 1, 0)),)),
    Plan(2, ((0, (0, 0, 1, -1)),), ((0, (1, 0, 1, -1)),)),
)
FORK = (FIRST, Plan(1, ((0, BACK), (1, BACK)), ((1, SWAP),)))
ROTATE = Plan(1, ((0, (0, 1, 2)),), ((0, (1, 2, 0)),))

SCENARIOS = [
    Scenario("two layers, crash", (0, 0), (BACK, BACK), (LAYERS,), crashes=1),
    Scenario(
        "one layer twice, then plan 2", (0, 0), (BACK,), (TWICE, SECOND[1]), failures=1, deadlines=1, aborts=False
    ),
    Scenario("one-sided pulls, two plans", (0, 0), ((0, 0, 1, -1),), ONE_SIDED, failures=1, deadlines=1),
    Scenario("two nodes, two plans", (0, 1), (BACK,), (FIRST, *SECOND), deadlines=2, aborts=False),
    Scenario("two nodes, crash", (0, 1), (BACK,), (FIRST,), crashes=1, deadlines=1, aborts=False),
    Scenario("two nodes, forked generation", (0, 1), (BACK, BACK), FORK, deadlines=1, aborts=False, forked=True),
    Scenario("two nodes, lag 2", (0, 1), (BACK,), (FIRST,), lag=2, deadlines=1, aborts=False),
    Scenario("three ranks", (0, 0, 0), ((0, 1, 2),), (ROTATE,), deadlines=0, aborts=False),
    Scenario("three ranks on two nodes", (0, 0, 1), ((0, 1, 2),), (ROTATE,), deadlines=1, aborts=False),
    Scenario("two nodes, reduced every 2 steps", (0, 1), (BACK,), (FIRST,), deadlines=1, aborts=False, every=2),
    Scenario(
        "two nodes, forked, every 2 steps", (0, 1), (BACK, BACK), FORK, deadlines=1, aborts=False, forked=True, every=2
    ),
    Scenario("crash and aborts, two plans", (0, 0), (BACK,), (FIRST, *SECOND), crashes=1, deadlines=1),
    Scenario("a rank loses its peer", (0, 0), (BACK,), (FIRST,), deadlines=1, aborts=False, losses=1),
    Scenario("one of three loses its peers", (0, 0, 0), ((0, 1, 2),), (ROTATE,), deadlines=0, aborts=False, losses=1),
    Scenario("two nodes, a rank loses its peer", (0, 1), (BACK,), (FIRST,), deadlines=1, aborts=False, losses=1),
    Scenario("a pull hangs, two plans", (0, 0), ((0, 0, 1, -1),), ONE_SIDED, deadlines=2, aborts=False, hangs=1),
    Scenario(
        "a pull hangs, then one with pulls", (0, 0), (BACK,), (FIRST, *SECOND), deadlines=2, aborts=False, hangs=1
    ),
    Scenario("two nodes, reduced every 3 steps", (0, 1), (BACK,), (FIRST,), deadlines=1, aborts=False, every=3),
    Scenario(
        "two nodes, every 2 steps, two plans", (0, 1), (BACK,), (FIRST, *SECOND), deadlines=2, aborts=False, every=2
    ),
    Scenario("a pull hangs", (0, 0), ((0, 0, 1, -1),), ONE_SIDED[:1], deadlines=1, aborts=False, hangs=1),
    Scenario("three ranks on two nodes, lag 2", (0, 0, 1), ((0, 1, 2),), (ROTATE,), lag=2, deadlines=1, aborts=False),
]
# explored with each step in three pieces and the newest words in the waiting rules, as real ranks do it
FINE = [
    Scenario("in pieces: one layer, crash", (0, 0), (BACK,), (FIRST,), crashes=1, deadlines=1),
    Scenario("in pieces: two nodes", (0, 1), (BACK,), (FIRST, SECOND[1]), deadlines=2, aborts=False),
    Scenario("in pieces: one-sided pulls", (0, 0), ((0, 0, 1, -1),), ONE_SIDED, deadlines=1, aborts=False),
    Scenario("in pieces: one layer twice", (0, 0), (BACK,), (TWICE,), failures=1, deadlines=0, aborts=False),
]
# name -> (scenario, what it does instead of the rule)
VARIANTS = {
    "counters_at_issue": (0, "staged and committed count issued work, not finished work"),
    "newest_words": (0, "a rank acts on the newest words, not on those of step s"),
    "daemon_decides": (0, "daemons tell their ranks when to commit"),
    "drop_at_once": (0, "a rank drops as soon as it has an error itself"),
    "rows_at_issue": (0, "staging rows are free once the commit is issued"),
    "same_layer_early": (1, "the second entry of a layer waits for the own commit only"),
    "board_reused_early": (1, "the daemon reuses the board when everything is staged"),
    "no_drain": (2, "a drop moves committed although pulls are in flight"),
    "next_plan_early": (3, "staging of plan g + 1 does not wait for min(committed)"),
    "no_base": (3, "a plan does not name the map versions it starts from"),
    "no_digest": (5, "words carry no digest of the plan"),
    "no_rank_deadline": (6, "only daemons end a plan that is late"),
    "short_history": (6, "the ring holds 2 lag + 1 steps"),
    "local_words": (8, "a rank decides on the newest words of its own node and the reduced ones of the others"),
    "vector_when_it_comes": (9, "a rank decides on a reduced vector as soon as it has it"),
    "forward_after_loss": (12, "a rank that lost its peer runs that forward with the map that it has"),
    "no_giving_up": (15, "a rank waits for ever for a pull of a dropped plan that does not end"),
    "give_up_early": (15, "a rank gives a pull up whose plan was not dropped"),
    "rows_kept": (16, "the rows of a pull that was given up are used again"),
}


def check(model: Model, show: bool = False) -> bool:
    """Explore one case and print a line; true when nothing is wrong."""
    start = time.monotonic()
    outcome = explore(model)
    took, name = time.monotonic() - start, model.broken or model.case.name
    print(f"{name:29} {outcome.num_states:8} states {took:5.1f} s  {outcome.violation or 'holds'}", flush=True)
    for number, line in enumerate(outcome.steps if show else [], 1):
        print(f"  {number:2}. {line}")
    return outcome.violation is None


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", choices=sorted(VARIANTS))
    name = parser.parse_args(arguments).variant
    if name:
        print(f"{name}: {VARIANTS[name][1]}")
        return int(check(Model(SCENARIOS[VARIANTS[name][0]], name), show=True))
    models = [Model(scenario) for scenario in SCENARIOS] + [Model(scenario, fine=True) for scenario in FINE]
    held = [check(model, show=True) for model in models]
    print("broken variants, each must fail:")
    missed = [variant for variant, (case, _) in VARIANTS.items() if check(Model(SCENARIOS[case], variant))]
    print(f"missed: {missed}" if missed else "all caught")
    return int(bool(missed) or not all(held))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

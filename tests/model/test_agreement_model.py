"""The model of the commit agreement holds, and leaving out any of its rules breaks it."""

import pytest

from tests.model.agreement_model import FINE, SCENARIOS, VARIANTS
from tests.model.exploration import explore
from tests.model.rules import Model
from tests.model.states import Scenario, counter, generation_of, position_of

SHORT = [SCENARIOS[5], SCENARIOS[6], SCENARIOS[12], SCENARIOS[19]]
SHORT_FINE = [FINE[2], FINE[3]]
# the property that each variant breaks first
BREAKS = {
    "counters_at_issue": "(b)",
    "newest_words": "(f)",
    "daemon_decides": "(a)",
    "drop_at_once": "(f)",
    "rows_at_issue": "(d)",
    "same_layer_early": "(b)",
    "board_reused_early": "(d)",
    "no_drain": "(b)",
    "next_plan_early": "(b)",
    "no_base": "(c)",
    "no_digest": "(a)",
    "no_rank_deadline": "(e)",
    "short_history": "(d)",
    "local_words": "(f)",
    "vector_when_it_comes": "(f)",
    "forward_after_loss": "(f)",
    "no_giving_up": "(e)",
    "give_up_early": "(c)",
    "rows_kept": "(c)",
}
COSTLY = {"no_drain", "no_base", "no_digest", "board_reused_early", "no_giving_up", "rows_kept"}


def name_of(scenario: Scenario) -> str:
    """A test's id."""
    return scenario.name.replace(" ", "-")


@pytest.mark.parametrize("scenario", SHORT, ids=name_of)
def test_small_scenario_holds(scenario: Scenario) -> None:
    """No interleaving breaks a property: equal maps, no early overwrite, right contents, no deadlock, equal counters."""
    outcome = explore(Model(scenario))
    assert outcome.violation is None, outcome.steps
    assert outcome.num_states > 5_000


@pytest.mark.parametrize("scenario", SHORT_FINE, ids=name_of)
def test_small_scenario_holds_in_pieces(scenario: Scenario) -> None:
    """The same when device work completes inside a step and waiting rules read the newest words."""
    outcome = explore(Model(scenario, fine=True))
    assert outcome.violation is None, outcome.steps
    assert outcome.num_states > 20_000


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in COSTLY])
def test_cheap_variant_is_caught(name: str) -> None:
    """Without its rule the protocol breaks the property that the rule is for."""
    outcome = explore(Model(SCENARIOS[VARIANTS[name][0]], name))
    assert (outcome.violation or "holds").startswith(BREAKS[name])
    assert outcome.steps


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(COSTLY))
def test_costly_variant_is_caught(name: str) -> None:
    """As above, for variants whose counterexample is far from the start."""
    outcome = explore(Model(SCENARIOS[VARIANTS[name][0]], name))
    assert (outcome.violation or "holds").startswith(BREAKS[name])


@pytest.mark.slow
@pytest.mark.timeout(3600)  # three ranks on two nodes with lag 2: 14 million states
@pytest.mark.parametrize("scenario", [case for case in SCENARIOS if case not in SHORT], ids=name_of)
def test_scenario_holds(scenario: Scenario) -> None:
    """The rest of the scenarios."""
    assert explore(Model(scenario)).violation is None


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scenario", [case for case in FINE if case not in SHORT_FINE], ids=name_of)
def test_scenario_holds_in_pieces(scenario: Scenario) -> None:
    """The rest of the scenarios in pieces."""
    assert explore(Model(scenario, fine=True)).violation is None


def test_every_variant_has_its_property() -> None:
    """The table above covers all variants."""
    assert set(BREAKS) == set(VARIANTS)


def test_counters_compare_by_generation_then_position() -> None:
    """I1: (1, 0) < (1, 1) < (1, 200) < (2, 0), whatever the number of entries."""
    packed = [counter(1, 0), counter(1, 1), counter(1, 200), counter(2, 0)]
    assert packed == sorted(packed)
    assert [(generation_of(c), position_of(c)) for c in packed] == [(1, 0), (1, 1), (1, 200), (2, 0)]

"""The counters of a rank: the agreement's invariants under any interleaving, and equality with the executable model."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_async.core.plan import FIRST_COUNTER, NO_PLAN, counter, generation_of, position_of
from eplb_async.rank.agreement import Agreement, Decision, Verdict
from eplb_async.shm.words import Reduced
from tests.model import states
from tests.model.rules import Model
from tests.rank.simulation import Facts, Simulation

QUIET = Reduced(FIRST_COUNTER, FIRST_COUNTER, 0, NO_PLAN, NO_PLAN)
PLAN = Facts(1, 0, (0, 1, 0))
SEEDS = st.integers(0, 2**32)


def staged(position: int, error: int = 0, digests: tuple[int, int] = (PLAN.digest, PLAN.digest)) -> Reduced:
    """Words of ranks that have all staged plan 1 up to a position."""
    return Reduced(counter(1, position), FIRST_COUNTER, error, *digests)


def holding(position: int = 3) -> Agreement:
    """A rank that has adopted plan 1 and staged it up to a position."""
    agreement = Agreement()
    agreement.adopt(PLAN)
    agreement.stage(position)
    return agreement


@settings(max_examples=150, deadline=None)
@given(num_ranks=st.integers(1, 4), lag=st.integers(1, 3), seed=SEEDS, forked=st.booleans())
def test_ranks_decide_alike_under_any_interleaving(num_ranks: int, lag: int, seed: int, forked: bool) -> None:
    """I1, I2, I4: equal decisions at each step, counters in order and growing, no plan begins early, no fork is committed."""
    Simulation(num_ranks, lag, seed, forked).run(600)


def test_the_simulation_reaches_everything() -> None:
    """The test above is worth nothing unless plans are committed, dropped by errors and by digests, and several deep."""
    verdicts, reasons, deepest = set(), set(), 0
    for seed in range(40):
        simulation = Simulation(3, 1 + seed % 3, seed, forked=seed % 2 == 0)
        simulation.run(600)
        decisions = [decision for rank in simulation.ranks for decision in rank.decisions]
        verdicts |= {decision.verdict for decision in decisions}
        reasons |= {decision.why for decision in decisions if decision.verdict is Verdict.DROP}
        deepest = max(deepest, *(generation_of(rank.agreement.decided) for rank in simulation.ranks))
    assert verdicts == set(Verdict)
    assert reasons == {"a rank asked for it", "ranks hold different plans of one generation"}
    assert deepest > 4


class DropAtOnce(Agreement):
    """Variant: its own error is enough."""

    def decide(self, words: Reduced) -> Decision:
        """Broken."""
        return super().decide(words._replace(error=max(words.error, self.error)))


class NextPlanEarly(Agreement):
    """Variant: a plan begins when the own rank is ready."""

    def may_adopt(self, generation: int, words: Reduced) -> bool:
        """Broken."""
        return super().may_adopt(generation, words._replace(committed=self.committed))


class NoDrain(Agreement):
    """Variant: a drop moves `committed` at once."""

    def settle(self, busy: bool) -> None:
        """Broken."""
        super().settle(busy=False)


class NoDigest(Agreement):
    """Variant: digests are not compared."""

    def decide(self, words: Reduced) -> Decision:
        """Broken."""
        return super().decide(words._replace(greatest_digest=words.least_digest))


@pytest.mark.parametrize("variant", [DropAtOnce, NextPlanEarly, NoDrain, NoDigest])
def test_variants_break_an_invariant(variant: type[Agreement]) -> None:
    """The simulation's checks see each of the model's variants that is a matter of the agreement alone."""
    for seed in range(300):
        try:
            Simulation(3, 1 + seed % 3, seed, forked=seed % 2 == 0, agreement=variant).run(600)
        except AssertionError:
            return
    pytest.fail(f"{variant.__name__} was not seen")


@dataclass(frozen=True)
class Case:
    """One decision: plan held (0: none), `decided`, and a word (staged position, error, plan) of each rank."""

    held: int
    decided: int
    words: tuple[tuple[int, int, int], ...]


CASES = st.builds(
    Case,
    held=st.sampled_from([0, 1, 2]),
    decided=st.integers(0, 2),
    words=st.lists(
        st.tuples(st.integers(-1, 3), st.sampled_from([0, 0, 0, 1, 2, 3, 4]), st.sampled_from([0, 1, 1, 1, 2])),
        min_size=1,
        max_size=4,
    ).map(tuple),
)
GENERATION = 3
LAYERS = (0, 1, 0)
SWAPS = tuple((layer, (1, 0)) for layer in LAYERS)


@settings(max_examples=600, deadline=None)
@given(case=CASES)
def test_decide_is_the_models_decide(case: Case) -> None:
    """On any words of its generation or the one before, `decide` moves `decided` and keeps or ends the plan as the model does."""
    plans = tuple(states.Plan(GENERATION, ((0, (0, 1)), (1, (0, 1))), SWAPS) for _ in range(2))
    model = Model(states.Scenario("decide", (0,) * 2, ((0, 1), (0, 1)), plans))
    position = case.decided if case.held else 0
    agreement = Agreement()
    agreement.decided = agreement.staged = agreement.committed = counter(GENERATION, position)
    if case.held:
        agreement.adopt(Facts(GENERATION, case.held, LAYERS))
    now = states.counter(GENERATION, position)
    rank = model.initial().ranks[0]._replace(decided=now, staged=now, plan=case.held - 1)
    # a rank that has staged something of this generation holds a plan of it
    words = [(at, error, plan or (1 if at > 0 else 0)) for at, error, plan in case.words]
    model_words = [states.Word(_counter(states.counter, at), now, error, plan - 1) for at, error, plan in words]
    digests = [Facts(GENERATION, plan, LAYERS).digest if plan else NO_PLAN for _, _, plan in words]
    least = min(_counter(counter, at) for at, _, _ in words)
    reduced = Reduced(least, FIRST_COUNTER, max(error for _, error, _ in words), min(digests), max(digests))

    after = model.decide(rank, model_words, 0)
    agreement.decide(reduced)

    found = generation_of(agreement.decided), position_of(agreement.decided)
    assert found == (states.generation_of(after.decided), states.position_of(after.decided))
    assert (agreement.plan is None) == (after.plan == states.NO_PLAN)


def _counter(pack: object, position: int) -> int:
    assert callable(pack)
    return int(pack(GENERATION, position) if position >= 0 else pack(GENERATION - 1, 2))


def test_one_entry_is_committed_per_step() -> None:
    """I2: however much is staged, a step's words commit one entry, in plan order; the last ends the plan."""
    agreement = holding()
    decisions = [agreement.decide(staged(3)) for _ in range(3)]
    assert [decision.position for decision in decisions] == [1, 2, 3]
    assert agreement.decided == counter(2, 0)
    assert agreement.plan is None
    assert agreement.decide(staged(3)).verdict is Verdict.NOTHING


def test_an_error_wins_over_a_commit() -> None:
    """I2: when the words say both, the plan is dropped, up to the greatest generation that an error names."""
    agreement = holding()
    assert agreement.decide(staged(3, error=5)) == (Verdict.DROP, 0, 5, "a rank asked for it")
    assert agreement.decided == agreement.staged == counter(6, 0)
    assert agreement.committed == FIRST_COUNTER


def test_old_errors_do_nothing() -> None:
    """I11: an error for a generation below `decided` neither drops nor is taken up as a rank's own."""
    agreement = holding(1)
    agreement.decide(QUIET._replace(error=1))
    assert agreement.generation == 2
    assert not agreement.fail(1, "late")
    assert agreement.error == 0
    assert agreement.decide(QUIET._replace(error=1)).verdict is Verdict.NOTHING


def test_different_digests_drop_only_what_all_have_staged() -> None:
    """I2: contents are compared when min(staged) covers the next entry, not while some ranks have no plan yet."""
    agreement = holding()
    forked = (PLAN.digest, PLAN.digest + 1)
    assert agreement.decide(staged(0, digests=(NO_PLAN, PLAN.digest))).verdict is Verdict.NOTHING
    assert agreement.decide(staged(1, digests=forked)).verdict is Verdict.DROP


def test_own_error_lasts_until_decided_passes_it() -> None:
    """I5: the error stays in the word, no plan of that generation is adopted meanwhile, and nothing is dropped at once."""
    agreement = holding(1)
    assert agreement.fail(1, "first")
    assert not agreement.fail(1, "second")
    assert agreement.failed
    assert agreement.word() == (counter(1, 1), FIRST_COUNTER, 1, PLAN.digest)
    assert agreement.decide(staged(0)).verdict is Verdict.NOTHING
    agreement.decide(staged(0, error=1))
    assert not agreement.failed


def test_a_plan_begins_only_when_all_have_ended_the_one_before() -> None:
    """I4: the next generation, `decided` at its start, no plan held, min(committed) there too."""
    agreement = Agreement()
    assert agreement.may_adopt(1, QUIET)
    assert not agreement.may_adopt(2, QUIET)
    assert not agreement.may_adopt(0, QUIET)
    agreement.adopt(PLAN)
    assert not agreement.may_adopt(1, QUIET)
    agreement.decide(staged(0, error=1))
    assert not agreement.may_adopt(2, QUIET)
    assert agreement.may_adopt(2, QUIET._replace(committed=counter(2, 0)))


def test_committed_waits_for_the_device() -> None:
    """I1, I5: `committed` follows finished commits, and reaches the end of a plan only when nothing runs."""
    agreement = holding()
    for _ in range(3):
        agreement.decide(staged(3))
    agreement.finish_commit(1, 1)
    agreement.settle(busy=True)
    assert agreement.committed == counter(1, 1)
    agreement.settle(busy=False)
    assert agreement.committed == counter(2, 0)


def test_an_error_leaves_the_word_once_its_generation_is_decided() -> None:
    """I5: a rank that failed alone would else differ from all others for ever, and no step could take the short way."""
    agreement = Agreement()
    agreement.fail(1, "mine")
    assert agreement.word()[2] == 1
    agreement.decide(staged(0, error=1))
    assert agreement.word()[2] == 0

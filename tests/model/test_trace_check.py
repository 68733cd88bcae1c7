"""The trace checker accepts what the model does, and rejects what the broken variants do."""

import copy
from collections.abc import Callable

import pytest

from tests.model.agreement_model import VARIANTS
from tests.model.states import Scenario
from tests.model.trace_check import Verdict, check_traces
from tests.model.trace_events import Event, MalformedTrace
from tests.model.trace_walk import Walk, walk

S = 2
Change = Callable[[list[list[Event]], list[Event]], None]
# What the rules that traces cannot show would break, and where it is looked for instead: in every state of the model
# (test_agreement_model.py). board_reused_early shows only when a rank adopts from the board before it may.
NOT_IN_TRACES = {
    "board_reused_early": "a board's event can be put later; what breaks is a queued copy from the board",
    "no_drain": "pulls of a dropped plan leave no event",
    "no_rank_deadline": "liveness: nothing that happens is wrong, something never happens",
    "forward_after_loss": "a rank that goes on after PeerLost shows as a forward without its decision; walks lose no peers",
    "no_giving_up": "liveness; walks have no pulls that hang",
    "give_up_early": "walks have no pulls that hang; the bytes are wrong",
    "rows_kept": "walks have no pulls that hang; the bytes are wrong",
    "short_history": "memory of the words: the reader is slow, the values are right",
}
# what the checker says of the others, in at least one of their walks
IN_TRACES = {
    "counters_at_issue": "whose pull has not completed",
    "newest_words": "make `decided`",
    "daemon_decides": "make `decided`",
    "drop_at_once": "make `decided`",
    "rows_at_issue": "(d) no staging rows are free",
    "same_layer_early": "(I12) the entry before it",
    "next_plan_early": "(I4) a rank has not completed the plan before",
    "no_base": "(I4) the plan starts from other maps",
    "no_digest": "make `decided`",
    "local_words": "make `decided`",
    "vector_when_it_comes": "make `decided`",
}


def case(seed: int) -> Scenario:
    """Two or three ranks on one or two nodes, two layers, lag 1 to 3, one or two staging row sets, some faults; words of two
    nodes are reduced every 1 to 3 steps.
    """
    num_ranks = 2 + seed % 2
    nodes = (0,) * num_ranks if seed % 3 else (0,) + (1,) * (num_ranks - 1)
    start = (tuple(range(S * num_ranks)),) * 2
    few = Scenario("walk", nodes, start, (), crashes=1, failures=2, deadlines=3)
    every = 1 if seed % 3 else 1 + seed // 3 % 3
    return few._replace(lag=1 + seed % 3, rows=1 + seed % 2, forked=seed % 3 == 0, every=every)


def verdict_of(walked: Walk) -> Verdict:
    """What the checker says of a walk."""
    scenario = walked.scenario
    traces, daemons = walked.rank_traces, walked.daemon_trace
    lag, rows, nodes, every = scenario.lag, scenario.rows, scenario.nodes, scenario.every
    return check_traces(traces, daemons, scenario.start, S, lag, rows, nodes, every)


@pytest.mark.parametrize("seed", range(24))
def test_walks_of_the_model_are_accepted(seed: int) -> None:
    """Whatever the model does, the checker accepts, in about one point of the search for each event."""
    walked = walk(case(seed), seed, num_steps=60, max_plans=6)
    verdict = verdict_of(walked)
    num_events = sum(map(len, walked.rank_traces)) + len(walked.daemon_trace)
    assert verdict.accepted, str(verdict)
    assert walked.violations == []
    assert verdict.num_points < 20 * num_events


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_walks_of_the_model_are_accepted() -> None:
    """The same for 1,500 walks."""
    rejected = [seed for seed in range(1500) if not verdict_of(walk(case(seed), seed, 60, max_plans=6)).accepted]
    assert rejected == []


@pytest.mark.parametrize(("name", "reason"), IN_TRACES.items())
def test_walks_of_a_broken_variant_are_rejected(name: str, reason: str) -> None:
    """A variant whose behaviour breaks the specification is seen in traces, for the right reason; and no trace of it is
    accepted in which ranks used different maps or counters.
    """
    for seed in range(60):
        walked = walk(case(seed), seed, num_steps=40, broken=name, max_plans=6)
        verdict = verdict_of(walked)
        if any(text.startswith(("(a)", "(f)")) for text in walked.violations):
            assert not verdict.accepted, f"seed {seed}: {walked.violations}"
        if not verdict.accepted and reason in str(verdict):
            return
    pytest.fail(f"{name}: no walk was rejected because of: {reason}")


def test_every_variant_is_known_to_be_seen_or_not() -> None:
    """The two tables above cover all variants."""
    assert sorted([*IN_TRACES, *NOT_IN_TRACES]) == sorted(VARIANTS)


@pytest.mark.parametrize("name", sorted(NOT_IN_TRACES))
def test_the_rest_is_known_to_be_out_of_sight(name: str) -> None:
    """Traces of these variants look right: whoever relies on traces alone would miss them (see NOT_IN_TRACES)."""
    verdicts = [verdict_of(walk(case(seed), seed, 40, name, max_plans=6)).accepted for seed in range(12)]
    assert sum(verdicts) >= 11


def valid() -> Walk:
    """A walk in which all ranks commit several entries."""
    start = (tuple(range(4)),) * 2
    walked = walk(Scenario("valid", (0, 0), start, (), deadlines=0, aborts=False), 4, 40, max_plans=4)
    assert sum(event["event"] == "committed" for event in walked.rank_traces[0]) >= 4
    return walked


def first(events: list[Event], kind: str, number: int = 0) -> Event:
    """The event of that kind and number."""
    return [event for event in events if event["event"] == kind][number]


def _other_maps(ranks: list[list[Event]], _: list[Event]) -> None:
    event = first(ranks[1], "forward", 20)
    event["maps"] = [f"other {label}" for label in event["maps"]]


def _decides_late(ranks: list[list[Event]], _: list[Event]) -> None:
    changed = next(e for e in ranks[0] if e["event"] == "decide" and e["decided"] != [1, 0])
    changed["decided"] = [1, 0]


def _word_ahead(ranks: list[list[Event]], _: list[Event]) -> None:
    ranks[0].remove(first(ranks[0], "staged"))


def _commit_unseen(ranks: list[list[Event]], _: list[Event]) -> None:
    ranks[0].remove(first(ranks[0], "committed"))


def _foreign_plan(ranks: list[list[Event]], _: list[Event]) -> None:
    first(ranks[0], "adopt")["plan"] = "nobody's"


def _board_never_written(_: list[list[Event]], daemon: list[Event]) -> None:
    daemon.remove(first(daemon, "board"))


def _board_of_a_dead_daemon(_: list[list[Event]], daemon: list[Event]) -> None:
    daemon.insert(0, {"event": "crash"})


def _future_generation(_: list[list[Event]], daemon: list[Event]) -> None:
    for event in daemon:
        event["generation"] += 1


def _step_left_out(ranks: list[list[Event]], _: list[Event]) -> None:
    ranks[1].remove(first(ranks[1], "publish", 7))


def _abort_of_nobody(ranks: list[list[Event]], _: list[Event]) -> None:
    word = ranks[0].index(first(ranks[0], "adopt"))
    ranks[0].insert(word + 1, {"event": "error", "generation": 1, "why": "abort seen"})


def _error_kept_to_itself(ranks: list[list[Event]], _: list[Event]) -> None:
    word = ranks[0].index(first(ranks[0], "adopt"))
    ranks[0].insert(word + 1, {"event": "error", "generation": 1, "why": "deadline"})


CHANGES = {
    _other_maps: "(a) maps of the forward at step 20",
    _decides_late: "make `decided` [1, 1]",
    _word_ahead: "whose pull has not completed",
    _commit_unseen: "is beyond what has completed",
    _foreign_plan: "no board event has the plan",
    _board_never_written: "no board event has the plan",
    _board_of_a_dead_daemon: "the daemon is dead",
    _future_generation: "(I11) the ranks' counters ask for generation 1",
    _step_left_out: "not in this order",
    _abort_of_nobody: "(I11) no daemon has aborted this generation",
    _error_kept_to_itself: "the word's error is not what its rank has recorded",
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_one_changed_event_is_rejected(change: Change, reason: str) -> None:
    """A trace that was accepted is not accepted with one wrong event, and the verdict says where and why."""
    walked = valid()
    assert verdict_of(walked).accepted
    changed = copy.deepcopy(walked)
    change(changed.rank_traces, changed.daemon_trace)
    verdict = verdict_of(changed)
    assert not verdict.accepted
    assert reason in str(verdict)
    assert sum(verdict.taken) < sum(map(len, changed.rank_traces)) + len(changed.daemon_trace)


def test_cut_traces_are_accepted() -> None:
    """A process that was killed leaves a beginning of its trace, and the others stop within lag + 1 steps: allowed."""
    walked = valid()
    end = walked.rank_traces[0].index(first(walked.rank_traces[0], "publish", 17))
    walked.rank_traces[0][end + 1 :] = []
    last = walked.rank_traces[1].index(first(walked.rank_traces[1], "publish", 19)) + 1
    walked.rank_traces[1][last:] = []
    walked.daemon_trace[2:] = []
    assert verdict_of(walked).accepted


def test_a_rank_cannot_run_on_without_another() -> None:
    """I3: no rank decides on words that were not published."""
    walked = valid()
    end = walked.rank_traces[0].index(first(walked.rank_traces[0], "publish", 17))
    walked.rank_traces[0][end + 1 :] = []
    verdict = verdict_of(walked)
    assert not verdict.accepted
    assert "a word of step - lag is not published" in str(verdict)


def test_plan_announced_by_a_daemon_that_died_may_be_missing() -> None:
    """A daemon that dies after it announced a plan may have written it or not; the next one may publish in its place."""
    walked = valid()
    torn = {**first(walked.daemon_trace, "board"), "plan": "torn"}
    walked.daemon_trace[:0] = [torn, {"event": "crash"}, {"event": "restart"}]
    assert verdict_of(walked).accepted
    del walked.daemon_trace[1:3]
    assert not verdict_of(walked).accepted


def test_malformed_traces_are_named() -> None:
    """Two contents with one digest, or maps that do not fit the ranks, are errors of the recording."""
    walked = valid()
    board = first(walked.daemon_trace, "board")
    with pytest.raises(MalformedTrace, match="two plans"):
        check_traces(walked.rank_traces, [board, {**board, "entries": board["base"]}], walked.scenario.start, S, 1, 1)
    with pytest.raises(MalformedTrace, match="do not fit"):
        check_traces(walked.rank_traces, [], [[0, 1, 2]], S, 1, 1)

"""Real rank processes against the executable model: what they record must be a behaviour that the model allows.

The model's forbidden variants are planted by subclasses (tests/rank/variants.py). How each is caught:

    drop_at_once       the trace: `decided` is not what the words of step - lag make it
    newest_words       the trace, likewise
    same_layer_early   the trace: (I12), with commits of one rank delayed as on a GPU
    rows_at_issue      the trace: no staging rows are free; and wrong bytes in slots
    no_base            the trace: (I4), the plan starts from other maps
    no_digest          the maps of one step differ between ranks
    counters_at_issue  wrong bytes in slots (the trace says only what the variant believes)
    no_drain           a slot is overwritten while another rank reads it (traces do not show it, see tests/model)
    next_plan_early    with one board per group, the daemon itself waits for the slowest rank; the simulation in
                       test_agreement.py, where ranks have boards of their own, sees it
    daemon_decides     ranks read no order of a daemon, so there is nothing to leave out: the model only
    board_reused_early ranks copy the board before they decide: it is the daemon's rule, see tests/runtime; the model
    no_rank_deadline   liveness: nothing wrong happens; test_hook.py sees the deadline end a plan
    short_history      settings and words refuse it (test_membership.py); needs a reader slower than any test: the model
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eplb_async.core.placement import IntArray
from eplb_async.core.spec import MoESpec
from eplb_async.rank.hook import RankHook
from eplb_async.rank.transfer.shm import ShmTransfer
from tests.model.trace_check import Verdict, check_traces
from tests.rank.harness import Actor, RankGroup, hook_settings
from tests.rank.publisher import Publisher, shuffled
from tests.rank.tracing import Event, Gate, TracedHook, delay_commits, gate_pulls
from tests.rank.variants import (
    CountersAtIssue,
    DropAtOnce,
    NewestWords,
    NoBase,
    NoDigest,
    NoDrain,
    OtherPlan,
    RowsAtIssue,
    SameLayerEarly,
)

PAIR = MoESpec(num_layers=2, num_experts=6, num_ranks=2)
ROWS = 2


def events_of(actor: Actor) -> list[Event]:
    """What a rank recorded."""
    assert isinstance(actor.hook, TracedHook)
    return actor.hook.events


def slow_commits(actor: Actor, polls: int) -> None:
    """Commits of this rank run late."""
    delay_commits(actor.hook._parts.transfer, polls)


def give_up(actor: Actor, generation: int) -> None:
    """This rank wants a generation dropped."""
    actor.hook._fail(generation, "told to")


def close_gate(actor: Actor) -> None:
    """Pulls of this rank wait in the middle."""
    vars(actor)["gate"] = gate_pulls(actor.hook._parts.transfer)


def wait_for_pull(actor: Actor) -> bool:
    """True once a pull is at the gate."""
    gate: Gate = vars(actor)["gate"]
    return gate.entered.wait(20.0)


def open_gate(actor: Actor) -> int:
    """Let pulls go on; the number of those whose source was overwritten meanwhile."""
    gate: Gate = vars(actor)["gate"]
    gate.opened.set()
    transfer = actor.hook._parts.transfer
    assert isinstance(transfer, ShmTransfer)
    stream = transfer.stream
    # a job behind them: it ends after they have
    end = stream.submit(lambda: None)
    while not end.done:
        gate.opened.wait(0.001)
    return len(gate.overwritten)


def verdict(ranks: RankGroup, daemon: Publisher, start: list[list[int]], rows: int = ROWS) -> Verdict:
    """What the checker says of everything recorded; `rows`: entries that fit the staging rows of a rank."""
    traces, info = ranks.all("call", events_of), daemon.words.info
    return check_traces(traces, daemon.trace, start, info.spec.slots_per_rank, info.lag, rows)


def rolled(daemon: Publisher, layer: int, by: int = 1) -> tuple[int, IntArray]:
    """A change that moves every expert of a layer `by` ranks on."""
    return layer, np.roll(daemon.rows_LP[layer], by * daemon.spec.slots_per_rank)


def exchanged(daemon: Publisher, layer: int) -> tuple[int, IntArray]:
    """A change that swaps the first experts of two ranks."""
    row_P, width = daemon.rows_LP[layer].copy(), daemon.spec.slots_per_rank
    row_P[[0, width]] = row_P[[width, 0]]
    return layer, row_P


@pytest.mark.parametrize(("num_ranks", "lag"), [(2, 1), (2, 2), (3, 3)])
def test_commits_are_a_behaviour_of_the_model(group: str, runtime_dir: Path, num_ranks: int, lag: int) -> None:
    """Several plans, with layers in several entries and devices of different speed."""
    spec = MoESpec(num_layers=2, num_experts=2 * num_ranks, num_ranks=num_ranks, num_redundant=num_ranks)
    settings = hook_settings(runtime_dir, lag=lag, staging_rows=ROWS)
    with RankGroup(group, spec, settings, hook_class=TracedHook) as ranks:
        ranks.attach()
        ranks.ask(1, "call", slow_commits, 4)
        daemon, random = Publisher(group, spec), np.random.default_rng(lag)
        start = daemon.rows_LP.tolist()
        for _ in range(4):
            changes = [(layer, shuffled(daemon.rows_LP[layer], random, spec)) for layer in (0, 1)]
            plan = daemon.post(daemon.plan(changes))
            ranks.step_until(daemon.done)
            daemon.applied(plan)
        assert ranks.rows() == daemon.rows_LP.tolist()
        ranks.check()
        found = verdict(ranks, daemon, start)
        daemon.close()
    assert found.accepted, str(found)


def _failed_pull(ranks: RankGroup, daemon: Publisher) -> None:
    """A rank fails in the middle of its pulls: the gate keeps the plan from being committed before it does."""
    ranks.ask(1, "call", close_gate)
    daemon.post(daemon.plan([rolled(daemon, 0)]))
    ranks.step_until(lambda: ranks.ask(1, "call", _holds_a_plan))
    ranks.ask(1, "call", give_up, 1)
    ranks.ask(1, "call", open_gate)


def _aborted(ranks: RankGroup, daemon: Publisher) -> None:
    daemon.post(daemon.plan([rolled(daemon, 0), rolled(daemon, 1)]))
    daemon.abort(1)


def _restarted(ranks: RankGroup, daemon: Publisher) -> None:
    """A daemon dies in the middle of writing; the next one aborts nothing, since nothing whole is there."""
    sequence = daemon.board.sequence
    daemon.board._atomics.store_then_fence(daemon.board._address, sequence | 1)
    ranks.step(8)
    daemon.trace += [{"event": "crash"}, {"event": "restart"}]
    daemon.post(daemon.plan([rolled(daemon, 1)]))
    daemon.trace.append({"event": "abort", "generation": 1})
    daemon.board.order_abort(1)


def _late(ranks: RankGroup, daemon: Publisher) -> None:
    """A rank's transfer hangs, and its deadline in steps ends the plan."""
    ranks.ask(0, "call", close_gate)
    daemon.post(daemon.plan([rolled(daemon, 0)]))
    assert ranks.step_until(lambda: ranks.ask(0, "statistics_of", "num_drops") == 1)
    ranks.ask(0, "call", open_gate)


def _refused(ranks: RankGroup, daemon: Publisher) -> None:
    """A plan that was computed from other maps."""
    right = daemon.rows_LP.copy()
    daemon.rows_LP[0] = np.roll(daemon.rows_LP[0], 1)
    daemon.post(daemon.plan([rolled(daemon, 0)]))
    daemon.rows_LP = right


def _holds_a_plan(actor: Actor) -> bool:
    return actor.hook._agreement.plan is not None


@pytest.mark.parametrize("happens", [_failed_pull, _aborted, _restarted, _late, _refused])
def test_drops_are_a_behaviour_of_the_model(
    group: str, runtime_dir: Path, happens: Callable[[RankGroup, Publisher], None]
) -> None:
    """However a plan ends early, all ranks drop it, serve on, and the next one is committed."""
    settings = hook_settings(runtime_dir, staging_rows=ROWS, plan_deadline_steps=200, pull_bytes_per_step=1)
    with RankGroup(group, PAIR, settings, hook_class=TracedHook) as ranks:
        ranks.attach()
        daemon = Publisher(group, PAIR)
        start = daemon.rows_LP.tolist()
        happens(ranks, daemon)
        ranks.step_until(daemon.done)
        assert ranks.rows() == start
        plan = daemon.post(daemon.plan([rolled(daemon, 1)]))
        assert plan.generation == 2
        ranks.step_until(daemon.done)
        daemon.applied(plan)
        assert ranks.rows() == daemon.rows_LP.tolist()
        ranks.check()
        found = verdict(ranks, daemon, start)
        daemon.close()
    assert found.accepted, str(found)


def variant_group(group: str, runtime_dir: Path, hook_class: type[RankHook], **fields: object) -> RankGroup:
    """Two ranks of a variant that do not verify bytes, so that nothing but the missing rule stops them."""
    settings = hook_settings(runtime_dir, staging_rows=ROWS, verify="off", **fields)
    return RankGroup(group, PAIR, settings, hook_class=hook_class)


def outcomes_until_done(ranks: RankGroup, daemon: Publisher) -> list[list[tuple[int, int]]]:
    """Step until the plan is done, whatever the maps are; what each rank's steps returned."""
    steps: list[list[tuple[int, int]]] = [[] for _ in ranks.processes]
    while not daemon.done():
        for rank, found in enumerate(ranks.outcomes("step", 10)):
            steps[rank] += found
    return steps


def test_drop_at_once_is_caught(group: str, runtime_dir: Path) -> None:
    """I2: a rank that drops on its own error alone decides something else than the words say."""
    with variant_group(group, runtime_dir, DropAtOnce, pull_bytes_per_step=1) as ranks:
        ranks.attach()
        daemon = Publisher(group, PAIR)
        start = daemon.rows_LP.tolist()
        _failed_pull(ranks, daemon)
        outcomes_until_done(ranks, daemon)
        found = verdict(ranks, daemon, start)
        daemon.close()
    assert "make `decided`" in str(found)


def test_newest_words_are_caught(group: str, runtime_dir: Path) -> None:
    """I2: a rank that acts on the newest words is ahead of what the words of step - lag say."""
    with variant_group(group, runtime_dir, NewestWords, lag=3) as ranks:
        ranks.attach()
        daemon = Publisher(group, PAIR)
        start = daemon.rows_LP.tolist()
        daemon.post(daemon.plan([rolled(daemon, 0), rolled(daemon, 1)]))
        outcomes_until_done(ranks, daemon)
        found = verdict(ranks, daemon, start)
        daemon.close()
    assert "make `decided`" in str(found)


@pytest.mark.parametrize("hook_class", [TracedHook, SameLayerEarly])
def test_same_layer_early_is_caught(group: str, runtime_dir: Path, hook_class: type[RankHook]) -> None:
    """I12: with rank 1's commits late, a second entry of the layer must wait for them on rank 0."""
    with variant_group(group, runtime_dir, hook_class) as ranks:
        ranks.attach()
        ranks.ask(1, "call", slow_commits, 40)
        daemon = Publisher(group, PAIR)
        start = daemon.rows_LP.tolist()
        daemon.post(daemon.plan([exchanged(daemon, 0), (0, daemon.rows_LP[0])]))
        ranks.step_until(daemon.done)
        ranks.step(40)
        found = verdict(ranks, daemon, start)
        wrong = [line for lines in ranks.all("check") for line in lines]
        daemon.close()
    if hook_class is TracedHook:
        assert found.accepted, str(found)
        assert not wrong
    else:
        assert "(I12)" in str(found)
        assert wrong


@pytest.mark.parametrize("hook_class", [TracedHook, RowsAtIssue])
def test_rows_at_issue_are_caught(group: str, runtime_dir: Path, hook_class: type[RankHook]) -> None:
    """I13: with late commits, staging rows that are given out at the issue are overwritten before they were copied."""
    with variant_group(group, runtime_dir, hook_class) as ranks:
        ranks.attach()
        ranks.all("call", slow_commits, 40)
        daemon = Publisher(group, PAIR)
        start = daemon.rows_LP.tolist()
        changes = []
        for layer in (0, 1):
            swapped = daemon.rows_LP[layer].copy()
            swapped[[0, 1, 3, 4]] = swapped[[3, 4, 0, 1]]
            changes.append((layer, swapped))
        daemon.post(daemon.plan(changes))
        ranks.step_until(daemon.done)
        # each entry needs both staging rows
        found = verdict(ranks, daemon, start, rows=1)
        wrong = [line for lines in ranks.all("check") for line in lines]
        daemon.close()
    if hook_class is TracedHook:
        assert found.accepted, str(found)
        assert not wrong
    else:
        assert "(d) no staging rows are free" in str(found)
        assert wrong


def test_no_base_is_caught(group: str, runtime_dir: Path) -> None:
    """I4: a plan computed from other maps pulls the wrong experts."""
    with variant_group(group, runtime_dir, NoBase) as ranks:
        ranks.attach()
        daemon = Publisher(group, PAIR)
        start = daemon.rows_LP.tolist()
        _refused(ranks, daemon)
        daemon.trace[-1]["base"] = [[0, np.roll(start[0], 1).tolist()]]
        ranks.step_until(daemon.done)
        found = verdict(ranks, daemon, start)
        wrong = [line for lines in ranks.all("check") for line in lines]
        daemon.close()
    assert "(I4) the plan starts from other maps" in str(found)
    assert wrong


@pytest.mark.parametrize("hook_class", [OtherPlan, NoDigest])
def test_no_digest_is_caught(group: str, runtime_dir: Path, hook_class: type[RankHook]) -> None:
    """I2: two contents of one generation are dropped by their digests; without, ranks commit different maps."""
    with variant_group(group, runtime_dir, hook_class) as ranks:
        ranks.attach()
        daemon = Publisher(group, PAIR)
        daemon.post(daemon.plan([exchanged(daemon, 0), exchanged(daemon, 1)]))
        steps = outcomes_until_done(ranks, daemon)
        drops = [ranks.ask(rank, "statistics_of", "num_drops") for rank in range(2)]
        daemon.close()
    assert (steps[0] == steps[1]) == (hook_class is OtherPlan)
    assert drops == ([1, 1] if hook_class is OtherPlan else [0, 0])


@pytest.mark.parametrize("hook_class", [TracedHook, CountersAtIssue])
def test_counters_at_issue_are_caught(group: str, runtime_dir: Path, hook_class: type[RankHook]) -> None:
    """I1: with a slow transfer, a rank that counts issued copies commits staging rows that hold nothing yet."""
    with variant_group(group, runtime_dir, hook_class) as ranks:
        ranks.attach()
        ranks.ask(0, "call", close_gate)
        daemon = Publisher(group, PAIR)
        daemon.post(daemon.plan([exchanged(daemon, 0)]))
        ranks.step_until(lambda: ranks.ask(0, "call", _holds_a_plan) or daemon.done())
        ranks.step(30)
        committed = daemon.done()
        ranks.ask(0, "call", open_gate)
        ranks.step_until(daemon.done)
        wrong = [line for lines in ranks.all("check") for line in lines]
        daemon.close()
    assert committed == bool(wrong) == (hook_class is CountersAtIssue)


@pytest.mark.parametrize("hook_class", [TracedHook, NoDrain])
def test_no_drain_is_caught(group: str, runtime_dir: Path, hook_class: type[RankHook]) -> None:
    """I5: after a drop, the next plan waits for pulls that still read; else it overwrites their source."""
    with variant_group(group, runtime_dir, hook_class, plan_deadline_steps=20) as ranks:
        ranks.attach()
        ranks.ask(1, "call", close_gate)
        daemon = Publisher(group, PAIR)
        # slot 3 of rank 1 pulls expert 0 from slot 0 of rank 0, and hangs
        daemon.post(daemon.plan([exchanged(daemon, 0)]))
        ranks.step_until(lambda: ranks.ask(0, "statistics_of", "num_drops") == 1)
        assert ranks.ask(1, "call", wait_for_pull)
        ranks.step(20)
        early = daemon.done(1)
        if early:
            # inside rank 0, so that nothing of it comes through the gate
            inside = daemon.rows_LP[0].copy()
            inside[[0, 1]] = inside[[1, 0]]
            daemon.post(daemon.plan([(0, inside)]))
            ranks.step_until(daemon.done)
        overwritten = ranks.ask(1, "call", open_gate)
        ranks.step_until(daemon.done)
        daemon.close()
    assert early == bool(overwritten) == (hook_class is NoDrain)

"""Groups on two nodes, in real processes: plans that cross them, and every way in which a plan ends early."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from eplb_async.core.errors import SpecMismatch
from eplb_async.core.placement import IntArray, initial_placement
from eplb_async.rank.matched_stager import MatchedStager
from eplb_async.shm.live import LivePlacement
from tests.conftest import segments_left
from tests.rank.harness import Actor
from tests.rank.nodes import FOUR, PLAIN, Daemons, NodeGroup, close_link, hold_link, release_link
from tests.rank.publisher import shuffled


def swapped(daemons: Daemons, layer: int, one: int, other: int) -> tuple[int, IntArray]:
    """A change that exchanges the experts of the first slots of two ranks."""
    row_P, width = daemons.rows_LP[layer].copy(), FOUR.slots_per_rank
    row_P[[one * width, other * width]] = row_P[[other * width, one * width]]
    return layer, row_P


def crossing(daemons: Daemons) -> list[tuple[int, IntArray]]:
    """Ranks 0 and 1 exchange with 2 and 3 in layer 0; in layer 1 rank 0 with 1, and 2 with 3."""
    first, second = swapped(daemons, 0, 0, 2)[1], swapped(daemons, 1, 0, 1)[1]
    width = FOUR.slots_per_rank
    first[[width, 3 * width]] = first[[3 * width, width]]
    second[[2 * width, 3 * width]] = second[[3 * width, 2 * width]]
    return [(0, first), (1, second)]


def commit_next(ranks: NodeGroup, daemons: Daemons) -> None:
    """A further plan is committed, and all slots hold what they should."""
    plan = daemons.post(daemons.plan(crossing(daemons)))
    ranks.step_until(lambda: daemons.done(plan.generation))
    daemons.applied(plan)
    assert ranks.rows() == daemons.rows_LP.tolist()
    ranks.check()


def received(actor: Actor) -> tuple[int, int]:
    """Rows that came from other nodes, and all rows."""
    stager = actor.hook._parts.stager
    assert isinstance(stager, MatchedStager)
    return stager._between.rows_received, stager.rows_pulled


@pytest.mark.parametrize(("every", "lag", "one_peer"), [(1, 2, True), (4, 1, False)])
def test_plans_across_nodes_are_committed(group: str, runtime_dir: Path, every: int, lag: int, one_peer: bool) -> None:
    """Moves inside and between nodes in one plan and one entry: right bytes, and equal maps at every step on all ranks."""
    fields: dict[str, Any] = {"reduce_every": every, "lag": lag, "one_peer_at_a_time": one_peer, "staging_rows": 2}
    with NodeGroup(group, FOUR, runtime_dir, pull_bytes_per_step=1, **fields) as ranks:
        ranks.attach()
        daemons, random = Daemons(ranks), np.random.default_rng(every)
        assert len({daemon.words.incarnation for daemon in daemons.each}) == 1
        for generation in (1, 2, 3):
            plan = daemons.plan([(layer, shuffled(daemons.rows_LP[layer], random, FOUR)) for layer in (0, 1)])
            daemons.post(plan)
            steps = ranks.step_until(partial(daemons.done, generation))
            daemons.applied(plan)
            # one entry per step, k or not
            assert len({digest for _, digest in steps}) <= len(plan.entries) + 1
            assert ranks.rows() == daemons.rows_LP.tolist()
            ranks.check()
        for daemon in daemons.each:
            live = LivePlacement.open(daemon.words.info.group, FOUR, daemon.words.incarnation)
            found = live.read()
            live.close()
            assert found is not None
            assert found[0].tolist() == daemons.rows_LP.tolist()
        for other, all_rows in ranks.all("call", received):
            assert 0 < other < all_rows
        assert ranks.all("statistics_of", "num_drops") == [0] * 4
        daemons.close()


def corrupt(actor: Actor, layer: int, slot: int) -> None:
    """Change the bytes of an own slot, or change them back."""
    assert actor.weights is not None
    actor.weights[layer]["packed"][slot] ^= 1


def _failed_pull(ranks: NodeGroup, daemons: Daemons) -> str:
    """The bytes that rank 3 sends to rank 1 are not the expert's."""
    ranks.ask(3, "call", corrupt, 0, 0)
    daemons.post(daemons.plan(crossing(daemons)))
    ranks.step_until(daemons.done)
    ranks.ask(3, "call", corrupt, 0, 0)
    return str(ranks.ask(1, "statistics_of", "last_error"))


def _abort_on_one_node(ranks: NodeGroup, daemons: Daemons) -> str:
    daemons.each[1].abort(1)
    daemons.post(daemons.plan(crossing(daemons)))
    ranks.step_until(daemons.done)
    return str(ranks.ask(2, "statistics_of", "last_error"))


def _board_of_one_node(ranks: NodeGroup, daemons: Daemons) -> str:
    daemons.post(daemons.plan(crossing(daemons)), nodes=[1])
    ranks.step_until(daemons.done)
    return str(ranks.ask(3, "statistics_of", "last_error"))


def _two_contents(ranks: NodeGroup, daemons: Daemons) -> str:
    """Both nodes have a plan of generation 1, and their layers are in another order."""
    changes = crossing(daemons)
    daemons.each[0].post(daemons.plan(changes))
    daemons.each[1].post(daemons.plan(changes[::-1]))
    ranks.step_until(daemons.done)
    return str(ranks.ask(0, "statistics_of", "last_error"))


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
    ("happens", "why"),
    [
        (_failed_pull, "from rank 3 slot 0: received bytes do not match"),
        (_abort_on_one_node, "a daemon aborted it"),
        (_board_of_one_node, "not done after 200 steps"),
        (_two_contents, "the nodes hold different plans of generation 1"),
    ],
)
def test_drops_are_the_same_everywhere(
    group: str, runtime_dir: Path, every: int, happens: Callable[[NodeGroup, Daemons], str], why: str
) -> None:
    """I5, I6, I11, I2: whatever one node alone knows of, all ranks drop the plan at one step, and the next is committed."""
    with NodeGroup(group, PLAIN, runtime_dir, reduce_every=every, plan_deadline_steps=200) as ranks:
        ranks.attach()
        daemons = Daemons(ranks)
        start = daemons.rows_LP.tolist()
        assert why in happens(ranks, daemons)
        assert ranks.all("statistics_of", "num_drops") == [1] * 4
        assert ranks.rows() == start
        commit_next(ranks, daemons)
        daemons.close()


def give_up(actor: Actor, generation: int) -> None:
    """This rank wants a generation dropped."""
    actor.hook._fail(generation, "told to")


def test_what_was_begun_ends_after_a_drop(group: str, runtime_dir: Path) -> None:
    """I7, I5: a rank whose transfer hangs keeps the next plan back, not the forward; when it goes on, sends and receives of
    the dropped plan still meet, and what comes later is right.
    """
    with NodeGroup(group, PLAIN, runtime_dir) as ranks:
        ranks.attach()
        ranks.ask(2, "call", hold_link)
        daemons = Daemons(ranks)
        daemons.post(daemons.plan(crossing(daemons)))
        ranks.step_until(lambda: all(rows for rows, _ in ranks.all("call", received)))
        ranks.ask(1, "call", give_up, 1)
        ranks.step_until(lambda: ranks.all("statistics_of", "num_drops") == [1] * 4)
        ranks.step(30)
        # 0 waits for 2; 1 and 3 have exchanged theirs
        assert ranks.all("statistics_of", "draining") == [True, False, True, False]
        assert not daemons.done()
        ranks.ask(2, "call", release_link)
        ranks.step_until(daemons.done)
        commit_next(ranks, daemons)
        daemons.close()


def test_a_rank_that_has_failed_takes_part_until_the_drop(group: str, runtime_dir: Path) -> None:
    """I7: its error is out after its plan's digest, so the others begin; what they send and wait for, it takes and gives."""
    with NodeGroup(group, PLAIN, runtime_dir, lag=6) as ranks:
        ranks.attach()
        daemons = Daemons(ranks)
        daemons.post(daemons.plan(crossing(daemons)))
        ranks.step_until(lambda: ranks.all("statistics_of", "num_plans") == [1] * 4, count=1)
        ranks.step(1)
        ranks.ask(1, "call", give_up, 1)
        assert not any(rows for rows, _ in ranks.all("call", received))
        ranks.step_until(daemons.done, most=300)
        assert ranks.all("statistics_of", "num_drops") == [1] * 4
        assert all(rows for rows, _ in ranks.all("call", received))
        commit_next(ranks, daemons)
        daemons.close()


def test_a_broken_connection_drops_the_plan(group: str, runtime_dir: Path) -> None:
    """I5: weights that cannot be exchanged end the plan on all ranks, not the words; what moves inside a node still does."""
    with NodeGroup(group, PLAIN, runtime_dir) as ranks:
        ranks.attach()
        ranks.ask(2, "call", close_link)
        daemons = Daemons(ranks)
        daemons.post(daemons.plan(crossing(daemons)))
        ranks.step_until(daemons.done)
        assert ranks.all("statistics_of", "num_drops") == [1] * 4
        assert "could not be exchanged between nodes" in ranks.ask(2, "statistics_of", "last_error")
        plan = daemons.post(daemons.plan([swapped(daemons, 0, 0, 1), swapped(daemons, 1, 2, 3)]))
        ranks.step_until(lambda: daemons.done(plan.generation))
        daemons.applied(plan)
        assert ranks.rows() == daemons.rows_LP.tolist()
        ranks.check()
        daemons.close()


def _other_rows(ranks: NodeGroup) -> None:
    settings = ranks.options[3].settings
    hook = msgspec.structs.replace(settings.hook, staging_rows=2)
    ranks.ask(3, "call", set_settings, msgspec.structs.replace(settings, hook=hook))


def _other_placement(ranks: NodeGroup) -> None:
    ranks.ask(2, "call", set_placement, np.roll(initial_placement(PLAIN), 1, axis=1))


def set_settings(actor: Actor, settings: object) -> None:
    """Attach with these."""
    object.__setattr__(actor.options, "settings", settings)


def set_placement(actor: Actor, placement: IntArray) -> None:
    """Attach with this."""
    object.__setattr__(actor.options, "placement", placement)


@pytest.mark.parametrize(
    ("change", "why"), [(_other_rows, "staging_rows is 3 here and 2 in the group"), (_other_placement, "placement")]
)
def test_a_mismatch_between_nodes_is_named(
    group: str, runtime_dir: Path, change: Callable[[NodeGroup], None], why: str
) -> None:
    """SpecMismatch on every rank, and nothing but the weights is left."""
    with NodeGroup(group, PLAIN, runtime_dir) as ranks:
        change(ranks)
        errors = ranks.outcomes("attach")
        assert [type(error) for error in errors] == [SpecMismatch] * 4
        assert why in str(errors[0])
        assert all("weights." in name for name in segments_left(group))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("every", "lag", "one_peer"), [(1, 1, True), (3, 2, False), (2, 3, True)])
def test_many_plans_with_drops_at_random_steps(
    group: str, runtime_dir: Path, every: int, lag: int, one_peer: bool
) -> None:
    """Whenever a rank gives up, all have committed the same entries, and every slot holds its expert."""
    fields: dict[str, Any] = {"reduce_every": every, "lag": lag, "one_peer_at_a_time": one_peer, "staging_rows": 2}
    with NodeGroup(group, FOUR, runtime_dir, pull_bytes_per_step=1, **fields) as ranks:
        ranks.attach()
        daemons, random = Daemons(ranks), np.random.default_rng(lag)
        before = 0
        for generation in range(1, 41):
            plan = daemons.plan([(layer, shuffled(daemons.rows_LP[layer], random, FOUR)) for layer in (0, 1)])
            daemons.post(plan)
            if random.random() < 0.6:
                ranks.step(int(random.integers(1, 40)))
                ranks.ask(int(random.integers(4)), "call", give_up_if_current, generation)
            ranks.step_until(partial(daemons.done, generation))
            commits = set(ranks.all("statistics_of", "num_commits"))
            assert len(commits) == 1
            daemons.applied(plan, commits.copy().pop() - before)
            before = commits.pop()
            assert ranks.rows() == daemons.rows_LP.tolist()
            ranks.check()
        assert 0 < ranks.ask(0, "statistics_of", "num_drops") < 40
        daemons.close()


def give_up_if_current(actor: Actor, generation: int) -> None:
    """As `give_up`, unless the plan is done."""
    if actor.hook._agreement.generation == generation:
        give_up(actor, generation)

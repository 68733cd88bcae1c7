"""Plans on several real ranks: commits at the same step everywhere, drops everywhere, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eplb_async.core.placement import EMPTY, IntArray, weighted_dispatch_row
from eplb_async.core.plan import Plan, encode_plan
from eplb_async.core.spec import MoESpec
from eplb_async.rank.plan_reader import BadPlan
from tests.rank.harness import Actor, RankGroup, hook_settings
from tests.rank.publisher import Publisher, changed_entry, shuffled

PAIR = MoESpec(num_layers=2, num_experts=6, num_ranks=2, num_redundant=2)
FOUR = MoESpec(num_layers=3, num_experts=10, num_ranks=4, num_redundant=6)


def corrupt(actor: Actor, layer: int, slot: int) -> None:
    """Change the bytes of an own slot."""
    assert actor.weights is not None
    actor.weights[layer]["packed"][slot] ^= 1


def tables(actor: Actor) -> tuple[list[list[list[int]]], list[list[int]]]:
    """The dispatch table and its lengths."""
    return actor.hook.dispatch_table_LEK.tolist(), actor.hook.dispatch_count_LE.tolist()


def swap(daemon: Publisher, layer: int) -> tuple[int, IntArray]:
    """Exchange the first slots of ranks 0 and 1."""
    row_P, width = daemon.rows_LP[layer].copy(), daemon.spec.slots_per_rank
    row_P[[0, width]] = row_P[[width, 0]]
    return layer, row_P


def commit_next(ranks: RankGroup, daemon: Publisher) -> None:
    """A further plan is committed, and all slots hold what they should."""
    plan = daemon.post(daemon.plan([swap(daemon, layer) for layer in range(daemon.spec.num_layers)]))
    ranks.step_until(daemon.done)
    daemon.applied(plan)
    assert ranks.rows() == daemon.rows_LP.tolist()
    ranks.check()


@pytest.mark.parametrize(
    ("spec", "lag", "staging_rows"), [(PAIR, 1, 2), (PAIR, 3, 0), (FOUR, 2, 2), (FOUR, 1, 0)], ids=str
)
def test_plans_are_committed_alike(group: str, runtime_dir: Path, spec: MoESpec, lag: int, staging_rows: int) -> None:
    """Random placements with empty slots and replicas, several entries a layer: equal maps in each step (RankGroup.step),
    the wanted ones at the end, and every slot with its expert's bytes.
    """
    settings = hook_settings(runtime_dir, lag=lag, staging_rows=staging_rows, pull_bytes_per_step=500)
    with RankGroup(group, spec, settings) as ranks:
        ranks.attach()
        daemon, random = Publisher(group, spec), np.random.default_rng(lag)
        for generation in range(1, 6):
            changes = []
            for layer in range(spec.num_layers):
                row_P = daemon.rows_LP[layer].copy()
                spare = np.flatnonzero([(row_P == expert).sum() > 1 or expert == EMPTY for expert in row_P])
                row_P[spare[0]] = EMPTY if generation % 2 else int(random.integers(spec.num_experts))
                changes.append((layer, shuffled(row_P, random, spec)))
            plan = daemon.post(daemon.plan(changes))
            steps = ranks.step_until(daemon.done)
            daemon.applied(plan)
            # one entry per step
            assert len({digest for _, digest in steps}) <= len(plan.entries) + 1
            assert ranks.rows() == daemon.rows_LP.tolist()
            ranks.check()
        assert ranks.ask(0, "statistics_of", "num_drops") == 0
        daemon.close()


def test_ranks_with_nothing_to_pull_take_part(group: str, runtime_dir: Path) -> None:
    """A plan that concerns one rank alone is committed by all at the same step."""
    with RankGroup(group, FOUR, hook_settings(runtime_dir)) as ranks:
        ranks.attach()
        daemon = Publisher(group, FOUR)
        row_P = daemon.rows_LP[1].copy()
        row_P[[4, 5]] = row_P[[5, 4]]
        plan = daemon.post(daemon.plan([(1, row_P)]))
        ranks.step_until(daemon.done)
        daemon.applied(plan)
        assert ranks.all("statistics_of", "rows_pulled") == [0, 2, 0, 0]
        assert ranks.rows() == daemon.rows_LP.tolist()
        ranks.check()
        daemon.close()


def test_weighted_dispatch_rows_arrive(group: str, runtime_dir: Path) -> None:
    """Rows in which a slot stands several times reach the router's tensors of all ranks, with their lengths."""
    spec = MoESpec(num_layers=1, num_experts=2, num_ranks=2, num_redundant=2, table_length=4)
    with RankGroup(group, spec, hook_settings(runtime_dir)) as ranks:
        ranks.attach()
        daemon = Publisher(group, spec)
        row_P = np.array([1, 0, 0, 1], dtype=np.int32)
        table_EK, count_E = np.full((2, 4), -1, dtype="<i4"), np.zeros(2, dtype="<i4")
        for expert, (slots, weights) in enumerate([([1, 2], [2.0, 1.0]), ([0, 3], [1.0, 3.0])]):
            row = weighted_dispatch_row(np.array(slots, dtype=np.int32), np.array(weights), 4)
            table_EK[expert, : len(row)], count_E[expert] = row, len(row)
        plan = daemon.plan([(0, row_P)])
        daemon.post(changed_entry(plan, 1, table=table_EK.tobytes(), count=count_E.tobytes()))
        ranks.step_until(daemon.done)
        assert ranks.all("call", tables) == [([[[1, 1, 2, -1], [0, 3, 3, 3]]], [[3, 4]])] * 2
        ranks.check()
        daemon.close()


def test_bytes_that_are_not_the_experts_drop_the_plan(group: str, runtime_dir: Path) -> None:
    """I5: a source that changed after attach fails the pull on one rank; all drop the rest at one step and serve on."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir)) as ranks:
        ranks.attach()
        daemon = Publisher(group, PAIR)
        start = daemon.rows_LP.copy()
        ranks.ask(1, "call", corrupt, 1, 0)
        plan = daemon.post(daemon.plan([swap(daemon, 0), swap(daemon, 1)]))
        ranks.step_until(daemon.done)
        assert ranks.all("statistics_of", "num_drops") == [1, 1]
        assert "layer 1 expert 4 tensor 2 from rank 1 slot 0" in ranks.ask(0, "statistics_of", "last_error")
        daemon.applied(plan, ranks.ask(0, "statistics_of", "num_commits"))
        assert ranks.rows()[1] == start[1].tolist()
        ranks.ask(1, "call", corrupt, 1, 0)
        ranks.check()
        daemon.post(daemon.plan([swap(daemon, 1)]))
        ranks.step_until(daemon.done)
        ranks.check()
        daemon.close()


def test_without_verification_bytes_are_taken_as_they_are(group: str, runtime_dir: Path) -> None:
    """Verify off: nothing is compared, so a changed expert moves like any other."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir, verify="off")) as ranks:
        ranks.attach()
        daemon = Publisher(group, PAIR)
        ranks.ask(1, "call", corrupt, 1, 0)
        daemon.post(daemon.plan([swap(daemon, 1)]))
        ranks.step_until(daemon.done)
        assert ranks.all("statistics_of", "num_commits") == [1, 1]
        assert [len(lines) for lines in ranks.all("check")] == [1, 0]
        daemon.close()


def _bad_checksum(daemon: Publisher, plan: Plan) -> None:
    daemon.post(plan)
    daemon.board._plan[40] ^= 1


def _wrong_base(daemon: Publisher, plan: Plan) -> None:
    daemon.post(changed_entry(plan, 2, base_version=7))


def _lost_expert(daemon: Publisher, plan: Plan) -> None:
    row_P = plan.entries[0].slot_to_expert_P.copy()
    row_P[row_P == 5] = 4
    daemon.post(changed_entry(plan, 1, slots=row_P.tobytes()))


def _not_a_plan(daemon: Publisher, plan: Plan) -> None:
    daemon.board.post(plan.generation, b"\xc1 garbage")


def _other_number(daemon: Publisher, plan: Plan) -> None:
    daemon.board.post(
        plan.generation, encode_plan(Plan(incarnation=plan.incarnation, generation=9, entries=plan.entries))
    )


@pytest.mark.parametrize("post", [_bad_checksum, _wrong_base, _lost_expert, _not_a_plan, _other_number])
def test_a_plan_that_does_not_fit_is_dropped_by_all(
    group: str, runtime_dir: Path, post: Callable[[Publisher, Plan], None]
) -> None:
    """I4, I5: damaged, invalid, or from other maps: refused, dropped at one step, and the next generation works."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir)) as ranks:
        ranks.attach()
        daemon = Publisher(group, PAIR)
        # read only when it is as it shall be
        post(daemon, daemon.plan([swap(daemon, 0), swap(daemon, 1)]))
        ranks.step_until(lambda: daemon.done(1))
        assert ranks.all("statistics_of", "num_drops") == [1, 1]
        assert ranks.all("statistics_of", "num_commits") == [0, 0]
        assert daemon.generation == 2
        commit_next(ranks, daemon)
        daemon.close()


@pytest.mark.parametrize("fields", [{"incarnation": 5}, {"generation": 2}, {"generation": 7}], ids=str)
def test_a_plan_of_another_time_is_ignored(group: str, runtime_dir: Path, fields: dict[str, int]) -> None:
    """I4, I10: other incarnations and generations are not read: nothing is dropped, and the right plan is committed."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir)) as ranks:
        ranks.attach()
        daemon = Publisher(group, PAIR)
        daemon.post(daemon.plan([swap(daemon, 0)], **fields))
        ranks.step(200)
        assert daemon.counters() == [(1, 0)] * 2
        commit_next(ranks, daemon)
        assert ranks.all("statistics_of", "num_drops") == [0, 0]
        daemon.close()


def test_an_abort_drops_what_is_not_done(group: str, runtime_dir: Path) -> None:
    """I11: an abort of the generation at hand drops it on all ranks, also before it was seen; an older one does nothing."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir)) as ranks:
        ranks.attach()
        daemon = Publisher(group, PAIR)
        daemon.abort(1)
        daemon.post(daemon.plan([swap(daemon, 0)]))
        ranks.step_until(lambda: daemon.done(1))
        assert ranks.all("statistics_of", "num_drops") == [1, 1]
        assert "a daemon aborted it" in ranks.ask(0, "statistics_of", "last_error")
        commit_next(ranks, daemon)
        daemon.abort(2)
        ranks.step(20)
        assert daemon.counters() == [(3, 0)] * 2
        assert ranks.all("statistics_of", "num_drops") == [1, 1]
        daemon.close()


@pytest.mark.parametrize("bit", [3, 41, 62, 63])
def test_a_damaged_abort_word_is_no_abort(group: str, runtime_dir: Path, bit: int) -> None:
    """No daemon aborts a generation before its number has come: such a word is ignored, and plans go on beside it."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir)) as ranks:
        ranks.attach()
        daemon = Publisher(group, PAIR)
        daemon.board.segment.array(np.uint64, (9,))[8] ^= np.uint64(1 << bit)
        commit_next(ranks, daemon)
        ranks.step(20)
        assert daemon.counters() == [(2, 0)] * 2
        assert ranks.all("statistics_of", "num_drops") == [0, 0]
        daemon.close()


@pytest.mark.parametrize(
    ("fields", "why"),
    [({"plan_deadline_steps": 30}, "not done after 30 steps"), ({"plan_deadline_s": 0.05}, "not done after 0.05 s")],
)
def test_ranks_give_up_a_late_plan_themselves(
    group: str, runtime_dir: Path, fields: dict[str, float], why: str
) -> None:
    """I6: without any daemon, a plan that one rank never gets is dropped by the deadline of another, in steps or seconds."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir, **fields)) as ranks:
        ranks.attach()
        ranks.ask(1, "call", never_adopt, True)
        daemon = Publisher(group, PAIR)
        daemon.post(daemon.plan([swap(daemon, 0)]))
        ranks.step_until(lambda: daemon.done(1), most=1_000_000, count=20)
        assert why in ranks.ask(0, "statistics_of", "last_error")
        assert ranks.all("statistics_of", "num_drops") == [1, 1]
        ranks.ask(1, "call", never_adopt, False)
        commit_next(ranks, daemon)
        daemon.close()


def never_adopt(actor: Actor, blind: bool) -> None:
    """Make a rank see nothing on the board, or see again."""
    if blind:
        vars(actor.hook)["_adopt"] = lambda words: None
    else:
        del vars(actor.hook)["_adopt"]


def test_a_plan_seen_early_is_checked_against_the_maps_it_starts_from(group: str, runtime_dir: Path) -> None:
    """A plan that fits only after the one before is not refused because it was read during it."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir)) as ranks:
        ranks.attach()
        ranks.all("call", hold_back, True)
        daemon = Publisher(group, PAIR)
        first = daemon.post(daemon.plan([swap(daemon, 0)]))
        ranks.step_until(lambda: ranks.all("statistics_of", "num_plans") == [1, 1])
        daemon.applied(first)
        second = daemon.post(daemon.plan([(0, np.roll(daemon.rows_LP[0], 4))], generation=2))
        ranks.step_until(lambda: all(ranks.all("call", has_refused)))
        ranks.all("call", hold_back, False)
        ranks.step_until(lambda: daemon.done(2))
        daemon.applied(second)
        assert ranks.rows() == daemon.rows_LP.tolist()
        assert ranks.all("statistics_of", "num_drops") == [0, 0]
        ranks.check()
        daemon.close()


def hold_back(actor: Actor, held: bool) -> None:
    """Issue no copies, or go on."""
    if held:
        vars(actor.hook._parts.stager)["issue"] = lambda all_committed, budget_bytes: 0
    else:
        del vars(actor.hook._parts.stager)["issue"]


def has_refused(actor: Actor) -> bool:
    """True once the plan on the board was found not to fit the maps as they are."""
    return isinstance(actor.hook._parts.reader._ready, BadPlan)


def test_a_board_half_written_is_not_read(group: str, runtime_dir: Path) -> None:
    """I6, I11: ranks serve on beside the torn plan of a dead daemon; its successor's plan is committed."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir)) as ranks:
        ranks.attach()
        daemon = Publisher(group, PAIR)
        daemon.board._atomics.store_then_fence(daemon.board._address, daemon.board.sequence | 1)
        daemon.board._plan[:100] = 255
        ranks.step(100)
        assert daemon.counters() == [(1, 0)] * 2
        commit_next(ranks, daemon)
        assert ranks.all("statistics_of", "num_drops") == [0, 0]
        daemon.close()

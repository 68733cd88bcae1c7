"""Entries that cross nodes begin on all ranks at the same step, in plan order, within the rows of each."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from eplb_async.core.config import HookSettings
from eplb_async.core.diff import commit_rows, moves_between
from eplb_async.core.placement import initial_placement
from eplb_async.core.plan import FIRST_COUNTER, NO_PLAN, Plan, PlanEntry, counter
from eplb_async.core.spec import MoESpec
from eplb_async.rank.matched_stager import MatchedStager, Ways
from eplb_async.rank.plan_reader import PlanReader, PreparedPlan, Snapshot
from eplb_async.rank.streams import Completion, HostStream
from eplb_async.rank.transfer.rounds import Move
from eplb_async.shm.words import Reduced
from tests.rank.prepared import HeldTransfer, held_transfer
from tests.rank.publisher import shuffled

SPEC = MoESpec(num_layers=2, num_experts=16, num_ranks=4, num_nodes=2)
ROWS = 4


class HeldLink:
    """A transfer between nodes whose exchanges end when the test says so."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, list[Move], dict[int, int], Completion[None]]] = []

    def begin(
        self, layer: int, moves: Sequence[Move], rows: Mapping[int, int], expected: Callable[..., Any], one_peer: bool
    ) -> Completion[None]:
        """See TorchDistTransfer; here also for ranks that have no part in it."""
        self.begun.append((layer, list(moves), dict(rows), Completion()))
        return self.begun[-1][-1]


class Ranks:
    """The stagers of all ranks, and what each has begun."""

    def __init__(self) -> None:
        self.transfers: list[HeldTransfer] = [held_transfer(ROWS) for _ in range(4)]
        self.links = [HeldLink() for _ in range(4)]
        self.stagers = [
            MatchedStager(
                Ways(transfer, link),  # type: ignore[arg-type]
                HookSettings(pull_bytes_per_step=1),
                lambda layer, expert: None,
                SPEC,
                rank,
            )
            for rank, (transfer, link) in enumerate(zip(self.transfers, self.links, strict=True))
        ]

    def close(self) -> None:
        """End the threads."""
        for transfer in self.transfers:
            transfer.close()


@pytest.fixture
def ranks() -> Any:
    """Four ranks on two nodes."""
    made = Ranks()
    yield made
    made.close()


def prepared_for(rank: int, plan: Plan) -> PreparedPlan:
    """A plan as a rank's reader makes it."""
    stream = HostStream("plan")
    reader = PlanReader(None, SPEC, rank, ROWS, stream)  # type: ignore[arg-type]
    snapshot = Snapshot(initial_placement(SPEC), (0, 0))
    entries = reader._entries(plan, snapshot)
    reader.close()
    return PreparedPlan(1, 7, entries, snapshot)


def random_plan(seed: int) -> Plan:
    """Some entries, layers several times."""
    chosen, rows, versions = np.random.default_rng(seed), initial_placement(SPEC), [0, 0]
    entries: list[PlanEntry] = []
    for layer in (0, 1, 0):
        target_P = shuffled(rows[layer], chosen, SPEC)
        for row_P in commit_rows(rows[layer], target_P, SPEC.topology, ROWS):
            moves = moves_between(rows[layer], row_P, SPEC.topology, np.zeros(4, dtype=np.int64))
            entries.append(PlanEntry(layer, versions[layer], row_P.astype("<i4").tobytes(), moves.tobytes()))
            rows[layer], versions[layer] = row_P, counter(1, len(entries))
    return Plan(incarnation=1, generation=1, entries=entries)


@pytest.mark.parametrize("seed", range(10))
def test_all_ranks_begin_the_same_at_the_same_step(ranks: Ranks, seed: int) -> None:
    """Whatever pulls inside the nodes do, and whichever rank has failed: what is begun is a function of the vectors."""
    chosen, plan = random.Random(seed), random_plan(seed)
    staged, committed = [0] * 4, [0] * 4
    for rank, stager in enumerate(ranks.stagers):
        stager.start(prepared_for(rank, plan))
    length, failed = len(plan.entries), chosen.choice([None, 2])
    for step in range(60 * length):
        digest = 7 if step > 3 else NO_PLAN
        words = Reduced(counter(1, min(staged)), counter(1, min(committed)), 0, digest, 7)
        for rank, stager in enumerate(ranks.stagers):
            stager.agree(words)
            if rank != failed:
                stager.issue(words.committed)
        assert (
            len({tuple(map(repr, (layer, moves))) for link in ranks.links for layer, moves, *_ in link.begun[-1:]}) <= 1
        )
        counts = {len(link.begun) for link in ranks.links}
        assert len(counts) == 1
        assert step > 3 or counts == {0}
        for rank in range(4):
            _finish_some(ranks, rank, chosen)
            position, error = ranks.stagers[rank].poll()
            assert error is None
            staged[rank] = max(staged[rank], position)
            if committed[rank] < min(staged) and chosen.random() < 0.5:
                committed[rank] += 1
                ranks.stagers[rank].release(committed[rank])
    if failed is None:
        assert committed == [length] * 4
    received = [rows for link in ranks.links for _, _, rows, _ in link.begun]
    assert sum(map(len, received)) == sum(len(moves) for _, moves, *_ in ranks.links[0].begun)


def _finish_some(ranks: Ranks, rank: int, chosen: random.Random) -> None:
    ends = [pull[-1] for pull in ranks.transfers[rank].pulls] + [begun[-1] for begun in ranks.links[rank].begun]
    for end in ends:
        end.done = end.done or chosen.random() < 0.3


def test_nothing_begins_before_all_hold_the_plan(ranks: Ranks) -> None:
    """Equal digests of another plan, or of none, do not count; once all hold it, words of a rank that dropped it do not matter."""
    stager, link = ranks.stagers[0], ranks.links[0]
    stager.start(prepared_for(0, random_plan(1)))
    for least, greatest in ((NO_PLAN, NO_PLAN), (NO_PLAN, 7), (6, 6)):
        stager.agree(Reduced(FIRST_COUNTER, FIRST_COUNTER, 0, least, greatest))
        assert not link.begun
    stager.agree(Reduced(FIRST_COUNTER, FIRST_COUNTER, 0, 7, 7))
    assert link.begun


def test_two_contents_are_given_up(ranks: Ranks) -> None:
    """All hold a plan, and not the same one: an error while it is held, none after the drop."""
    stager = ranks.stagers[0]
    stager.start(prepared_for(0, random_plan(1)))
    stager.agree(Reduced(FIRST_COUNTER, FIRST_COUNTER, 0, NO_PLAN, 8))
    assert stager.poll() == (0, None)
    stager.agree(Reduced(FIRST_COUNTER, FIRST_COUNTER, 0, 7, 8))
    assert "different plans of generation 1" in str(stager.poll()[1])
    stager.drop([])
    assert stager.poll() == (0, None)


def test_a_drop_waits_for_what_was_begun(ranks: Ranks) -> None:
    """I5, I7: a rank drains only when its exchange has ended, its sends too; pulls that were not issued never are."""
    stager, link = ranks.stagers[0], ranks.links[0]
    stager.start(prepared_for(0, random_plan(1)))
    stager.agree(Reduced(FIRST_COUNTER, FIRST_COUNTER, 0, 7, 7))
    stager.drop([])
    seen = [stager.orphaned]
    stager.poll()
    seen.append(stager.orphaned)
    for *_, end in link.begun:
        end.done = True
    stager.poll()
    seen.append(stager.orphaned)
    assert seen == [True, True, False]
    assert not ranks.transfers[0].pulls

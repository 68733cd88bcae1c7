"""Real ranks on two nodes against the executable model: what they record must be a behaviour that it allows.

Two rules of groups on several nodes are left out by subclasses, and both are caught: ranks that decide on the newest words
of their own node, and ranks that decide on a reduced vector as soon as they have it. The two ends of a transfer between
nodes are not in the model; test_matched_stager.py looks at them.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_async.core.spec import MoESpec
from eplb_async.rank.assembly import Parts
from eplb_async.rank.hook import RankHook
from eplb_async.rank.torch_exchange import TorchDistExchange
from eplb_async.shm.words import Reduced
from tests.model.trace_check import Verdict, check_traces
from tests.rank.nodes import PLAIN, Daemons, NodeGroup
from tests.rank.publisher import shuffled
from tests.rank.test_nodes import crossing
from tests.rank.test_traces import events_of, give_up, slow_commits
from tests.rank.tracing import TracedHook

ROWS = 2
SIX = MoESpec(num_layers=2, num_experts=6, num_ranks=3, num_nodes=3)


def verdict(ranks: NodeGroup, daemons: Daemons, start: list[list[int]], rows: int = ROWS) -> Verdict:
    """What the checker says of everything recorded."""
    info, spec = daemons.each[0].words.info, ranks.spec
    nodes = [rank // spec.topology.ranks_per_node for rank in range(spec.num_ranks)]
    traces = ranks.all("call", events_of)
    return check_traces(
        traces, daemons.trace, start, spec.slots_per_rank, info.lag, rows, nodes=nodes, every=info.reduce_every
    )


@pytest.mark.parametrize(("spec", "every", "lag"), [(PLAIN, 1, 2), (PLAIN, 4, 1), (SIX, 3, 2)], ids=str)
def test_plans_across_nodes_are_a_behaviour_of_the_model(
    group: str, runtime_dir: Path, spec: MoESpec, every: int, lag: int
) -> None:
    """Commits, a drop, and commits again, with a layer in several entries and one device that is late."""
    options: dict[str, Any] = {"hook_class": TracedHook}
    fields: dict[str, Any] = {"staging_rows": ROWS, "reduce_every": every, "lag": lag, "pull_bytes_per_step": 1}
    with NodeGroup(group, spec, runtime_dir, options, **fields) as ranks:
        ranks.attach()
        ranks.ask(1, "call", slow_commits, 4)
        daemons, random = Daemons(ranks), np.random.default_rng(every)
        start, before = daemons.rows_LP.tolist(), 0
        for generation in (1, 2, 3):
            changes = [(layer, shuffled(daemons.rows_LP[layer], random, spec)) for layer in (0, 1)]
            plan = daemons.post(daemons.plan(changes))
            if generation == 2:
                ranks.step_until(lambda: ranks.ask(1, "statistics_of", "num_plans") == 2, count=1)
                ranks.ask(1, "call", give_up, 2)
            ranks.step_until(partial(daemons.done, generation))
            committed = int(ranks.ask(0, "statistics_of", "num_commits")) - before
            daemons.applied(plan, committed)
            before += committed
        assert ranks.rows() == daemons.rows_LP.tolist()
        ranks.check()
        found = verdict(ranks, daemons, start)
        daemons.close()
    assert found.accepted, str(found)


class _LocalExchange(TorchDistExchange):
    def collect(self, step: int) -> Reduced:
        words = super().collect(step)
        own = [word for word in map(self._words.newest, self._local) if word is not None]
        return words._replace(error=max(words.error, *(word.error for word in own)))


class _HastyExchange(TorchDistExchange):
    def collect(self, step: int) -> Reduced:
        words = super().collect(step)
        while self._posted and self._posted[0][-1].is_completed():
            words = super().collect(self._posted[0][0])
        return words


class LocalWords(TracedHook):
    """Decides on the newest errors of its own node, and on the reduced ones of the others."""

    def __init__(self, parts: Parts) -> None:
        parts.exchange.__class__ = _LocalExchange
        super().__init__(parts)


class HastyVector(TracedHook):
    """Decides on a reduced vector as soon as it is there."""

    def __init__(self, parts: Parts) -> None:
        parts.exchange.__class__ = _HastyExchange
        super().__init__(parts)


@pytest.mark.parametrize("hook_class", [LocalWords, HastyVector])
def test_other_words_than_the_vector_are_caught(group: str, runtime_dir: Path, hook_class: type[RankHook]) -> None:
    """I7: `decided` is then not what the vector of that step makes it."""
    # vectors have time to come early
    options: dict[str, Any] = {"hook_class": hook_class, "pause_s": 0.01}
    with NodeGroup(group, PLAIN, runtime_dir, options, reduce_every=2, lag=6, verify="off") as ranks:
        ranks.attach()
        daemons = Daemons(ranks)
        start = daemons.rows_LP.tolist()
        daemons.post(daemons.plan(crossing(daemons)))
        ranks.outcomes("step", 9)
        ranks.ask(1, "call", give_up, 1)
        ranks.outcomes("step", 30)
        found = verdict(ranks, daemons, start, rows=PLAIN.slots_per_rank)
        daemons.close()
    assert "make `decided`" in str(found)

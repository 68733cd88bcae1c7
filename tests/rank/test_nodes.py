"""Groups on two nodes, in real processes: plans, drops, deaths, mismatches."""

from pathlib import Path

import numpy as np
import pytest

from tests.rank.nodes import FOUR, Daemons, NodeGroup
from tests.rank.publisher import shuffled


@pytest.mark.parametrize(("every", "lag", "one_peer"), [(1, 2, True), (4, 1, False)])
def test_plans_across_nodes_are_committed(group: str, runtime_dir: Path, every: int, lag: int, one_peer: bool) -> None:
    """Moves inside and between nodes in one plan and one entry: right bytes, and equal maps at every step on all ranks."""
    fields = {"reduce_every": every, "lag": lag, "one_peer_at_a_time": one_peer, "staging_rows": 2}
    with NodeGroup(group, FOUR, runtime_dir, **fields) as ranks:
        ranks.attach()
        daemons, random = Daemons(ranks), np.random.default_rng(every)
        for generation in (1, 2, 3):
            plan = daemons.plan([(layer, shuffled(daemons.rows_LP[layer], random, FOUR)) for layer in (0, 1)])
            daemons.post(plan)
            ranks.step_until(lambda generation=generation: daemons.done(generation))
            daemons.applied(plan)
            assert ranks.rows() == daemons.rows_LP.tolist()
            ranks.check()
        assert ranks.all("statistics_of", "num_drops") == [0] * 4
        daemons.close()

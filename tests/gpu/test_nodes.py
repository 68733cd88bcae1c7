"""A group on two GPUs as if they were two nodes: words by all-reduce, weights by NCCL, commits on the device."""

from pathlib import Path

import numpy as np
import pytest

from eplb_async.core.spec import MoESpec
from tests.rank.nodes import Daemons, NodeGroup
from tests.rank.publisher import shuffled

pytestmark = pytest.mark.multi_gpu

TWO = MoESpec(num_layers=3, num_experts=10, num_ranks=2, num_redundant=2, num_nodes=2)


@pytest.mark.parametrize("every", [1, 4])
def test_plans_across_nodes_are_committed(
    group: str, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Equal maps in each step, and every slot its expert's bytes, however often words are reduced."""
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    options = {"device": "cuda"}
    with NodeGroup(group, TWO, runtime_dir, options, reduce_every=every, lag=4, staging_rows=3) as ranks:
        ranks.attach()
        daemons, random = Daemons(ranks), np.random.default_rng(every)
        for generation in range(1, 5):
            changes = [(layer, shuffled(daemons.rows_LP[layer], random, TWO)) for layer in range(TWO.num_layers)]
            plan = daemons.post(daemons.plan(changes))
            ranks.step_until(lambda generation=generation: daemons.done(generation))  # type: ignore[misc]
            daemons.applied(plan)
            assert ranks.rows() == daemons.rows_LP.tolist()
            ranks.check()
        daemons.close()

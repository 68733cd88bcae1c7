"""Real ranks whose transfers make steps long: they pull less, steps stay as they were, and the plan is committed all the same."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_async.core.spec import MoESpec
from eplb_async.rank.transfer.shm import ShmTransfer
from tests.rank.harness import Actor, RankGroup, hook_settings, run_step
from tests.rank.publisher import Publisher

__all__: list[str] = []

PAIR = MoESpec(num_layers=12, num_experts=16, num_ranks=2)
FORWARD_S, PULL_S = 0.004, 0.001
ROW_BYTES = 177
"""Of an expert of the harness."""


def slow_pulls(actor: Actor) -> None:
    """Each pull holds the step up that issues it, as a driver does that is out of queue."""
    transfer = actor.hook._parts.transfer
    assert isinstance(transfer, ShmTransfer)
    pull = transfer.pull

    def slow(*arguments: Any) -> Any:
        time.sleep(PULL_S)
        return pull(*arguments)

    setattr(transfer, "pull", slow)  # noqa: B010 (mypy knows that methods cannot be assigned)


def timed_steps(actor: Actor, count: int) -> list[float]:
    """Milliseconds of each step."""
    times = []
    for _ in range(count):
        start = time.monotonic()
        run_step(actor)
        times.append(1e3 * (time.monotonic() - start))
    return times


def served(group: str, runtime_dir: Path, *, adapt: bool) -> tuple[float, list[float], list[dict[str, int]]]:
    """Usual milliseconds of a step, those of each step while a plan moves all layers, and what the ranks say of their pace."""
    settings = hook_settings(
        runtime_dir,
        adapt_pace=adapt,
        slow_step_ratio=1.5 if adapt else 0.0,
        pull_bytes_per_step=8 * ROW_BYTES,
        least_pull_bytes_per_step=ROW_BYTES // 4,
        staging_rows=64,
    )
    with RankGroup(group, PAIR, settings, pause_s=FORWARD_S) as ranks:
        ranks.attach()
        ranks.all("call", slow_pulls)
        usual_ms = float(np.median(ranks.all("call", timed_steps, 30)))
        daemon = Publisher(group, PAIR)
        plan = daemon.post(daemon.plan([(layer, daemon.rows_LP[layer][::-1]) for layer in range(PAIR.num_layers)]))
        during: list[float] = []
        while not daemon.done():
            assert len(during) < 3000
            during += np.max(ranks.all("call", timed_steps, 4), axis=0).tolist()
        daemon.applied(plan)
        ranks.check()
        assert ranks.rows() == daemon.rows_LP.tolist()
        assert ranks.all("statistics_of", "num_drops") == [0, 0]
        names = ("pull_budget_bytes", "pull_pauses", "pull_slowdowns")
        said = [{name: ranks.ask(rank, "statistics_of", name) for name in names} for rank in range(2)]
        daemon.close()
        return usual_ms, during, said


@pytest.mark.parametrize("adapt", [True, False])
def test_a_slow_transfer_is_paced(group: str, runtime_dir: Path, adapt: bool) -> None:
    """Eight rows a step make it three times as long. Paced, few steps are long and the median is that of steps alone; else most that pull are."""
    usual_ms, during, said = served(group, runtime_dir, adapt=adapt)
    long = float(np.mean(np.array(during) > 1.8 * usual_ms))
    if adapt:
        assert np.median(during) < 1.3 * usual_ms, (usual_ms, during)
        assert long < 0.15, (usual_ms, during)
        assert all(one["pull_budget_bytes"] < 8 * ROW_BYTES for one in said), said
        assert all(one["pull_pauses"] + one["pull_slowdowns"] > 0 for one in said), said
    else:
        assert long > 0.25, (usual_ms, during)
        assert all(one["pull_pauses"] == one["pull_slowdowns"] == 0 for one in said), said

"""A transfer that never ends: the forward goes on, and after a deadline so do plans; nobody gets its rows, or its bytes."""

import threading
from pathlib import Path
from typing import Any

from eplb_async.core.spec import MoESpec
from eplb_async.rank.transfer.shm import ShmTransfer
from tests.rank.harness import Actor, RankGroup, hook_settings
from tests.rank.publisher import Publisher

__all__: list[str] = []

PAIR = MoESpec(num_layers=2, num_experts=6, num_ranks=2)


def hang_first_pull(actor: Actor) -> None:
    """The first pull of this rank stops before it copies, until `end_hung_pull`; all later ones run."""
    transfer, opened = actor.hook._parts.transfer, threading.Event()
    assert isinstance(transfer, ShmTransfer)
    pull_now, calls = transfer._pull_now, []

    def hung(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            opened.wait(100.0)
        pull_now(*arguments)

    setattr(transfer, "_pull_now", hung)  # noqa: B010 (mypy knows that methods cannot be assigned)
    vars(actor)["opened"] = opened


def give_up(actor: Actor) -> None:
    """This rank wants the plan dropped."""
    actor.hook._fail(1, "told to")


def end_hung_pull(actor: Actor) -> None:
    """It copies now, whatever its source holds by now."""
    vars(actor)["opened"].set()


def test_plans_go_on_after_a_pull_that_does_not_end(group: str, runtime_dir: Path) -> None:
    """The plan is dropped, its pull given up after the deadline; later plans overwrite its source, and all bytes are right,
    also when it ends after all."""
    settings = hook_settings(runtime_dir, drain_deadline_s=0.2, staging_rows=3)
    # forwards that let go of the interpreter's lock, or a busy machine never runs the thread that pulls
    with RankGroup(group, PAIR, settings, pause_s=0.001) as ranks:
        ranks.attach()
        ranks.ask(1, "call", hang_first_pull)
        daemon = Publisher(group, PAIR)
        row_P = daemon.rows_LP[0].copy()
        row_P[[0, 3]] = row_P[[3, 0]]
        # slot 3 of rank 1 pulls expert 0 from slot 0 of rank 0, and hangs
        daemon.post(daemon.plan([(0, row_P)]))
        ranks.step_until(lambda: ranks.ask(1, "statistics_of", "rows_pulled") == 1)
        ranks.ask(0, "call", give_up)
        ranks.step_until(lambda: ranks.ask(0, "statistics_of", "num_drops") == 1)
        ranks.step_until(lambda: daemon.done(1))
        assert ranks.ask(1, "statistics_of", "pulls_abandoned") == 1
        for _ in range(3):
            for layer, slots in ((0, [1, 2, 0, 5, 3, 4]), (1, [5, 4, 3, 2, 1, 0])):
                plan = daemon.post(daemon.plan([(layer, daemon.rows_LP[layer][slots])]))
                ranks.step_until(daemon.done)
                daemon.applied(plan)
        assert ranks.rows() == daemon.rows_LP.tolist()
        ranks.check()
        ranks.ask(1, "call", end_hung_pull)
        plan = daemon.post(daemon.plan([(0, daemon.rows_LP[0][[3, 4, 5, 0, 1, 2]])]))
        ranks.step_until(daemon.done)
        daemon.applied(plan)
        ranks.check()
        assert ranks.all("statistics_of", "num_drops") == [1, 1]
        daemon.close()

"""Ranks that die, hang, leave, or step without the others; and the group that forms after that."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from eplb_async.core.errors import HookClosed, PeerLost
from eplb_async.core.spec import MoESpec
from eplb_async.shm.gc import collect_garbage
from eplb_async.shm.words import AgreementWords
from tests.conftest import segments_left
from tests.rank.harness import RankGroup, hook_settings
from tests.rank.publisher import Publisher

TRIO = MoESpec(num_layers=2, num_experts=9, num_ranks=3)
LONG_S = 30.0
STEPS = 10_000_000


def rolled_plan(daemon: Publisher, ranks: RankGroup) -> None:
    """Move every expert a rank on, and look at all bytes."""
    changes = [(layer, np.roll(row_P, daemon.spec.slots_per_rank)) for layer, row_P in enumerate(daemon.rows_LP)]
    plan = daemon.post(daemon.plan(changes))
    ranks.step_until(daemon.done)
    daemon.applied(plan)
    assert ranks.rows() == daemon.rows_LP.tolist()
    ranks.check()


def wait_for_step(group: str, step: int) -> int:
    """Wait until all ranks step; the newest step of rank 0."""
    words, end = AgreementWords.open(group), time.monotonic() + LONG_S
    while min(words.member(rank).newest_step for rank in range(words.num_ranks)) < step:
        assert time.monotonic() < end, "the ranks do not step"
    words.close()
    return step


def test_a_killed_rank_is_named_at_once_and_a_new_incarnation_forms(group: str, runtime_dir: Path) -> None:
    """I3, I10: the others raise PeerLost long before the deadline, cannot step on, and can attach again with a new process
    from the placement that is live; killed altogether, nothing is left once the garbage is collected.
    """
    with RankGroup(group, TRIO, hook_settings(runtime_dir, peer_deadline_s=LONG_S)) as ranks:
        ranks.attach()
        daemon = Publisher(group, TRIO)
        rolled_plan(daemon, ranks)
        before = daemon.words.incarnation
        for rank in range(3):
            ranks.send(rank, "step", STEPS)
        wait_for_step(group, 200)
        start = time.monotonic()
        ranks.kill(1)
        for rank in (0, 2):
            error = ranks.receive(rank)
            assert isinstance(error, PeerLost)
            assert error.rank == 1
            assert "has ended" in error.why
        assert time.monotonic() - start < LONG_S / 3
        assert isinstance(ranks.outcomes("step", 1, ranks=[0])[0], HookClosed)

        ranks.outcomes("detach", ranks=[0, 2])
        ranks.restart(1)
        live_LP = daemon.rows_LP
        daemon.close()
        ranks.attach(live_LP)
        daemon = Publisher(group, TRIO, live_LP)
        assert daemon.words.incarnation > before
        rolled_plan(daemon, ranks)
        daemon.close()

        for rank in range(3):
            ranks.kill(rank)
        assert segments_left(group)
        collect_garbage(group)
        assert not segments_left(group)


def test_a_rank_that_hangs_is_lost_after_the_deadline(group: str, runtime_dir: Path) -> None:
    """I3: a stopped process lives, so the others wait for their deadline, not longer, and then name it."""
    with RankGroup(group, TRIO, hook_settings(runtime_dir, peer_deadline_s=0.5)) as ranks:
        ranks.attach()
        for rank in range(3):
            ranks.send(rank, "step", STEPS)
        wait_for_step(group, 100)
        pid = ranks.processes[2].pid
        start = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        try:
            errors = [ranks.receive(rank) for rank in (0, 1)]
        finally:
            os.kill(pid, signal.SIGCONT)
        took = time.monotonic() - start
        assert [type(error) for error in errors] == [PeerLost] * 2
        assert all(error.rank == 2 and "lives, but its last step is" in error.why for error in errors)
        assert 0.5 <= took < LONG_S / 3
        ranks.outcomes("detach", ranks=[0, 1])
        # the stopped one goes on, and finds the others gone
        assert isinstance(ranks.receive(2), PeerLost)


def test_a_rank_that_detaches_is_said_to_have(group: str, runtime_dir: Path) -> None:
    """Others go on for lag steps at most, and the reason is not a crash."""
    with RankGroup(group, TRIO, hook_settings(runtime_dir, peer_deadline_s=LONG_S)) as ranks:
        ranks.attach()
        ranks.step(5)
        ranks.ask(0, "detach")
        errors = ranks.outcomes("step", 10, ranks=[1, 2])
        assert all(isinstance(error, PeerLost) and error.rank == 0 for error in errors)
        assert [error.why for error in errors] == ["it detached after step 4"] * 2


def test_uneven_stepping_is_named(group: str, runtime_dir: Path) -> None:
    """I3: a rank that steps more often than another stops lag + 1 steps ahead, and names the one that stands."""
    with RankGroup(group, TRIO, hook_settings(runtime_dir, peer_deadline_s=0.3, lag=2)) as ranks:
        ranks.attach()
        ranks.step(4)
        error = ranks.outcomes("step", 10, ranks=[1])[0]
        assert isinstance(error, PeerLost)
        assert error.step == 4
        assert error.rank in (0, 2)
        words = AgreementWords.open(group)
        assert [words.member(rank).newest_step for rank in range(3)] == [3, 6, 3]
        words.close()


@pytest.mark.slow
def test_ranks_killed_at_random_moments_of_plans(group: str, runtime_dir: Path) -> None:
    """Whatever a rank was doing when it was killed: PeerLost on the others, no wrong byte in a new incarnation."""
    random = np.random.default_rng(0)
    with RankGroup(group, TRIO, hook_settings(runtime_dir, peer_deadline_s=LONG_S, pull_bytes_per_step=1)) as ranks:
        for _ in range(15):
            ranks.attach()
            daemon = Publisher(group, TRIO)
            for rank in range(3):
                ranks.send(rank, "step", STEPS)
            changes = [(layer, np.roll(row_P, TRIO.slots_per_rank)) for layer, row_P in enumerate(daemon.rows_LP)]
            daemon.post(daemon.plan(changes))
            wait_for_step(group, int(random.integers(5, 400)))
            victim = int(random.integers(3))
            ranks.kill(victim)
            others = [rank for rank in range(3) if rank != victim]
            assert all(isinstance(ranks.receive(rank), PeerLost) for rank in others)
            wrong = [line for lines in ranks.outcomes("check", ranks=others) for line in lines]
            assert not wrong
            daemon.close()
            # weights of a killed rank are of unknown state: everybody loads anew
            ranks.outcomes("close", ranks=others)
            for rank in range(3):
                ranks.processes[rank].join()
                ranks.restart(rank)

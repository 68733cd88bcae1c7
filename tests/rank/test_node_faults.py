"""Ranks of two nodes that die, hang, leave, or do not come: an error on all others within the deadline, and a new start."""

import os
import signal
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from eplb_async.core.errors import AttachTimeout, PeerLost
from eplb_async.shm.gc import collect_garbage
from eplb_async.shm.words import AgreementWords
from tests.conftest import segments_left
from tests.rank.harness import Actor
from tests.rank.nodes import PLAIN, Daemons, NodeGroup, hold_link, release_link
from tests.rank.test_nodes import commit_next, crossing, received

LONG_S = 30.0
STEPS = 10_000_000


def wait_for_step(ranks: NodeGroup, step: int) -> None:
    """Wait until all ranks are there."""
    end = time.monotonic() + LONG_S
    for group in ranks.nodes:
        words = AgreementWords.open(group)
        while min(words.member(rank).newest_step for rank in words.info.ranks) < step:
            assert time.monotonic() < end, "the ranks do not step"
        words.close()


@pytest.mark.parametrize("every", [1, 4])
def test_a_killed_rank_is_lost_everywhere_and_a_new_incarnation_forms(
    group: str, runtime_dir: Path, every: int
) -> None:
    """I3, I10: killed amid plans, it is named on its own node and on the other long before the deadline; all can attach
    again in the same store, and when all are killed nothing is left once the garbage is collected.
    """
    with NodeGroup(group, PLAIN, runtime_dir, reduce_every=every, peer_deadline_s=LONG_S) as ranks:
        ranks.attach()
        daemons = Daemons(ranks)
        before = daemons.each[0].words.incarnation
        for rank in range(4):
            ranks.send(rank, "step", STEPS)
        daemons.post(daemons.plan(crossing(daemons)))
        wait_for_step(ranks, 40)
        start = time.monotonic()
        ranks.kill(1)
        for rank in (0, 2, 3):
            error = ranks.receive(rank)
            assert isinstance(error, PeerLost)
            assert 1 in error.ranks
        assert time.monotonic() - start < LONG_S / 3
        daemons.close()
        # weights of a killed rank are of unknown state: everybody loads anew
        ranks.outcomes("close", ranks=[0, 2, 3])
        for rank in range(4):
            ranks.processes[rank].join()
            ranks.restart(rank)
        ranks.attach()
        daemons = Daemons(ranks)
        assert len({daemon.words.incarnation for daemon in daemons.each}) == 1
        assert daemons.each[1].words.incarnation > before
        commit_next(ranks, daemons)
        daemons.close()
        for rank in range(4):
            ranks.kill(rank)
        assert segments_left(group)
        for name in (group, *ranks.nodes):
            collect_garbage(name)
        assert not segments_left(group)


def test_a_rank_that_hangs_is_lost_after_the_deadline(group: str, runtime_dir: Path) -> None:
    """I3: nobody waits longer than the deadline, and detach does not hang, though an exchange with it is pending. A rank that
    stands between two steps is named by its node; one whose word is out may be any.
    """
    with NodeGroup(group, PLAIN, runtime_dir, peer_deadline_s=0.5) as ranks:
        ranks.attach()
        ranks.ask(3, "call", hold_link)
        daemons = Daemons(ranks)
        daemons.post(daemons.plan(crossing(daemons)))
        ranks.step_until(lambda: all(rows for rows, _ in ranks.all("call", received)))
        daemons.close()
        for rank in range(4):
            ranks.send(rank, "step", STEPS)
        wait_for_step(ranks, 100)
        pid, start = ranks.processes[3].pid, time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        try:
            errors = [ranks.receive(rank) for rank in (0, 1, 2)]
            took = time.monotonic() - start
            assert ranks.outcomes("detach", ranks=[0, 1, 2]) == [None] * 3
            left = time.monotonic() - start - took
        finally:
            os.kill(pid, signal.SIGCONT)
        assert [type(error) for error in errors] == [PeerLost] * 3
        assert all(3 in error.ranks for error in errors)
        assert errors[2].ranks in ((3,), (0, 1, 3))
        assert 0.4 <= took < LONG_S / 3
        assert left < LONG_S / 3
        assert isinstance(ranks.receive(3), PeerLost)
        ranks.ask(3, "call", release_link)


def test_a_rank_that_detaches_is_lost(group: str, runtime_dir: Path) -> None:
    """The reason is not a crash, as its node knows, and all can attach again."""
    with NodeGroup(group, PLAIN, runtime_dir, peer_deadline_s=LONG_S) as ranks:
        ranks.attach()
        ranks.step(5)
        ranks.ask(0, "call", watch_close)
        ranks.ask(0, "detach")
        assert ranks.ask(0, "call", left_before_close)
        errors = ranks.outcomes("step", 10, ranks=[1, 2, 3])
        assert [type(error) for error in errors] == [PeerLost] * 3
        assert errors[0].rank == 0
        assert errors[0].why == "it detached after step 4"
        assert all(0 in error.ranks for error in errors)
        ranks.outcomes("detach", ranks=[1, 2, 3])
        ranks.attach()
        ranks.step(5)


def watch_close(actor: Actor) -> None:
    """Note whether the rank has left the member table when its connections are closed."""
    parts = actor.hook._parts
    close = parts.exchange.close

    def noted() -> None:
        vars(actor)["left"] = not hasattr(parts.membership, "words")
        close()

    vars(parts.exchange)["close"] = noted


def left_before_close(actor: Actor) -> bool:
    """What was noted."""
    return bool(vars(actor)["left"])


def test_all_may_leave_after_the_same_step(group: str, runtime_dir: Path) -> None:
    """Ranks that leave first do not take from a slow one the words of the steps that they have made."""
    with NodeGroup(group, PLAIN, runtime_dir) as ranks:
        ranks.ask(3, "call", be_slow)
        for _ in range(2):
            ranks.attach()
            assert ranks.all("call", step_and_leave) == [8] * 4


def be_slow(actor: Actor) -> None:
    """Forwards take longer."""
    object.__setattr__(actor.options, "pause_s", 0.03)


def step_and_leave(actor: Actor) -> int:
    """Steps of an engine that then stops at once."""
    made = len(actor.step(8))
    actor.detach()
    return made


def test_ranks_that_do_not_come_are_named(group: str, runtime_dir: Path) -> None:
    """AttachTimeout names those of both nodes; nothing of those that came is left, and with the others they form a group."""
    with NodeGroup(group, PLAIN, runtime_dir, attach_deadline_s=1.0) as ranks:
        errors = ranks.outcomes("attach", ranks=[1, 2])
        assert [type(error) for error in errors] == [AttachTimeout] * 2
        # the first to come may give up before the second is there
        assert all({0, 3} <= set(error.missing) for error in errors)
        assert all("weights." in name for name in segments_left(group))
        for rank in range(4):
            ranks.ask(rank, "call", patient)
        ranks.attach()
        ranks.step(3)


def patient(actor: Actor) -> None:
    """Attach with a longer deadline."""
    settings = actor.options.settings
    hook = msgspec.structs.replace(settings.hook, attach_deadline_s=LONG_S)
    object.__setattr__(actor.options, "settings", msgspec.structs.replace(settings, hook=hook))


def test_a_rank_that_does_not_step_is_named_by_its_node(group: str, runtime_dir: Path) -> None:
    """I3: a rank that steps more often than others stops at lag + k - 1 steps beyond them, by the words of its node."""
    with NodeGroup(group, PLAIN, runtime_dir, peer_deadline_s=0.3, lag=2, reduce_every=2) as ranks:
        ranks.attach()
        ranks.step(4)
        errors = ranks.outcomes("step", 10, ranks=[0, 2, 3])
        assert [type(error) for error in errors] == [PeerLost] * 3
        assert errors[0].rank == 1
        assert errors[0].why == "its process lives, but its last step is 3"
        assert [error.step for error in errors] == [4] * 3
        assert errors[1].ranks == (0, 1, 3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_killed_at_random_moments_of_plans(group: str, runtime_dir: Path) -> None:
    """Whatever a rank was doing when it was killed: PeerLost on the others, no wrong byte, and a new incarnation in the same store."""
    random = np.random.default_rng(0)
    with NodeGroup(group, PLAIN, runtime_dir, peer_deadline_s=LONG_S, pull_bytes_per_step=1) as ranks:
        for attempt in range(15):
            ranks.attach()
            daemons = Daemons(ranks)
            for rank in range(4):
                ranks.send(rank, "step", STEPS)
            for _ in range(int(random.integers(1, 4))):
                plan = daemons.post(daemons.plan(crossing(daemons)))
                wait_for_step(ranks, 1)
                if random.random() < 0.5:
                    break
                end = time.monotonic() + LONG_S
                while not daemons.done(plan.generation):
                    assert time.monotonic() < end, "the plan is not done"
                daemons.applied(plan)
            time.sleep(float(random.random()) * 0.02)
            victim = int(random.integers(4))
            ranks.kill(victim)
            others = [rank for rank in range(4) if rank != victim]
            errors = [ranks.receive(rank) for rank in others]
            assert [type(error) for error in errors] == [PeerLost] * 3, (attempt, errors)
            assert all(victim in error.ranks for error in errors), (attempt, victim, errors)
            wrong = [line for lines in ranks.outcomes("check", ranks=others) for line in lines]
            assert not wrong
            daemons.close()
            ranks.outcomes("close", ranks=others)
            for rank in range(4):
                ranks.processes[rank].join()
                ranks.restart(rank)

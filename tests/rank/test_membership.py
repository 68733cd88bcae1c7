"""Attaching: who may join which incarnation, what does not fit, and that nothing is left behind by those who fail."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_async.core.config import HookSettings
from eplb_async.core.errors import (
    AttachTimeout,
    EplbError,
    NoSharedMemory,
    PeerLost,
    RankTaken,
    SegmentRefused,
    SpecError,
    SpecMismatch,
)
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.shm.layout import segment_name
from eplb_async.shm.segment import list_segments
from eplb_async.shm.words import AgreementWords, MemberState
from tests.conftest import segments_left
from tests.rank.harness import Actor, RankGroup, hook_settings
from tests.rank.publisher import Publisher
from tests.rank.solo import SOLO, attached

PAIR = MoESpec(num_layers=1, num_experts=4, num_ranks=2, num_redundant=2)


def only_weights(group: str) -> bool:
    """Nothing of the group is left but weights, which belong to the engine."""
    return all(kind.startswith("weights.") for _, name, kind in list_segments() if name == group)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < end, "it did not happen"


def state_of(group: str, rank: int) -> MemberState | None:
    """What a rank has said of itself, None without a group."""
    try:
        words = AgreementWords.open(group)
    except EplbError:
        return None
    state = words.member(rank).state
    words.close()
    return state


def test_slots_must_divide_over_ranks() -> None:
    """The message proposes the nearest numbers of redundant experts that do."""
    with pytest.raises(SpecError, match=r"10 slots do not divide over 4 ranks; use num_redundant=4 or 0"):
        MoESpec(num_layers=1, num_experts=8, num_ranks=4, num_redundant=2)


def test_words_must_be_kept_long_enough() -> None:
    """I3: a history below 2 lag + 2 is refused where it is set."""
    with pytest.raises(ValueError, match="need at least 6"):
        HookSettings(lag=2, history=5)


def test_ranks_that_do_not_come_are_named(group: str, runtime_dir: Path) -> None:
    """AttachTimeout names them, and the one that waited leaves nothing."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir, attach_deadline_s=0.2)) as ranks:
        error = ranks.outcomes("attach", ranks=[0])[0]
        assert isinstance(error, AttachTimeout)
        assert error.missing == (1,)
        assert only_weights(group)


def test_a_rank_is_attached_once(group: str, runtime_dir: Path) -> None:
    """A second process as the same rank is refused, and the group does not feel it."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir)) as ranks:
        ranks.attach()
        with pytest.raises(RankTaken, match="rank 1 is attached already") as caught:
            ranks.ask(0, "call", attach_as, 1)
        assert caught.value.pid == ranks.processes[1].pid
        ranks.step(20)


def attach_as(actor: Actor, rank: int, **fields: Any) -> None:
    """Attach a second time from this process."""
    type(actor.hook).attach(
        group=actor.options.group,
        rank=rank,
        spec=fields.get("spec", actor.spec),
        weights=actor.weights or (),
        load=actor.load,
        settings=fields.get("settings", actor.options.settings),
    )


def attach_with_spec(actor: Actor) -> None:
    """As rank 1, with two more nodes."""
    spec = MoESpec(num_layers=1, num_experts=4, num_ranks=2, num_redundant=2, num_nodes=2)
    attach_as(actor, 1, spec=spec)


def attach_with_lag(actor: Actor) -> None:
    """As rank 1, with other settings."""
    settings = hook_settings(Path(actor.options.settings.runtime_dir), lag=3, history=32, staging_rows=2)
    attach_as(actor, 1, settings=settings)


@pytest.mark.parametrize(
    ("attach", "differences"),
    [
        (attach_with_spec, ["num_nodes is 2 here and 1"]),
        (attach_with_lag, ["lag is 3 here and 2", "history is 32 here and 64", "staging_rows is 2 here and 3"]),
    ],
)
def test_another_description_than_the_groups_is_refused(
    group: str, runtime_dir: Path, attach: Callable[[Actor], None], differences: list[str]
) -> None:
    """Spec, lag, history and staging rows must be the group's; the message lists what differs, and the group serves on."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir)) as ranks:
        ranks.attach()
        before = segments_left(group)
        with pytest.raises(SpecMismatch) as caught:
            ranks.ask(0, "call", attach)
        assert all(text in str(caught.value) for text in differences)
        assert segments_left(group) == before
        ranks.step(10)


def test_another_placement_than_the_groups_is_refused(group: str, runtime_dir: Path) -> None:
    """Ranks that loaded their weights for different placements must not serve together."""
    turned_LP = np.roll(initial_placement(PAIR), 3, axis=1)
    settings = hook_settings(runtime_dir, attach_deadline_s=1.0)
    with RankGroup(group, PAIR, settings, each=[{}, {"placement": turned_LP}]) as ranks:
        outcomes = ranks.outcomes("attach")
        assert any(isinstance(error, SpecMismatch) and "placement" in str(error) for error in outcomes)
        ranks.all("detach")
        assert only_weights(group)


def test_replicas_with_different_bytes_are_refused(group: str, runtime_dir: Path) -> None:
    """Layer, expert and slots are named. Whoever comes too late to see it is told that the other rank left, or waits for it."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir, attach_deadline_s=1.0)) as ranks:
        ranks.attach()
        ranks.all("detach")
        ranks.ask(1, "call", damage)
        outcomes = ranks.outcomes("attach")
        found = [str(error) for error in outcomes if isinstance(error, SpecError)]
        assert found
        assert all(isinstance(error, SpecError | PeerLost | AttachTimeout) for error in outcomes)
        assert "layer 0: slots 0 and 4 should both hold expert 0" in found[0]
        assert only_weights(group)


def damage(actor: Actor) -> None:
    """Change a replica."""
    assert actor.weights is not None
    actor.weights[0]["packed"][1] ^= 1


def test_ranks_must_agree_on_verification(group: str, runtime_dir: Path) -> None:
    """A rank that verifies needs everybody's fingerprints, and says who has none."""
    each = [{"settings": hook_settings(runtime_dir, verify=verify, attach_deadline_s=1.0)} for verify in ("all", "off")]
    with RankGroup(group, PAIR, hook_settings(runtime_dir), each=each) as ranks:
        error = ranks.outcomes("attach")[0]
        assert isinstance(error, SpecMismatch)
        assert "hook.verify is all here and off on rank 1" in str(error)
        ranks.all("detach")
        assert only_weights(group)


def test_a_rank_killed_while_it_waits_is_replaced(group: str, runtime_dir: Path) -> None:
    """Ranks killed before the group was complete do not spoil it: a new process takes their place."""
    spec = MoESpec(num_layers=1, num_experts=6, num_ranks=3)
    with RankGroup(group, spec, hook_settings(runtime_dir)) as ranks:
        for rank in (0, 1):
            ranks.send(rank, "attach")
        wait_for(lambda: state_of(group, 1) is MemberState.READY and state_of(group, 0) is MemberState.READY)
        ranks.kill(1)
        ranks.restart(1)
        for rank in (1, 2):
            ranks.send(rank, "attach")
        assert [ranks.receive(rank) for rank in range(3)] == [None] * 3
        ranks.step(10)
        ranks.all("detach")


def test_a_rank_killed_while_it_joins_is_replaced_in_place(group: str, runtime_dir: Path) -> None:
    """Killed with the group's lock and before it was READY: nobody has seen it, so the incarnation goes on without another."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir)) as ranks:
        ranks.send(0, "attach")
        wait_for(lambda: state_of(group, 0) is MemberState.READY)
        words = AgreementWords.open(group)
        ranks.send(1, "call", die_while_joining)
        ranks.processes[1].join()
        assert words.member(1).state is MemberState.JOINING
        ranks.kill(1)
        ranks.restart(1)
        ranks.send(1, "attach")
        assert [ranks.receive(rank) for rank in range(2)] == [None] * 2
        ranks.step(10)
        assert not words.ended
        words.close()
        ranks.all("detach")


def die_while_joining(actor: Actor) -> None:
    """Kill -9 right before READY, with all segments made."""
    AgreementWords.set_state = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    actor.attach()


def test_two_groups_on_the_same_ranks(make_group: Callable[[str], str], runtime_dir: Path) -> None:
    """A main and a draft model: groups of their own, each with its plans, in the same runtime directory."""
    settings, names = hook_settings(runtime_dir), [make_group("main"), make_group("main.draft")]
    with RankGroup(names[0], PAIR, settings) as main, RankGroup(names[1], PAIR, settings) as draft:
        for ranks in (main, draft):
            ranks.attach()
        for ranks in (main, draft):
            daemon = Publisher(ranks.group, PAIR)
            plan = daemon.post(daemon.plan([(0, np.roll(daemon.rows_LP[0], 3))]))
            ranks.step_until(daemon.done)
            daemon.applied(plan)
            assert ranks.rows() == daemon.rows_LP.tolist()
            daemon.close()
        assert main.all("statistics_of", "num_commits") == draft.all("statistics_of", "num_commits") == [1, 1]


@pytest.mark.parametrize("content", [b"not ours" * 1000, b""])
def test_a_segment_that_is_not_ours_is_refused(group: str, runtime_dir: Path, content: bytes) -> None:
    """What stands under the group's name and is not a group is neither read nor removed."""
    path = Path("/dev/shm") / segment_name(group, "group")[1:]
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(SegmentRefused), attached(group, runtime_dir):
        pass
    assert path.read_bytes() == content
    path.unlink()
    assert not segments_left(group)


def test_a_group_segment_that_others_may_read_is_refused(group: str, runtime_dir: Path) -> None:
    """Mode 0600 is needed; the message says what was found."""
    with attached(group, runtime_dir):
        path = Path("/dev/shm") / segment_name(group, "group")[1:]
        path.chmod(0o644)
        with pytest.raises(SegmentRefused, match="mode 0644"):
            AgreementWords.open(group)


@pytest.mark.parametrize("number", range(5))
def test_no_room_leaves_nothing(group: str, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Whichever segment finds no room (board, live, group, ring, export), those before it go again."""
    allocate, calls = os.posix_fallocate, []

    def limited(fd: int, offset: int, length: int) -> None:
        calls.append(length)
        # the first is the weights'
        if len(calls) == number + 2:
            raise OSError(28, "No space left on device")
        allocate(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", limited)
    with pytest.raises(NoSharedMemory, match="no room in /dev/shm"), attached(group, runtime_dir):
        pass
    assert not segments_left(group)


def test_an_ended_incarnation_is_followed_by_another(group: str, runtime_dir: Path) -> None:
    """I10: each attach after a detach makes a new one, with a greater number and steps from 0."""
    numbers = []
    for _ in range(3):
        with attached(group, runtime_dir, SOLO) as (hook, _load):
            with hook.step():
                pass
            numbers.append(hook._parts.membership.words.incarnation)
    assert numbers == sorted(set(numbers))

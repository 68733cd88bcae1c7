"""All ranks of an engine join, or none: two real rank processes, and an engine of one rank for what needs no second."""

import contextlib
import gc
import json
import logging
import os
import re
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eplb_async.core.config import IntegrationSettings, Settings
from eplb_async.core.errors import ConfigError, EngineDeclined
from eplb_async.core.load import Phase
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.integrations.engine_group import EngineGroup, _group_name, engine_settings
from eplb_async.rank.transfer.shm import share_weights
from eplb_async.runtime.client import ControlClient
from eplb_async.shm.launch import socket_path
from eplb_async.shm.ring import PHASES, LoadRing
from tests.integrations import engine_rank
from tests.integrations.engine_rank import Alone, offer, return_without_close
from tests.rank.harness import RankGroup, forkserver, hook_settings, make_weights
from tests.rank.publisher import Publisher
from tests.rank.solo import SOLO
from tests.shm.processes import run_code

SPEC = MoESpec(num_layers=2, num_experts=4, num_redundant=2, num_ranks=2)


def environment(runtime_dir: Path, group: str, **fields: str) -> dict[str, str]:
    """Settings of an engine's processes."""
    known = {"RUNTIME_DIR": str(runtime_dir), "INTEGRATION_GROUP": group, "INTEGRATION_DAEMON": "optional"}
    known |= {"HOOK_ATTACH_DEADLINE_S": "5", "DAEMON_DISCOVERY_INTERVAL_S": "0.02", "DAEMON_EXIT_WHEN_IDLE_S": "0"}
    return {f"EPLB_ASYNC_{name}": text for name, text in {**known, **fields}.items()}


@contextlib.contextmanager
def engine(
    group: str, runtime_dir: Path, only_rank_1: dict[str, str] | None = None, **fields: str
) -> Iterator[RankGroup]:
    """Two ranks that have met, and have not joined."""
    with RankGroup(group, SPEC, hook_settings(runtime_dir)) as ranks:
        for rank, own in enumerate(({}, only_rank_1 or {})):
            environ = environment(runtime_dir, group, **{**fields, **own})
            ranks.send(rank, "call", engine_rank.start, str(runtime_dir / "rendezvous"), environ)
        assert [ranks.receive(rank) for rank in range(SPEC.num_ranks)] == [None, None]
        yield ranks
        ranks.all("call", engine_rank.forget)


def expect_declined(ranks: RankGroup, outcomes: list[Any], why: str) -> None:
    """All ranks were told the same, and there is no segment of a group any more."""
    assert [type(outcome) for outcome in outcomes] == [EngineDeclined, EngineDeclined], outcomes
    assert str(outcomes[0]) == str(outcomes[1])
    assert why in str(outcomes[0])
    assert ranks.all("call", engine_rank.segments, ranks.group) == [[], []]


def test_all_ranks_join_and_leave(group: str, runtime_dir: Path) -> None:
    """They use one name and step together; what is left behind them is nothing."""
    with engine(group, runtime_dir) as ranks:
        assert ranks.all("call", engine_rank.join) == [group, group]
        ranks.all("call", engine_rank.step, 5)
        assert ranks.ask(0, "call", engine_rank.segments, group)
        identities = ranks.all("call", engine_rank.identity)
        assert len({name for names in identities for name in names}) == 1
        ranks.all("call", engine_rank.leave)
        assert ranks.all("call", engine_rank.segments, group) == [[], []]


def test_the_first_ranks_name_is_that_of_all(group: str, runtime_dir: Path) -> None:
    """Names have a process id in them where none is set, and ids differ."""
    with engine(group, runtime_dir, only_rank_1={"INTEGRATION_GROUP": f"{group}-of-1"}) as ranks:
        assert ranks.all("call", engine_rank.join) == [group, group]
        ranks.all("call", engine_rank.leave)


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("offer", "rank 1: SpecError: this model has no experts"),
        ("size", "rank 1: EngineDeclined: the model has 3 expert-parallel ranks, the engine 2"),
    ],
)
def test_a_misfit_of_one_rank_stops_all_before_they_attach(
    group: str, runtime_dir: Path, trouble: str, why: str
) -> None:
    """The rank is named on all ranks; then all can join, since nothing is in the way."""
    with engine(group, runtime_dir) as ranks:
        expect_declined(ranks, ranks.outcomes("call", engine_rank.join, trouble), why)
        assert ranks.all("call", engine_rank.join) == [group, group]
        ranks.all("call", engine_rank.leave)


def test_settings_that_differ_stop_all(group: str, runtime_dir: Path) -> None:
    """Of two ranks that describe the group differently the later one is refused, and the other told."""
    with engine(group, runtime_dir, only_rank_1={"HOOK_LAG": "3"}, HOOK_ATTACH_DEADLINE_S="2") as ranks:
        expect_declined(ranks, ranks.outcomes("call", engine_rank.join), "SpecMismatch")


def test_one_rank_that_fails_to_attach_has_all_others_leave(group: str, runtime_dir: Path) -> None:
    """Rank 0 had joined: it detaches, no segment stays, and no daemon holds the group."""
    with engine(group, runtime_dir, INTEGRATION_DAEMON="auto") as ranks:
        settings = Settings(runtime_dir=str(runtime_dir))
        try:
            outcomes = ranks.outcomes("call", engine_rank.join, "attach")
            expect_declined(ranks, outcomes, "rank 1: NoSharedMemory")
            assert "rank 0" not in str(outcomes[0])
            with ControlClient(settings) as client:
                end = time.monotonic() + 30
                while any(held.state != "ended" for held in client.status().groups):
                    assert time.monotonic() < end, "the daemon still holds the group"
            assert ranks.all("call", engine_rank.join) == [group, group]
            ranks.all("call", engine_rank.leave)
        finally:
            with ControlClient(settings) as client:
                client.stop_daemon()


class Solo:
    """An engine of one rank, in this process."""

    def __init__(self, group: str, runtime_dir: Path) -> None:
        self.settings = Settings(
            runtime_dir=str(runtime_dir), integration=IntegrationSettings(group=group, daemon="optional")
        )
        self.weights = share_weights(group, 0, make_weights(SOLO, initial_placement(SOLO), 0))
        self.load = torch.zeros(SOLO.num_layers, SOLO.num_experts, dtype=torch.int32)

    def join(self, ranks: Alone | None = None) -> EngineGroup:
        """Join."""
        return EngineGroup.join(ranks or Alone(), lambda: offer(SOLO, self.weights, self.load), self.settings)


@pytest.fixture
def solo(group: str, runtime_dir: Path) -> Iterator[Solo]:
    """See Solo."""
    made = Solo(group, runtime_dir)
    yield made
    made.weights.close()


def test_a_collective_that_breaks_leaves_nothing(solo: Solo, group: str) -> None:
    """Another rank dies while all attach: the engine's own error comes through, and our segments are gone."""

    class Breaking(Alone):
        calls = 0

        def gather(self, value: Any) -> list[Any]:
            self.calls += 1
            if self.calls == 2:
                assert engine_rank.segments(None, group)
                raise RuntimeError("connection closed by peer")
            return super().gather(value)

    with pytest.raises(RuntimeError, match="connection closed by peer") as caught:
        solo.join(Breaking())
    # the traceback keeps what the frames held alive, as an engine's that logs it does
    assert caught.tb is not None
    assert engine_rank.segments(None, group) == []


def test_the_first_step_only_forgets_what_warm_up_counted(solo: Solo, group: str) -> None:
    """It begins a step; each further one ends that under the phase and tokens of the forward that has run, and begins the next."""
    joined = solo.join()
    try:
        daemon = Publisher(group, SOLO)
        ring = LoadRing.open(group, 0, daemon.words.incarnation)
        solo.load += 1000
        joined.step(Phase.PREFILL, 99)
        assert not solo.load.any()
        assert len(ring.read().step) == 0
        for number, phase in enumerate((Phase.PREFILL, Phase.DECODE, Phase.DUMMY, Phase.MIXED), start=1):
            solo.load += number
            joined.step(phase, 10 * number)
            assert not solo.load.any()
        batch = ring.read()
        ring.close()
        daemon.close()
    finally:
        joined.close()
    assert batch.step.tolist() == [0, 1, 2, 3]
    assert [PHASES[number] for number in batch.phase] == [Phase.PREFILL, Phase.DECODE, Phase.DUMMY, Phase.MIXED]
    assert batch.tokens.tolist() == [10, 20, 30, 40]
    assert [int(counts.max()) for counts in batch.counts] == [1, 2, 0, 4]


def test_close_may_be_called_again(solo: Solo, group: str) -> None:
    """The second time nothing happens; no handler of the interpreter keeps the group, whose tensors are large."""
    joined = solo.join()
    for _ in range(2):
        joined.close()
        assert engine_rank.segments(None, group) == []
    kept = weakref.ref(joined)
    del joined
    gc.collect()
    assert kept() is None


def test_asking_for_a_plan_does_not_wait(solo: Solo, runtime_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A daemon that accepts and never answers holds a thread up, one however often it is asked; its end is logged, not raised."""
    joined = solo.join()
    with socket.socket(socket.AF_UNIX) as deaf, caplog.at_level(logging.WARNING):
        deaf.bind(str(socket_path(runtime_dir)))
        deaf.listen()
        joined.ask_for_plan()
        connection, _ = deaf.accept()
        first = joined._asking
        joined.ask_for_plan()
        joined.step(Phase.DECODE, 1)
        assert first is not None
        assert first.is_alive()
        assert joined._asking is first
        connection.close()
        first.join(30)
        assert not first.is_alive()
    assert [record.levelname for record in caplog.records if "was asked for a plan" in record.message] == ["WARNING"]
    joined.close()


def test_asking_without_a_daemon_is_logged(solo: Solo, caplog: pytest.LogCaptureFixture) -> None:
    """And may be done again."""
    joined = solo.join()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            joined.ask_for_plan()
            assert joined._asking is not None
            joined._asking.join(30)
    joined.close()
    assert len([record for record in caplog.records if "was asked for a plan" in record.message]) == 2


def test_a_worker_process_that_returns_leaves_nothing(group: str, runtime_dir: Path) -> None:
    """Workers of multiprocessing, which engines use, end without atexit's handlers."""
    process = forkserver.Process(target=return_without_close, args=(group, environment(runtime_dir, group)))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    process.close()
    assert engine_rank.segments(None, group) == []


def test_an_interpreter_that_ends_leaves_nothing(group: str, runtime_dir: Path) -> None:
    """A process that is no worker of multiprocessing has atexit's handlers."""
    run_code(
        "import sys, json\n"
        "from tests.integrations.engine_rank import return_without_close\n"
        "return_without_close(sys.argv[1], json.loads(sys.argv[2]))",
        group,
        json.dumps(environment(runtime_dir, group)),
    )
    assert engine_rank.segments(None, group) == []


@pytest.mark.parametrize(
    ("group", "model", "part", "expected"),
    [
        ("", "Qwen/Qwen3-30B-A3B", "", "Qwen3-30B-A3B-PID"),
        ("", "/models/a b:c/", "", "a-b-c-PID"),
        ("", "", "", "model-PID"),
        ("", "../..", "2", "model-2-PID"),
        ("", "x" * 100, "", "x" * 40 + "-PID"),
        ("chat", "Qwen/Qwen3", "", "chat"),
        ("chat", "Qwen/Qwen3", "2", "chat-2"),
    ],
)
def test_names_of_groups(group: str, model: str, part: str, expected: str) -> None:
    """As set, else of the model and the process; a second model of an engine has a part of its own."""
    made = offer(SOLO, [], torch.zeros(0), model, part)
    name = _group_name(Settings(integration=IntegrationSettings(group=group)), made)
    assert name == expected.replace("PID", str(os.getpid()))
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name)


def test_settings_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's own defaults lie under what users set, and what its command line says lies over that."""
    for name in [name for name in os.environ if name.startswith("EPLB_ASYNC_")]:
        monkeypatch.delenv(name)
    plain = engine_settings()
    assert (plain.hook.peer_deadline_s, plain.hook.attach_deadline_s) == (300, 60)
    assert plain.daemon.exit_when_idle_s == 10
    monkeypatch.setenv("EPLB_ASYNC_HOOK_PEER_DEADLINE_S", "7")
    monkeypatch.setenv("EPLB_ASYNC_HOOK_LAG", "3")
    made = engine_settings({"hook": {"lag": 4}, "daemon": {"policy": "static"}})
    assert (made.hook.peer_deadline_s, made.hook.attach_deadline_s, made.hook.lag) == (7, 60, 4)
    assert (made.daemon.policy, made.daemon.exit_when_idle_s) == ("static", 10)


def test_settings_that_an_engine_cannot_mean() -> None:
    """A string, as after one JSON too many, and an unknown key are errors of ours, which plugins turn into a warning."""
    with pytest.raises(EngineDeclined, match=r"settings are '\{\}'; needed a JSON object"):
        engine_settings("{}")
    with pytest.raises(ConfigError, match="Known: runtime_dir, hook"):
        engine_settings({"polcy": "default"})

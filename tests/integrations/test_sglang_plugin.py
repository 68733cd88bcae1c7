"""The plugin in two rank processes of a stand-in for SGLang: what it replaces, what it declines, what it leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_async.core.config import daemon_variables
from eplb_async.core.daemon_settings import EAGER
from eplb_async.core.placement import expert_to_slots, initial_placement
from eplb_async.core.spec import MoESpec
from tests.integrations import sglang_rank
from tests.rank.harness import RankGroup, hook_settings
from tests.rank.publisher import Publisher, shuffled

SPEC = MoESpec(num_layers=3, num_experts=6, num_redundant=2, num_ranks=2)
DAEMON = {**EAGER, "window_steps": 10, "interval_steps": 20, "exit_when_idle_s": 0.5, "poll_interval_s": 0.01}
VARIABLES: dict[str, Any] = {name.removeprefix("EPLB_ASYNC_"): text for name, text in daemon_variables(DAEMON).items()}
CASES: dict[str, dict[str, Any]] = {
    "dynamic": {"num_layers": 5, "moe_layers": (2, 3, 4)},
    "static": {"num_layers": 6, "moe_layers": (1, 3, 5), "dispatch": "static", "a2a": "deepep"},
    "local counts": {"num_layers": 3, "moe_layers": (0, 1, 2), "a2a": "deepep", "local_counts": True},
}


class Engine(RankGroup):
    """Two ranks of the stand-in."""

    def __init__(self, group: str, runtime_dir: Path) -> None:
        super().__init__(group, SPEC, hook_settings(runtime_dir))
        self.runtime_dir = runtime_dir

    def start(
        self, fields: dict[str, Any], misfit: str = "", only_rank_1: dict[str, str] | None = None, **environment: str
    ) -> None:
        """Each rank loads the plugin and its model; `environment` are settings, without their prefix."""
        known = {
            "EPLB_ASYNC_RUNTIME_DIR": str(self.runtime_dir),
            "EPLB_ASYNC_INTEGRATION_GROUP": self.group,
            "EPLB_ASYNC_INTEGRATION_DAEMON": "optional",
            "EPLB_ASYNC_HOOK_PEER_DEADLINE_S": "20",
            **{f"EPLB_ASYNC_{name}": value for name, value in environment.items()},
        }
        place = str(self.runtime_dir / "rendezvous")
        for rank, own in enumerate(({}, only_rank_1 or {})):
            self.send(rank, "call", sglang_rank.start, place, {**known, **own}, fields, misfit)
        answers = [self.receive(rank) for rank in range(SPEC.num_ranks)]
        assert answers == [None, None]

    def forward(self, count: int) -> None:
        """All ranks make forwards, whose outputs must be right."""
        wrong = [line for lines in self.all("call", sglang_rank.forward, count) for line in lines]
        assert not wrong, wrong

    def states(self) -> list[dict[str, Any]]:
        """Of all ranks."""
        return self.all("call", sglang_rank.state)

    def each(self, function: Callable[..., Any]) -> list[Any]:
        """On all ranks."""
        return self.all("call", function)


@pytest.mark.parametrize("name", CASES)
def test_plans_reach_the_tensors_that_sglang_reads(group: str, runtime_dir: Path, name: str) -> None:
    """Plans are committed while forwards run; maps, host copies and weights agree, dense layers are untouched, outputs stay right."""
    case, random = CASES[name], np.random.default_rng(5)
    with Engine(group, runtime_dir) as engine:
        engine.start(case)
        daemon = Publisher(group, SPEC)
        before = engine.each(sglang_rank.maps)[0]
        for _ in range(3):
            changes = [(layer, shuffled(daemon.rows_LP[layer], random, SPEC)) for layer in range(SPEC.num_layers)]
            plan = daemon.post(daemon.plan(changes))
            while not daemon.done():
                engine.forward(3)
            daemon.applied(plan)
        engine.forward(2)
        found = engine.each(sglang_rank.maps)
        assert all(state["joined"] and state["commits"] >= SPEC.num_layers for state in engine.states())
        daemon.close()
        engine.each(sglang_rank.stop)
    moe = list(case["moe_layers"])
    table_LEK, count_LE = expert_to_slots(daemon.rows_LP, SPEC.num_experts, SPEC.num_slots)
    for rank_maps in found:
        assert [rank_maps["slots"][layer] for layer in moe] == daemon.rows_LP.tolist()
        assert [rank_maps["table"][layer] for layer in moe] == table_LEK.tolist()
        assert [rank_maps["count"][layer] for layer in moe] == count_LE.tolist()
        for layer in set(range(case["num_layers"])) - set(moe):
            assert all(rank_maps[part][layer] == before[part][layer] for part in ("slots", "table", "count"))


def test_a_real_daemon_balances(group: str, runtime_dir: Path) -> None:
    """The rank starts a daemon; it sees the counts, and moves replicas to the expert that half of the tokens want."""
    with Engine(group, runtime_dir) as engine:
        engine.start(
            CASES["dynamic"],
            INTEGRATION_DAEMON="auto",
            **VARIABLES,
        )
        for _ in range(600):
            engine.forward(5)
            if all(state["commits"] for state in engine.states()):
                break
        else:
            pytest.fail("the daemon has moved nothing")
        engine.forward(5)
        engine.each(sglang_rank.maps)
        engine.each(sglang_rank.stop)


def test_only_moe_layers_are_counted(group: str, runtime_dir: Path) -> None:
    """Consecutive layers are read where SGLang counts; others are put together. Four tokens, three of them for expert 0."""
    for name in ("dynamic", "static"):
        with Engine(f"{group}-{name}", runtime_dir) as engine:
            engine.start(CASES[name])
            counts = engine.each(sglang_rank.counted)
            engine.each(sglang_rank.stop)
        (runtime_dir / "rendezvous").unlink(missing_ok=True)
        slot_to_expert = initial_placement(SPEC)[0]
        for rank_counts in counts:
            assert len(rank_counts) == SPEC.num_layers
            for row in rank_counts:
                assert [
                    sum(n for n, e in zip(row, slot_to_expert, strict=True) if e == expert) for expert in (0, 1, 2)
                ] == [3, 1, 0]


def expect_own(engine: Engine, why: str, why_class: str = "sglang_balancer") -> None:
    """SGLang's own balancing runs on every rank, a warning says why, and no segment is left."""
    engine.forward(3)
    for state in engine.states():
        warnings = [line for line in state["log"] if line.startswith("WARNING")]
        assert [why in line for line in warnings] == [True], state["log"]
        assert state["class"].endswith(why_class)
        assert (state["joined"], state["own_steps"], state["segments"]) == (False, 3, [])


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"elastic": "mooncake"}, "elastic EP"),
        ({"dispatch": "lp", "a2a": "deepep"}, "--ep-dispatch-algorithm lp"),
        ({"a2a": "deepep", "second_slot": True}, "two slots of one expert on rank 0"),
        ({"per_token": True}, "not in one tensor"),
    ],
)
def test_what_does_not_fit_is_declined(group: str, runtime_dir: Path, fields: dict[str, Any], why: str) -> None:
    """Modes that the hook cannot serve are named; nothing is installed on any rank."""
    with Engine(group, runtime_dir) as engine:
        engine.start({**CASES["dynamic"], **fields})
        expect_own(engine, why)
        engine.each(sglang_rank.stop)


def test_one_rank_that_cannot_attach_stops_all(group: str, runtime_dir: Path) -> None:
    """Settings of rank 1 do not fit those of rank 0: both decline, and what was made is gone."""
    with Engine(group, runtime_dir) as engine:
        engine.start(CASES["dynamic"], only_rank_1={"EPLB_ASYNC_HOOK_LAG": "3"}, HOOK_ATTACH_DEADLINE_S="5")
        expect_own(engine, "SpecMismatch")  # of whichever rank comes second
        engine.each(sglang_rank.stop)


def test_another_source_leaves_the_class_alone(group: str, runtime_dir: Path) -> None:
    """If SGLang's source is not what is known, nothing of it is replaced."""
    with Engine(group, runtime_dir) as engine:
        engine.start(CASES["dynamic"], misfit="a method has another parameter")
        expect_own(engine, "a method has another parameter", why_class="sglang.srt.eplb.eplb_manager")
        assert not any(any(state["hooked"]) for state in engine.states())
        engine.each(sglang_rank.stop)


def test_it_can_be_switched_off(group: str, runtime_dir: Path) -> None:
    """EPLB_ASYNC_INTEGRATION_ENABLED=0 leaves everything as it is, without a warning."""
    with Engine(group, runtime_dir) as engine:
        engine.start(CASES["dynamic"], INTEGRATION_ENABLED="0")
        engine.forward(2)
        for state in engine.states():
            assert state["class"] == "sglang.srt.eplb.eplb_manager"
            assert [line.split()[0] for line in state["log"]] == ["INFO"]
            assert not any(state["hooked"])
        engine.each(sglang_rank.stop)


def test_without_eplb_nothing_joins(group: str, runtime_dir: Path) -> None:
    """An engine without --enable-eplb (and a draft model's runner) has no balancer, and forwards run."""
    with Engine(group, runtime_dir) as engine:
        engine.start({**CASES["dynamic"], "enable_eplb": False})
        engine.forward(2)
        assert [state["segments"] for state in engine.states()] == [[], []]
        engine.each(sglang_rank.stop)


@pytest.mark.parametrize("leave", [sglang_rank.update, sglang_rank.disable], ids=["new weights", "disabled"])
def test_the_own_balancing_goes_on_from_where_ours_ends(
    group: str, runtime_dir: Path, leave: Callable[..., None]
) -> None:
    """In the middle of a plan weights are replaced, or balancing is stopped: no commit comes after that, and maps are what weights are."""
    with Engine(group, runtime_dir) as engine:
        engine.start(CASES["static"])
        daemon, random = Publisher(group, SPEC), np.random.default_rng(6)
        daemon.post(
            daemon.plan([(layer, shuffled(daemon.rows_LP[layer], random, SPEC)) for layer in range(SPEC.num_layers)])
        )
        while not engine.states()[0]["commits"]:
            engine.forward(1)
        engine.each(leave)
        left = engine.each(sglang_rank.maps)
        engine.forward(10)
        assert engine.each(sglang_rank.maps) == left
        for state in engine.states():
            assert (state["joined"], state["own_steps"], state["segments"]) == (False, 10, [])
            assert state["disabled"] == ("a reason" if leave is sglang_rank.disable else "")
        daemon.close()
        engine.each(sglang_rank.stop)


def test_weights_that_move_before_the_first_forward_are_noticed(group: str, runtime_dir: Path) -> None:
    """A rank whose expert tensors are not where they were when it joined makes all leave, before anything is pulled."""
    with Engine(group, runtime_dir) as engine:
        engine.start(CASES["dynamic"])
        engine.ask(1, "call", sglang_rank.moved)
        expect_own(engine, "rank 1: 3 expert tensors have been made anew")
        engine.each(sglang_rank.stop)


def test_a_rebalance_of_sglang_asks_the_daemon(group: str, runtime_dir: Path) -> None:
    """`rebalance` moves nothing itself and does not wait; that no daemon runs is logged."""
    with Engine(group, runtime_dir) as engine:
        engine.start(CASES["dynamic"])
        assert engine.each(sglang_rank.answer) == [0, 0]
        for state in engine.states():
            assert state["joined"]
            assert state["own_steps"] == 0
        engine.each(sglang_rank.stop)

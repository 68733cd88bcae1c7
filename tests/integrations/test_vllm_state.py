"""The plugin's EplbState in two rank processes, over a stand-in for vLLM's and, where wheels are, over those of releases."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_async.core.config import Settings, daemon_variables
from eplb_async.core.daemon_settings import EAGER
from eplb_async.core.load import Phase
from eplb_async.core.placement import expert_to_slots
from eplb_async.runtime.client import ControlClient
from eplb_async.shm.ring import PHASES, LoadRing
from tests.integrations import vllm_rank
from tests.integrations.vllm_stand_in import EXPERTS, SPEC, placement
from tests.integrations.wheels import of_engine
from tests.rank.harness import RankGroup, hook_settings
from tests.rank.publisher import Publisher, shuffled

WHEELS = of_engine("vllm-[0-9]*.whl")
PARENTS = [None, *WHEELS]
DAEMON = {
    **EAGER,
    "poll_interval_s": 0.01,
    "discovery_interval_s": 0.05,
    "exit_when_idle_s": 0.0,
    "policy": "random",
    "window_steps": 5,
    "interval_steps": 10,
    "par_threshold": 1.0,
    "min_gain": 0.0,
}
REAL = {
    "INTEGRATION_DAEMON": "auto",
    **{name.removeprefix("EPLB_ASYNC_"): text for name, text in daemon_variables(DAEMON).items()},
}
"""A daemon that decides soon, and moves something whether that is good or not."""


class Engine(RankGroup):
    """Two ranks."""

    def __init__(self, group: str, runtime_dir: Path) -> None:
        super().__init__(group, SPEC, hook_settings(runtime_dir))
        self.runtime_dir = runtime_dir

    def start(
        self,
        *models: str,
        extra: Any = None,
        wheel: Path | None = None,
        elastic: bool = False,
        settings: dict[str, str] | None = None,
    ) -> None:
        """Each rank makes its state and adds models; `settings` are variables without their prefix."""
        known = {"RUNTIME_DIR": str(self.runtime_dir), "INTEGRATION_GROUP": self.group}
        known |= {"INTEGRATION_DAEMON": "optional", "HOOK_PEER_DEADLINE_S": "20", **(settings or {})}
        environ = {f"EPLB_ASYNC_{name}": text for name, text in known.items()}
        place = str(self.runtime_dir / "rendezvous")
        self.each(vllm_rank.start, place, environ, extra, wheel, elastic)
        for model in models:
            self.each(vllm_rank.add, model)

    def each(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """On all ranks."""
        return self.all("call", function, *args)

    def forward(self, count: int = 1, num_tokens: int = 40, step: Callable[..., Any] = vllm_rank.forward) -> None:
        """Forwards on all ranks, whose outputs and counts must be right."""
        assert self.each(step, count, num_tokens) == [[], []]

    def looks(self) -> list[dict[str, Any]]:
        """Of all ranks; they must read the same maps, and hold what those say."""
        looks = self.each(vllm_rank.look)
        for model, other in zip(*(look["models"] for look in looks), strict=True):
            assert [model["slots"], model["table"]] == [other["slots"], other["table"]]
        assert [model["wrong_slots"] for look in looks for model in look["models"]] == [0] * 2 * len(looks[0]["models"])
        return looks


@pytest.fixture(params=PARENTS, ids=lambda wheel: wheel.name.split("-")[1] if wheel else "stand-in")
def wheel(request: pytest.FixtureRequest) -> Path | None:
    """Whose EplbState is the parent."""
    path: Path | None = request.param
    return path


def of_kind(look: dict[str, Any], kind: str) -> list[str]:
    """Lines of the log of one level."""
    return [line for line in look["log"] if line.startswith(kind)]


def test_plans_reach_the_tensors_that_vllm_reads(group: str, runtime_dir: Path, wheel: Path | None) -> None:
    """Plans are committed between forwards: maps, weights, counts and outputs agree at every step."""
    random = np.random.default_rng(5)
    with Engine(group, runtime_dir) as engine:
        engine.start("main", wheel=wheel)
        daemon = Publisher(group, SPEC, placement().astype(np.int32))
        for _ in range(3):
            changes = [(layer, shuffled(daemon.rows_LP[layer], random, SPEC)) for layer in range(SPEC.num_layers)]
            plan = daemon.post(daemon.plan(changes))
            while not daemon.done():
                engine.forward(3)
            daemon.applied(plan)
        engine.forward(2)
        looks = engine.looks()
        daemon.close()
        engine.each(vllm_rank.stop)
    table_LEK, _ = expert_to_slots(daemon.rows_LP, EXPERTS, SPEC.num_slots)
    for look in looks:
        model = look["models"][0]
        assert model["slots"] == daemon.rows_LP.tolist()
        width = len(model["table"][0][0])
        assert model["table"] == table_LEK[:, :, :width].tolist()
        assert (table_LEK[:, :, width:] == -1).all()
        assert look["groups"] == [group]
        assert look["class"] == ("EplbState" if wheel else "StandInState")
        assert of_kind(look, "WARNING") == []
        # what only vLLM's own way of moving weights needs takes no memory
        assert (model["window_bytes"], model["buffers"], look["is_async"], look["worker"]) == (0, 0, False, False)


def test_a_real_daemon_balances_and_is_asked(group: str, runtime_dir: Path) -> None:
    """Rank 0 starts a daemon. It decides at its interval; and at once when vLLM calls rearrange, which does not wait."""
    settings = Settings(runtime_dir=str(runtime_dir))
    with Engine(group, runtime_dir) as engine:
        engine.start("main", settings=REAL)
        try:
            with ControlClient(settings) as client:
                for _ in range(400):
                    engine.forward(5)
                    if engine.looks()[0]["models"][0]["moved"]:
                        break
                else:
                    pytest.fail("the daemon has moved nothing")
                client.pause(group)
                before = len(client.history(group)[group])
                engine.ask(0, "call", vllm_rank.call, "rearrange")
                for _ in range(400):
                    engine.forward(5)
                    if any("decision" in line for line in engine.looks()[0]["log"]):
                        break
                else:
                    pytest.fail("no decision came of rearrange")
                assert len(client.history(group)[group]) > before
                assert "INFO" in next(line for line in engine.looks()[0]["log"] if "decision" in line)
            engine.each(vllm_rank.stop)
        finally:
            with ControlClient(settings) as client:
                client.stop_daemon()


def test_steps_are_recorded_as_what_they_were(group: str, runtime_dir: Path, wheel: Path | None) -> None:
    """Warm-up is forgotten and profile steps are none; then dummy, decode, and more tokens than decoding requests can have."""
    with Engine(group, runtime_dir) as engine:
        engine.start("main", wheel=wheel)
        daemon = Publisher(group, SPEC, placement().astype(np.int32))
        engine.each(vllm_rank.warm_up)
        engine.each(vllm_rank.step)  # with no forward, as for an engine that schedules nothing
        for num_tokens in (16, 17):
            engine.forward(1, num_tokens)
        for model in engine.each(vllm_rank.look):
            assert model["models"][0]["load"] == 0
        engine.all("call", _dummy)
        rings = [LoadRing.open(group, rank, daemon.words.incarnation) for rank in range(SPEC.num_ranks)]
        batches = [ring.read() for ring in rings]
        for ring in rings:
            ring.close()
        daemon.close()
        looks = engine.looks()
        engine.each(vllm_rank.stop)
    for batch in batches:
        phases = [PHASES[number] for number in batch.phase]
        assert phases == [Phase.DECODE, Phase.DECODE, Phase.MIXED, Phase.DUMMY]
        assert batch.tokens.tolist() == [0, 16, 17, 40]
        counts = batch.counts.sum(axis=-1)
        assert counts.tolist() == [[0] * 3, [16] * 3, [17] * 3, [0] * 3]
    first = engine_steps(looks[0])
    assert looks[0]["rearrangement_step"] - first == 5


def engine_steps(look: dict[str, Any]) -> int:
    """What vLLM's counter begins with: three quarters of its interval; the stand-in's begins at 0."""
    return 750_000 if look["rearrangement_step"] >= 750_000 else 0


def _dummy(actor: Any) -> list[str]:
    return vllm_rank.forward(actor, 1, 40, is_dummy=True)


def _logged(actor: Any) -> list[str]:
    return vllm_rank.forward(actor, 20, 40, log_stats=True)


def test_balance_is_logged_where_vllm_is_told_to(group: str, runtime_dir: Path, wheel: Path | None) -> None:
    """A line at every tenth step, from rank 0, whose numbers are those of all ranks."""
    with Engine(group, runtime_dir) as engine:
        engine.start("main", wheel=wheel)
        engine.forward(10)
        assert engine.each(_logged) == [[], []]
        looks = engine.looks()
        engine.each(vllm_rank.stop)
    lines = [[line for line in look["log"] if "EPLB step" in line] for look in looks]
    assert [len(found) for found in lines] == [2, 0]
    for line in lines[0]:
        words = dict(part.split("=") for part in line.replace(",", "").split() if "=" in part)
        # 40 tokens of two ranks in 3 layers, over two ranks
        assert words["avg_tokens"] == "120.00"
        assert 120 <= int(words["max_tokens"]) <= 240
        assert float(words["balancedness"]) == pytest.approx(120 / int(words["max_tokens"]), abs=1e-4)
        assert "for model main" in line
        assert line.endswith("(eplb_async, generation 1)")


def test_what_else_moves_weights_does_nothing(group: str, runtime_dir: Path, wheel: Path | None) -> None:
    """The loop of vLLM is not started, drained, or asked; a mapping from outside is refused with the reason."""
    with Engine(group, runtime_dir) as engine:
        engine.start("main", wheel=wheel)
        for name in ("start_async_loop", "drain_async", "rearrange"):
            assert engine.each(vllm_rank.call, name) == [None, None]
        assert all("by its plans alone" in text for text in engine.each(vllm_rank.remap))
        for look in engine.looks():
            assert (look["own"], look["is_async"], look["worker"]) == ([], False, False)
            assert look["groups"] == [group]
        engine.each(vllm_rank.stop)


def test_a_draft_has_a_group_of_its_own(group: str, runtime_dir: Path, wheel: Path | None) -> None:
    """Both step together, and each is balanced by plans of its own; tokens of the step are those of the main model."""
    random = np.random.default_rng(7)
    with Engine(group, runtime_dir) as engine:
        engine.start("main", "draft", wheel=wheel)
        daemon = Publisher(f"{group}-2", SPEC, placement().astype(np.int32))
        engine.forward(3)
        ring = LoadRing.open(f"{group}-2", 0, daemon.words.incarnation)
        assert ring.read().tokens.tolist() == [40, 40]
        ring.close()
        plan = daemon.post(daemon.plan([(1, shuffled(daemon.rows_LP[1], random, SPEC))]))
        while not daemon.done():
            engine.forward(2)
        daemon.applied(plan)
        engine.forward(2)
        for look in engine.looks():
            assert look["groups"] == [group, f"{group}-2"]
            assert len(set(look["steps"])) == 1
            assert [model["moved"] for model in look["models"]] == [False, True]
            assert look["models"][1]["slots"] == daemon.rows_LP.tolist()
        assert engine.each(_logged) == [[], []]
        lines = [line for line in engine.looks()[0]["log"] if "EPLB step" in line]
        assert [("for model main" in line, "for model draft" in line) for line in lines[:2]] == [
            (True, False),
            (False, True),
        ]
        daemon.close()
        engine.each(vllm_rank.stop)


def expect_own(engine: Engine, why: str, level: str = "WARNING") -> None:
    """The balancing of vLLM runs on every rank, one line says why, no segment is left, and forwards are right."""
    engine.forward(2)
    engine.each(vllm_rank.call, "drain_async")
    for look in engine.looks():
        assert [why in line for line in look["log"] if line.startswith(level)] == [True], look["log"]
        assert [line for line in of_kind(look, "WARNING") if level != "WARNING"] == []
        assert (look["groups"], look["segments"]) == ([], [])
        assert look["is_async"]
        assert look["own"] in (["step", "step", "drain_async"], [])  # a wheel's notes nothing
        assert all(model["buffers"] and model["window_bytes"] for model in look["models"])
        if not look["own"]:
            assert look["rearrangement_step"] == 750_002


def test_a_model_that_cannot_be_taken_stays_with_vllm(group: str, runtime_dir: Path, wheel: Path | None) -> None:
    """The tensors of rank 1 are not such as the hook needs: neither rank takes the model."""
    with Engine(group, runtime_dir) as engine:
        engine.start(wheel=wheel, settings={"HOOK_ATTACH_DEADLINE_S": "1"})
        engine.each(vllm_rank.add, "main", 1)
        expect_own(engine, "rank 1: SpecError")
        engine.each(vllm_rank.stop)


def test_a_model_that_lacks_what_is_read_stays_with_vllm(group: str, runtime_dir: Path) -> None:
    """An attribute is not there on rank 1: both ranks decline instead of one dying and the other waiting for it."""
    with Engine(group, runtime_dir) as engine:
        engine.start(settings={"HOOK_ATTACH_DEADLINE_S": "1"})
        engine.each(vllm_rank.add, "main", -1, 1)
        expect_own(engine, "rank 1: EngineDeclined")
        engine.each(vllm_rank.stop)


def test_a_second_model_that_cannot_be_taken_gives_the_first_back(
    group: str, runtime_dir: Path, wheel: Path | None
) -> None:
    """The first has read our tensors: it reads vLLM's own again, and vLLM's balancing goes on for both."""
    with Engine(group, runtime_dir) as engine:
        engine.start("main", wheel=wheel, settings={"HOOK_ATTACH_DEADLINE_S": "1"})
        assert [look["groups"] for look in engine.looks()] == [[group], [group]]
        engine.each(vllm_rank.add, "draft", 0)
        expect_own(engine, "rank 0: SpecError")
        assert all(len(look["models"]) == 2 for look in engine.looks())
        engine.each(vllm_rank.stop)


def test_elastic_expert_parallelism_is_declined(group: str, runtime_dir: Path) -> None:
    """Before anything is asked of other ranks."""
    with Engine(group, runtime_dir) as engine:
        engine.start("main", elastic=True)
        expect_own(engine, "elastic expert parallelism")
        engine.each(vllm_rank.stop)


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"eplb_async": "default"}, "eplb_async's settings are 'default'; needed a JSON object"),
        ({"eplb_async": {"polcy": "default"}}, "Known: runtime_dir, hook, daemon, integration"),
        ({"eplb_async": {"daemon": {"window_steps": 0}}}, "settings given by the engine"),
    ],
)
def test_bad_settings_in_vllms_configuration_leave_vllms_own(
    group: str, runtime_dir: Path, extra: Any, why: str
) -> None:
    """The warning says what is wrong; the engine starts."""
    with Engine(group, runtime_dir) as engine:
        engine.start("main", extra=extra)
        expect_own(engine, why)
        engine.each(vllm_rank.stop)


def test_it_can_be_switched_off_in_vllms_configuration(group: str, runtime_dir: Path) -> None:
    """Which is no warning."""
    with Engine(group, runtime_dir) as engine:
        engine.start("main", extra={"eplb_async": {"integration": {"enabled": False}}})
        expect_own(engine, "switched off (integration.enabled)", level="INFO")
        engine.each(vllm_rank.stop)


@pytest.mark.parametrize("extra", [None, {}, "a hash of its own", {"eplb_async": None}, {"other": {"hook": 3}}])
def test_configurations_of_others_do_not_matter(group: str, runtime_dir: Path, extra: Any) -> None:
    """Other plugins keep theirs in the same place."""
    with Engine(group, runtime_dir) as engine:
        engine.start("main", extra=extra)
        engine.forward(2)
        assert [look["groups"] for look in engine.looks()] == [[group], [group]]
        engine.each(vllm_rank.stop)


def test_settings_in_vllms_configuration_go_over_the_environment(group: str, runtime_dir: Path) -> None:
    """--additional-config '{"eplb_async": {...}}' names another group."""
    with Engine(group, runtime_dir) as engine:
        engine.start("main", extra={"eplb_async": {"integration": {"group": f"{group}-chat"}}})
        engine.forward(2)
        assert [look["groups"] for look in engine.looks()] == [[f"{group}-chat"]] * 2
        engine.each(vllm_rank.stop)

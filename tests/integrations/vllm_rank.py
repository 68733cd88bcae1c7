"""What a rank process of tests/rank/harness.py does to be a rank of a vLLM; functions for RankGroup's `call`."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from eplb_async.core.errors import EngineDeclined
from eplb_async.integrations.vllm_state import state_class
from tests.conftest import segments_left
from tests.integrations.heard import Heard
from tests.integrations.vllm_stand_in import (
    EXPERTS,
    ChangedModel,
    StandInModel,
    install_modules,
    model_config,
    parallel_config,
    placement,
)

__all__ = ["add", "call", "forward", "look", "remap", "start", "step", "stop", "warm_up"]


def start(
    actor: Any, rendezvous: str, environment: dict[str, str], extra: Any, wheel: Path | None, elastic: bool
) -> None:
    """Make an EplbState of the plugin's class, without a model."""
    os.environ.update(environment)
    actor.heard = Heard()
    for name in ("vllm", "eplb_async.integrations"):
        logging.getLogger(name).addHandler(actor.heard)
        logging.getLogger(name).setLevel(logging.INFO)
    options = actor.options
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=options.rank, world_size=options.spec.num_ranks
    )
    actor.models = []
    theirs = install_modules(extra, wheel)
    actor.state = state_class(theirs)(parallel_config(elastic=elastic), torch.device("cpu"))
    actor.random = torch.Generator().manual_seed(0)


def add(actor: Any, name: str, broken_rank: int = -1, changed_rank: int = -1) -> None:
    """Load a model and add it, as vLLM does for the main model and for a draft."""
    rank, size = actor.options.rank, actor.options.spec.num_ranks
    kind = ChangedModel if rank == changed_rank else StandInModel
    model = kind(f"{actor.options.group}-{name}", rank, size, broken=rank == broken_rank)
    actor.models.append(model)
    actor.state.add_model(model, model_config(name))


def forward(actor: Any, count: int = 1, num_tokens: int = 40, **step_fields: bool) -> list[str]:
    """Forwards of all models with a step behind each, in which half of the tokens want expert 2; returns what is wrong."""
    wrong = []
    for _ in range(count):
        experts = torch.randint(-EXPERTS, EXPERTS, (num_tokens,), generator=actor.random)
        experts[experts < 0] = 2
        for number, (model, name) in enumerate(zip(actor.models, actor.state.model_states, strict=True)):
            actor.state.prepare_forward(model_config(name), num_tokens - number)
            for layer, made in enumerate(model.forward(experts)):
                if not torch.equal(made, 10_000.0 * layer + 100 * experts):
                    wrong.append(f"model {number} layer {layer}: {made.tolist()} for {experts.tolist()}")
            if model.load.sum(dim=1).tolist() != [num_tokens] * len(model.load) and actor.state.eplb_async:
                wrong.append(f"model {number}: {model.load.sum(dim=1).tolist()} counted of {num_tokens}")
        actor.state.step(**step_fields)
    return wrong


def warm_up(actor: Any) -> None:
    """What comes before the first request: a profile run, then the count is forgotten."""
    for model in actor.models:
        model.load += 7
    actor.state.step(is_profile=True)
    actor.state.rearrange(is_profile=True)
    actor.state.step(is_dummy=True)


def step(actor: Any, **fields: bool) -> None:
    """A step without a forward."""
    actor.state.step(**fields)


def call(actor: Any, name: str) -> Any:
    """Call a method of the state that takes nothing."""
    return getattr(actor.state, name)()


def remap(actor: Any) -> str:
    """Give a model another mapping; what comes of it."""
    try:
        actor.state.update_mapping(None, None)
    except EngineDeclined as error:
        return str(error)
    return ""


def look(actor: Any) -> dict[str, Any]:
    """The state, and what each model reads."""
    state, balancer = actor.state, actor.state.eplb_async
    groups = balancer._groups if balancer else []
    found = []
    for model, held in zip(actor.models, state.model_states.values(), strict=True):
        maps = held.physical_to_logical_map
        assert model.table is held.logical_to_physical_map
        assert model.count is held.logical_replica_count
        assert model.load.data_ptr() == held.expert_load_pass.data_ptr()
        assert torch.equal((model.table >= 0).sum(-1), model.count)
        found.append(
            {
                "slots": maps.tolist(),
                "table": model.table.tolist() if balancer else [],
                "moved": maps.tolist() != placement().tolist(),
                "wrong_slots": model.wrong_slots(maps),
                "window_bytes": held.expert_load_window.untyped_storage().nbytes(),
                "buffers": len(held.expert_buffer),
                "load": int(model.load.sum()),
            }
        )
    return {
        "models": found,
        "groups": [group.hook.group for group in groups],
        "steps": [group.hook.statistics().step for group in groups],
        "is_async": state.is_async,
        "rearrangement_step": state.expert_rearrangement_step,
        "worker": getattr(state, "async_worker", None) is not None,
        "own": list(getattr(state, "own", [])),
        "class": type(state).__name__,
        "log": list(actor.heard.lines),
        "segments": [name for name in segments_left(actor.options.group) if ".weights." not in name],
    }


def stop(actor: Any) -> None:
    """Leave, and give everything back."""
    if actor.state.eplb_async is not None:
        actor.state.eplb_async.give_back()
    for model in actor.models:
        model.shared.close()
    dist.destroy_process_group()

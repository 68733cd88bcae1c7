"""What a rank process of tests/rank/harness.py does to be a rank of the stand-in for SGLang; functions for RankGroup's `call`."""

import logging
import os
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from eplb_async.integrations import sglang_engine, sglang_plugin
from tests.conftest import segments_left
from tests.integrations import sglang_stand_in
from tests.integrations.heard import Heard
from tests.integrations.sglang_stand_in import Batch, ForwardMode, ModelRunner, Options

__all__ = ["answer", "counted", "disable", "forward", "maps", "moved", "start", "state", "stop", "update"]

RUNNER = "sglang.srt.model_executor.model_runner"


def start(actor: Any, rendezvous: str, environment: dict[str, str], fields: dict[str, Any], misfit: str = "") -> None:
    """Load the plugin as SGLang does, then make a ModelRunner.

    Args:
        fields: of Options.
        misfit: what comparing SGLang's source with the known one found.
    """
    os.environ.update(environment)
    actor.heard = Heard()
    logging.getLogger("sglang").addHandler(actor.heard)
    logging.getLogger("sglang").setLevel(logging.INFO)
    options, spec = actor.options, actor.options.spec
    engine = Options(group=options.group, rank=options.rank, spec=spec, **fields)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=options.rank, world_size=spec.num_ranks)
    sglang_stand_in.install(engine)
    sglang_plugin._misfit = lambda: misfit
    # on the CPU the hook wants the object that shares memory, not the tensors in it
    sglang_engine.expert_weights = lambda model, layer_ids: model.shared
    sglang_plugin.register()
    sglang_plugin.register()
    actor.runner = import_module(RUNNER).ModelRunner(engine)
    actor.given = [tensor.data_ptr() for tensor in _tensors()]
    actor.random = torch.Generator().manual_seed(options.rank if fields.get("a2a", "none") != "none" else 0)


def forward(actor: Any, count: int, mode: str = "DECODE") -> list[str]:
    """Make forwards; returns what is wrong with their outputs."""
    wrong = []
    spec, runner = actor.options.spec, actor.runner
    for _ in range(count):
        # expert 2, which has one slot, is wanted by half of the tokens
        experts = torch.randint(-spec.num_experts, spec.num_experts, (40,), generator=actor.random)
        experts[experts < 0] = 2
        with torch.inference_mode():  # as SGLang's event loop
            output = runner.forward(Batch(experts, ForwardMode[mode]))
        for layer, made in output.items():
            if not torch.equal(made, 100.0 * layer + experts):
                wrong.append(f"rank {actor.options.rank} layer {layer}: {made.tolist()} for {experts.tolist()}")
    return wrong


def maps(actor: Any) -> dict[str, Any]:
    """SGLang's maps; those that differ between host and device, or have moved, are named."""
    metadata = sglang_stand_in.RESOURCES.metadata
    assert [tensor.data_ptr() for tensor in _tensors()] == actor.given
    assert torch.equal(metadata.physical_to_logical_map, metadata.physical_to_logical_map_cpu)
    assert torch.equal(metadata.logical_to_all_physical_map, metadata.logical_to_all_physical_map_cpu)
    static = metadata.logical_to_rank_dispatch_physical_map
    return {
        "slots": metadata.physical_to_logical_map.tolist(),
        "table": metadata.logical_to_all_physical_map.tolist(),
        "count": metadata.logical_to_all_physical_map_num_valid.tolist(),
        "static": None if static is None else static.tolist(),
    }


def _tensors() -> list[torch.Tensor]:
    metadata = sglang_stand_in.RESOURCES.metadata
    return [tensor for tensor in vars(metadata).values() if isinstance(tensor, torch.Tensor)]


def counted(actor: Any) -> list[list[int]]:
    """The load tensor that the hook reads, after a forward of the model alone."""
    runner: ModelRunner = actor.runner
    experts = torch.tensor([0, 0, 0, 1])
    with sglang_stand_in.RESOURCES.recorder.with_forward_pass() as counts:
        runner.model.forward(experts, counts)
    model = runner.eplb_manager.eplb_async._model
    model.counts.gather()
    found: list[list[int]] = model.counts.load.tolist()
    return found


def state(actor: Any) -> dict[str, Any]:
    """Who balances, and what was logged."""
    manager = actor.runner.eplb_manager
    return {
        "class": type(manager).__mro__[0].__module__,
        "joined": getattr(manager, "eplb_async", None) is not None,
        "own_steps": getattr(manager, "own_steps", 0),
        "disabled": getattr(manager, "disabled", ""),
        "commits": manager.eplb_async._group.hook.num_commits if getattr(manager, "eplb_async", None) else 0,
        "log": actor.heard.lines,
        "segments": [name for name in segments_left(actor.options.group) if ".weights." not in name],
        "hooked": [
            hasattr(getattr(ModelRunner, name), "__closure__") and bool(getattr(ModelRunner, name).__closure__)
            for name in ("initialize", "forward")
        ],
    }


def moved(actor: Any) -> None:
    """Replace the expert weights by copies elsewhere, as a late change of their layout does."""
    model = actor.runner.model
    model.weights = [torch.nn.Parameter(weight.clone(), requires_grad=False) for weight in model.weights]


def update(actor: Any) -> None:
    """Replace weights."""
    actor.runner.weight_updater.update_weights_from_disk("path", "auto")


def disable(actor: Any) -> None:
    """SGLang stops balancing."""
    actor.runner.eplb_manager.disable_rebalance("a reason")


def answer(actor: Any) -> int:
    """SGLang asks for a rebalance; returns the number of its yields."""
    return len(list(actor.runner.eplb_manager.rebalance()))


def stop(actor: Any) -> None:
    """Leave, and give everything back."""
    balancer = getattr(actor.runner.eplb_manager, "eplb_async", None)
    if balancer is not None:
        balancer._group.close()
    actor.runner.model.shared.close()
    dist.destroy_process_group()

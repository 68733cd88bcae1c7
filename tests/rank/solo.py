"""A group of one rank in the test's own process, for what needs no second one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.rank.hook import RankHook
from eplb_async.rank.transfer.shm import share_weights
from tests.rank.harness import hook_settings, make_weights

__all__ = ["SOLO", "attached"]

SOLO = MoESpec(num_layers=2, num_experts=4, num_ranks=1, num_redundant=2)


@contextlib.contextmanager
def attached(
    group: str, runtime_dir: Path, spec: MoESpec = SOLO, **fields: Any
) -> Iterator[tuple[RankHook, torch.Tensor]]:
    """A hook and its load tensor; `fields` are arguments of attach, or of HookSettings."""
    of_attach = {name: fields.pop(name) for name in ("load", "load_kind", "placement", "daemon") if name in fields}
    placement = of_attach.get("placement")
    loaded_LP = placement if placement is not None and len(placement) == spec.num_layers else initial_placement(spec)
    weights = share_weights(group, 0, make_weights(spec, loaded_LP, 0))
    load = of_attach.pop("load", torch.zeros(spec.num_layers, spec.num_experts, dtype=torch.int32))
    try:
        settings = hook_settings(runtime_dir, **fields)
        with RankHook.attach(
            group=group, rank=0, spec=spec, weights=weights, load=load, settings=settings, **of_attach
        ) as hook:
            yield hook, load
    finally:
        weights.close()

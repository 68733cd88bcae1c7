"""What a rank process of tests/rank/harness.py does to join an EngineGroup; functions for RankGroup's `call`."""

import os
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from eplb_async.core.config import Settings
from eplb_async.core.errors import NoSharedMemory, SpecError
from eplb_async.core.load import LoadKind, Phase
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.integrations import engine_group
from eplb_async.integrations.engine_group import EngineGroup, Offer, Ranks, TorchRanks, engine_settings, host_identity
from eplb_async.rank.hook import RankHook
from eplb_async.rank.transfer.shm import share_weights
from tests.conftest import segments_left
from tests.rank.harness import make_weights
from tests.rank.solo import SOLO

__all__ = ["Alone", "forget", "identity", "join", "leave", "offer", "return_without_close", "segments", "start", "step"]


class Alone:
    """An engine of one rank."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """See Ranks."""
        return [value]


def offer(spec: MoESpec, weights: Any, load: torch.Tensor, model: str = "maker/model", part: str = "") -> Offer:
    """Of a model in its first placement, whose counts are those of experts."""
    place = initial_placement(spec)
    kind = LoadKind.LOGICAL
    return Offer(model=model, part=part, spec=spec, weights=weights, load=load, placement=place, load_kind=kind)


def start(actor: Any, rendezvous: str, environment: dict[str, str]) -> None:
    """Be a rank of an engine."""
    os.environ.update(environment)
    options, spec = actor.options, actor.spec
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=options.rank, world_size=spec.num_ranks)
    actor.weights = share_weights(
        options.group, options.rank, make_weights(spec, initial_placement(spec), options.rank)
    )


def join(actor: Any, trouble: str = "") -> str:
    """Join; returns the group's name.

    Args:
        trouble: what is wrong with rank 1: "offer" cannot be made; "size" of another engine; "attach" fails after the other rank
            has attached.
    """
    settings, here = engine_settings(), actor.options.rank == 1

    def made() -> Offer:
        if here and trouble == "offer":
            raise SpecError("this model has no experts")
        spec = actor.spec
        if here and trouble == "size":
            spec = msgspec.structs.replace(spec, num_ranks=3)
        return offer(spec, actor.weights, actor.load)

    def attach(name: str, rank: int, offer: Offer | None, settings: Settings) -> RankHook:
        hook = real(name, rank, offer, settings)
        if trouble == "attach":
            dist.barrier()
        if here and trouble == "attach":
            hook.detach()
            raise NoSharedMemory("a segment", 1, "no room")
        return hook

    real = engine_group._attach
    engine_group._attach = attach
    try:
        actor.joined = EngineGroup.join(_ranks(), made, settings)
    finally:
        engine_group._attach = real
    name: str = actor.joined.hook.group
    return name


def segments(actor: Any, prefix: str) -> list[str]:
    """Segments of groups whose names begin so, without the engine's own weights."""
    return [name for name in segments_left(prefix) if ".weights." not in name]


def step(actor: Any, count: int) -> None:
    """Forwards, which count and then end."""
    for _ in range(count):
        actor.load += 1
        actor.joined.step(Phase.DECODE, 1)


def identity(actor: Any) -> list[str]:
    """Of the hosts of all ranks."""
    return _ranks().gather(host_identity())


def _ranks() -> TorchRanks:
    world = dist.group.WORLD
    assert world is not None
    return TorchRanks(world)


def leave(actor: Any) -> None:
    """Close the group."""
    actor.joined.close()


def forget(actor: Any) -> None:
    """End the engine."""
    dist.destroy_process_group()


def return_without_close(group: str, environment: dict[str, str]) -> None:
    """A process that joins, and comes to its end."""
    os.environ.update(environment)
    weights = share_weights(group, 0, make_weights(SOLO, initial_placement(SOLO), 0))
    load = torch.zeros(SOLO.num_layers, SOLO.num_experts, dtype=torch.int32)
    ranks: Ranks = Alone()
    joined = EngineGroup.join(ranks, lambda: offer(SOLO, weights, load), engine_settings())
    joined.step(Phase.DECODE, 1)
    weights.segment.unlink()
    assert [name for name in segments_left(group) if ".weights." not in name]

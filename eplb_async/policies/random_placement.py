"""The `random` policy: a valid placement drawn from a seed. The baseline that any other policy must beat."""

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.spec import Topology
from eplb_async.policies.base import Policy

__all__ = ["POLICY", "RandomOptions", "random_placement"]


class RandomOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `random`.

    Fields:
        seed: >= 0; the same seed gives the same sequence of placements (for one version of numpy).
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")


def random_placement(
    windows_TLE: NDArray[np.float64],
    slot_to_expert_LP: NDArray[np.int32],
    topology: Topology,
    options: RandomOptions,
    state: bytes,
) -> tuple[NDArray[np.int32], bytes]:
    """Draw all layers (see `base.PolicyFunction`); loads and the live placement do not matter.

    The state counts the plans, so that each differs from the one before. No slot is left empty.
    """
    drawn = msgspec.msgpack.decode(state, type=int) if state else 0
    random = np.random.default_rng([options.seed, drawn])
    num_layers, num_experts = windows_TLE.shape[1:]
    rows = [_draw_row(random, num_experts, topology) for _ in range(num_layers)]
    return np.stack(rows), msgspec.msgpack.encode(drawn + 1)


def _draw_row(random: np.random.Generator, num_experts: int, topology: Topology) -> NDArray[np.int32]:
    """One layer, int32 [P]: random replica counts, dealt out so that no rank holds an expert twice unless it must.

    Experts in random order, the replicas of each together, are dealt to the ranks in turn, like cards: with at most R
    replicas of each they all meet different ranks. Ranks with room for every expert hold them all, and more at random.
    """
    ranks, per_rank = topology.num_ranks, topology.slots_per_rank
    everywhere = per_rank >= num_experts
    least = ranks if everywhere else 1
    spare = topology.num_slots - least * num_experts
    most = min(topology.max_replicas, least + spare if everywhere else ranks)
    extra = random.permutation(np.repeat(np.arange(num_experts), most - least))[:spare]
    order = random.permutation(num_experts)
    if everywhere:
        bins_RS = np.concatenate([np.tile(order, (ranks, 1)), extra.reshape(ranks, -1)], axis=1)
    else:
        count_E = least + np.bincount(extra, minlength=num_experts)
        bins_RS = np.repeat(order, count_E[order]).reshape(per_rank, ranks).T
    return random.permuted(random.permutation(bins_RS), axis=1).astype(np.int32).reshape(-1)


POLICY = Policy(
    name="random",
    function=random_placement,
    options_type=RandomOptions,
    summary="a random valid placement (option seed); the baseline to beat",
)

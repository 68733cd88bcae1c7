"""Which experts each token of each step goes to: a real trace's shares, drawn anew for every token, the same in every run.

For step s a window of the trace gives each expert of each layer a share of all pairs; k times the share is the chance
that a token picks it. Tokens draw k experts without replacement by an exponential race (Gumbel top-k): expert e arrives at
time -log(u) / w_e, and the first k win. With w_e = -log(1 - k * share_e) an expert arrives before time 1 with the wanted
chance, and k of them do on average; so the counts follow the trace closely, where the shares themselves as weights would
flatten the hot experts. Every u is a hash of (seed, step, layer, token, expert): no state, no order, no placement.

Shape suffixes beyond the project's: C steps of one batch, M tokens of all ranks, K experts per token (here only).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.engine.config import EngineConfig
from eplb_async.core.placement import initial_placement

__all__ = ["Routing", "gates_LMK", "hash32", "load_shares", "race_weights", "shares_at"]

MASK = 0xFFFFFFFF
LARGEST_SHARE = 0.999
"""Of a token's chance to pick an expert: counts of a trace may round to more than 1."""
SMALLEST_WEIGHT = 1e-9
"""So that there are always k experts to draw."""
ELEMENTS = 1 << 24
"""Hashes drawn at once: 128 MiB per temporary."""


def load_shares(config: EngineConfig) -> NDArray[np.float64]:
    """Shares [T, L, E], each row of sum 1. Layers are taken evenly spread over the trace's, or again where it has fewer.

    Raises:
        ValueError: the file has no counts [T, L', E] of this number of experts.
    """
    layers, experts = config.num_layers, config.num_experts
    if config.trace == "synthetic":
        return _synthetic(config)
    with np.load(Path(config.trace)) as file:
        if "counts" not in file:
            raise ValueError(f"{config.trace} has no array `counts`")
        counts_TLE = np.asarray(file["counts"], dtype=np.float64)
    if counts_TLE.ndim != 3 or counts_TLE.shape[2] != experts:
        raise ValueError(
            f"{config.trace} has counts {list(counts_TLE.shape)}; needed [T, L, {experts}] (set --experts)"
        )
    recorded = counts_TLE.shape[1]
    chosen = np.arange(layers) * recorded // layers if layers <= recorded else np.arange(layers) % recorded
    counts_TLE = counts_TLE[:, chosen]
    total = counts_TLE.sum(axis=2, keepdims=True)
    if not (total > 0).all():
        raise ValueError(f"{config.trace} has a window with a layer without load")
    return np.asarray(counts_TLE / total)


def _synthetic(config: EngineConfig) -> NDArray[np.float64]:
    """Eight windows of Zipf-like shares; a quarter of the experts changes its rank from one to the next."""
    random = np.random.default_rng(config.seed)
    shares_TLE = np.empty((8, config.num_layers, config.num_experts))
    for layer in range(config.num_layers):
        rank_E = random.permutation(config.num_experts)
        for window in range(8):
            moved = random.choice(config.num_experts, max(2, config.num_experts // 4), replace=False)
            rank_E[moved] = random.permutation(rank_E[moved])
            shares_TLE[window, layer] = (1.0 + rank_E) ** -0.8
    return np.asarray(shares_TLE / shares_TLE.sum(axis=2, keepdims=True))


def shares_at(shares_TLE: NDArray[np.float64], step: int, config: EngineConfig) -> NDArray[np.float64]:
    """Shares [L, E] of one step: window step // steps_per_window, cyclic; interpolated to the next one if asked for."""
    windows = len(shares_TLE)
    window, inside = divmod(step, config.steps_per_window)
    now_LE = shares_TLE[window % windows]
    if config.drift == "switched":
        return np.asarray(now_LE)
    part = inside / config.steps_per_window
    return np.asarray((1 - part) * now_LE + part * shares_TLE[(window + 1) % windows])


def race_weights(shares_LE: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """Rates of the race that give each expert k times its share. With k = 2, shares [0.4, 0.3, 0.3]: -log [0.2, 0.4, 0.4]."""
    chance_LE = np.minimum(shares_LE * top_k, LARGEST_SHARE)
    return np.asarray(np.maximum(-np.log1p(-chance_LE), SMALLEST_WEIGHT))


def hash32(key: torch.Tensor) -> torch.Tensor:
    """A well mixed 32-bit hash of the low 32 bits of int64 keys, as int64 (two rounds of xor-shift and multiply).

    Products may exceed 64 bits; what is cut off is above the 32 that are kept.
    """
    key = key & MASK
    key = ((key ^ (key >> 16)) * 0x7FEB352D) & MASK
    key = ((key ^ (key >> 15)) * 0x846CA68B) & MASK
    return key ^ (key >> 16)


def uniform(hashed: torch.Tensor) -> torch.Tensor:
    """Float32 in (0, 1), never 0 or 1: 23 bits and a half, which float32 holds exactly."""
    return ((hashed >> 9).to(torch.float32) + 0.5) * 2.0**-23


def gates_LMK(config: EngineConfig, device: torch.device) -> torch.Tensor:
    """The gate weights, float32 [L, M, k] of sum 1 over k: a function of (seed, layer, token, place in the top k)."""
    shape = (config.num_layers, config.num_tokens, config.top_k)
    index = torch.arange(shape[0] * shape[1] * shape[2], dtype=torch.int64, device=device).view(shape)
    weight = uniform(hash32(index + hash32(torch.tensor(config.seed ^ 0x5EED, device=device)))) + 0.25
    return weight / weight.sum(dim=2, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The router of one configuration; see the module.

    Attributes:
        config: sizes and trace.
        shares_TLE: of the trace.
        device: where ids are drawn.
    """

    config: EngineConfig
    shares_TLE: NDArray[np.float64]
    device: torch.device

    @classmethod
    def load(cls, config: EngineConfig, device: torch.device) -> "Routing":
        """Read the trace."""
        return cls(config=config, shares_TLE=load_shares(config), device=device)

    @property
    def id_dtype(self) -> torch.dtype:
        """Of kept ids."""
        return torch.uint8 if self.config.num_experts <= 256 else torch.int16

    def ids(self, first_step: int, count: int) -> torch.Tensor:
        """Experts of all tokens of some steps, [C, L, M, k], distinct within a token."""
        config = self.config
        ids = torch.empty(
            (count, config.num_layers, config.num_tokens, config.top_k), dtype=self.id_dtype, device=self.device
        )
        if config.balanced:
            ids.copy_(self._balanced()[None])
            return ids
        per_step = config.num_layers * config.num_tokens * config.num_experts
        at_once = max(1, ELEMENTS // per_step)
        # a step that is too large for one batch is drawn in parts of its tokens
        tokens = max(1, min(config.num_tokens, ELEMENTS // (config.num_layers * config.num_experts)))
        for start in range(0, count, at_once):
            steps = range(first_step + start, first_step + min(start + at_once, count))
            for token in range(0, config.num_tokens, tokens):
                part = slice(token, min(token + tokens, config.num_tokens))
                ids[start : start + len(steps), :, part] = self._draw(steps, part)
        return ids

    def _draw(self, steps: range, part: slice) -> torch.Tensor:
        config = self.config

        def numbers(first: int, last: int, factor: int) -> torch.Tensor:
            return torch.arange(first, last, dtype=torch.int64, device=self.device) * factor

        key_C = hash32(numbers(steps.start, steps.stop, 1) + hash32(torch.tensor(config.seed, device=self.device)))
        key_CL = hash32(key_C[:, None] + numbers(0, config.num_layers, 0x9E3779B1))
        key_CLM = hash32(key_CL[..., None] + numbers(part.start, part.stop, 0x85EBCA6B))
        key = hash32(key_CLM[..., None] + numbers(0, config.num_experts, 0xC2B2AE35))
        weights = np.stack([race_weights(shares_at(self.shares_TLE, s, config), config.top_k) for s in steps])
        weights_CLE = torch.from_numpy(weights.astype(np.float32)).to(self.device)
        arrival = uniform(key).log_().neg_() / weights_CLE[:, :, None]
        return arrival.topk(config.top_k, dim=-1, largest=False, sorted=True).indices.to(self.id_dtype)

    def _balanced(self) -> torch.Tensor:
        """Ids [L, M, k] that give each slot of the initial placement the same number of pairs, up to one per rank.

        Slots are gone through rank by rank: (rank i % R, slot i // R), in even and in odd tokens by themselves, because the
        dispatch table sends those to different replicas of an expert that has two; the ones that get one more than others are
        slots of experts that have one, where there are enough. The same in every layer.

        Raises:
            ValueError: a token would get an expert twice; more experts, or another number of redundant slots, help.
        """
        config, spec = self.config, self.config.spec
        row_P = initial_placement(spec)[0]
        token, place = np.meshgrid(np.arange(config.num_tokens), np.arange(config.top_k), indexing="ij")
        first = spec.num_ranks * min(config.num_redundant, spec.slots_per_rank)
        index = (first + (token // 2) * config.top_k + place) % spec.num_slots
        slot = (index % spec.num_ranks) * spec.slots_per_rank + index // spec.num_ranks
        ids_MK = row_P[slot]
        ordered = np.sort(ids_MK, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError(f"no balanced ids for {spec} with top-{config.top_k}: a token would get an expert twice")
        return torch.from_numpy(np.tile(ids_MK, (config.num_layers, 1, 1))).to(self.device)

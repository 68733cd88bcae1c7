"""Sizes and options of the benchmark engine; all of it can be sent to another process."""

from dataclasses import dataclass
from typing import Literal

from eplb_async.core.spec import MoESpec

__all__ = ["MODES", "EngineConfig", "Mode", "tokens_per_rank"]

Mode = Literal["none", "static", "ours", "sync", "ideal"]

MODES: dict[str, str] = {
    "none": "no hook; the initial placement",
    "static": "the hook without a daemon; the initial placement",
    "ours": "the hook and a daemon that rebalances beside the forward",
    "sync": "stop the world every --interval steps: all-reduce loads, plan, exchange experts, swap",
    "ideal": "no hook; the ids of each step replaced by perfectly balanced ones: a lower bound of the time",
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The model and its traffic. Two engines of equal configurations compute the same, whatever the placement.

    Attributes:
        num_ranks: R.
        tokens_per_rank: sequences that each rank decodes; N.
        num_layers, num_experts, num_redundant: L, E, and P - E.
        hidden, width: D, and the experts' inner size F. On CUDA multiples of 8 (grouped products read 16 bytes at once).
        top_k: experts per token.
        vocabulary: V.
        seed: of weights, first tokens, gates and routing.
        trace: an .npz with `counts` [T, L', E], or "synthetic".
        steps_per_window: steps for which one window of the trace lasts.
        drift: "switched" from window to window, or "interpolated" between them.
        balanced: replace the routing by a perfectly balanced one (mode "ideal").
        graphs: "whole" captures the step in a CUDA graph; without effect on the CPU.
        kernels: "triton", or "torch" for their twins (always so on the CPU).
        products: "grouped" uses torch._grouped_mm, "triton" a kernel of ours; the CPU has a loop of its own.
        table_length: K of the dispatch tables; 0 takes what any placement can need.
    """

    num_ranks: int = 2
    tokens_per_rank: int = 256
    num_layers: int = 16
    num_experts: int = 128
    num_redundant: int = 16
    hidden: int = 4096
    width: int = 1536
    top_k: int = 8
    vocabulary: int = 32_768
    seed: int = 0
    trace: str = "synthetic"
    steps_per_window: int = 250
    drift: Literal["switched", "interpolated"] = "switched"
    balanced: bool = False
    graphs: Literal["none", "whole"] = "whole"
    kernels: Literal["triton", "torch"] = "triton"
    products: Literal["grouped", "triton"] = "grouped"
    table_length: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.top_k <= self.num_experts:
            raise ValueError(f"top_k is {self.top_k}; it must be from 1 to {self.num_experts}, the number of experts")
        if self.num_experts > 32_767:
            raise ValueError(f"num_experts is {self.num_experts}; ids are kept in 16 bits")
        for name in ("tokens_per_rank", "steps_per_window", "hidden", "width", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        _ = self.spec

    @property
    def spec(self) -> MoESpec:
        """The shape for the balancer. Dispatch rows are long enough for every plan of every policy."""
        return MoESpec(
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            num_ranks=self.num_ranks,
            num_redundant=self.num_redundant,
            table_length=self.table_length or self.num_redundant + 1,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.num_ranks * self.tokens_per_rank

    @property
    def num_pairs(self) -> int:
        """(token, expert) pairs of a layer, over all ranks."""
        return self.num_tokens * self.top_k

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights, in bfloat16."""
        return 3 * self.hidden * self.width * 2

    @property
    def weight_bytes(self) -> int:
        """Of one rank's weights: experts and embedding."""
        slots = self.num_layers * self.spec.slots_per_rank
        return slots * self.expert_bytes + self.vocabulary * self.hidden * 2

    @property
    def activation_bytes(self) -> int:
        """About what one step needs beside the weights: rows of all pairs, before, inside and after the experts."""
        per_pair = 2 * (3 * self.hidden + 3 * self.width) + 2 * self.hidden // self.num_ranks
        return self.num_pairs * per_pair + self.tokens_per_rank * (self.vocabulary * 2 + self.hidden * 16)


def tokens_per_rank(tokens_per_expert: int, num_experts: int, top_k: int, num_ranks: int) -> int:
    """Sequences per rank so that an expert gets `tokens_per_expert` pairs of a step on average.

    32 tokens for each of 128 experts with top-8 on 2 ranks: 256.

    Raises:
        ValueError: it is not a whole number.
    """
    pairs, per_sequence = tokens_per_expert * num_experts, top_k * num_ranks
    if pairs % per_sequence or not pairs:
        raise ValueError(
            f"{tokens_per_expert} tokens for each of {num_experts} experts are {pairs} pairs; "
            f"they do not divide over {num_ranks} ranks with top-{top_k}"
        )
    return pairs // per_sequence

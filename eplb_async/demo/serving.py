"""One rank of the demo: the model's dense part on its own batch, experts by all-to-all over all ranks, the hook around it.

This is what an engine does, on gloo: the router picks experts, the hook's dispatch table picks a replica for each, rows
travel to the rank of that slot, are computed there, and travel back.
"""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from eplb_async.core.config import load_settings
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.demo.model import MoEModel, combine, grouped_ffn, load_model
from eplb_async.demo.reference import logits_digest, next_tokens
from eplb_async.demo.text import Stream
from eplb_async.rank.hook import RankHook
from eplb_async.rank.transfer.shm import SharedWeights, share_weights

__all__ = ["GROUP", "RankResult", "ServeRequest", "ShardedExperts", "demo_spec", "serve_rank"]

GROUP = "demo"
COLLECTIVE_DEADLINE_S = 60
NUM_REDUNDANT = 8


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """What to serve; the same for every rank.

    Attributes:
        stream: the text.
        weights: a weights file, or None for the package's own.
        rendezvous: a file for torch.distributed to meet in.
        environ: EPLB_ASYNC_* settings of hook and daemon.
    """

    stream: Stream
    weights: Path | None
    rendezvous: Path
    environ: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """What one rank saw, step by step (T steps here).

    Attributes:
        next_TBT: the likeliest next byte at every position, uint8 [T, B, length].
        digests: `logits_digest` of every step.
        received_TL: rows that this rank computed per layer.
        static_TLR: rows that this rank's tokens would have sent to each rank under the initial placement.
        changed_TL: True where a layer's row was committed right before this step.
        plan_T: number of the newest plan of which something was decided before this step.
        added_us_T: host time inside the hook, waiting for other ranks included.
        step_us_T: time of the whole step.
    """

    next_TBT: NDArray[np.uint8]
    digests: list[str]
    received_TL: NDArray[np.int64]
    static_TLR: NDArray[np.int64]
    changed_TL: NDArray[np.bool_]
    plan_T: NDArray[np.int64]
    added_us_T: NDArray[np.float64]
    step_us_T: NDArray[np.float64]

    @classmethod
    def empty(cls, stream: Stream, spec: MoESpec) -> "RankResult":
        """Zeros, to be filled in."""
        steps, layers = stream.num_steps, spec.num_layers
        return cls(
            next_TBT=np.zeros((steps, stream.batch, stream.length), dtype=np.uint8),
            digests=[],
            received_TL=np.zeros((steps, layers), dtype=np.int64),
            static_TLR=np.zeros((steps, layers, spec.num_ranks), dtype=np.int64),
            changed_TL=np.zeros((steps, layers), dtype=np.bool_),
            plan_T=np.zeros(steps, dtype=np.int64),
            added_us_T=np.zeros(steps),
            step_us_T=np.zeros(steps),
        )


def demo_spec(model: MoEModel, num_ranks: int) -> MoESpec:
    """The demo's shape: a quarter of the experts again as redundant slots, rounded so that ranks are full."""
    experts = model.shape.num_experts
    num_redundant = NUM_REDUNDANT + -(experts + NUM_REDUNDANT) % num_ranks
    return MoESpec(
        num_layers=model.shape.num_layers, num_experts=experts, num_ranks=num_ranks, num_redundant=num_redundant
    )


class ShardedExperts:
    """The experts of all ranks, reached by all-to-all. An `ExpertsFunction`.

    Attributes:
        load_LE: int32 [L, E], tokens per logical expert of this rank's batch; the hook records and zeroes it.
        received_L: rows computed here in this step.
        static_LR: rows that the initial placement would have sent to each rank.
    """

    def __init__(self, spec: MoESpec, weights: SharedWeights) -> None:
        self._spec, self._weights = spec, weights
        self.load_LE = torch.zeros(spec.num_layers, spec.num_experts, dtype=torch.int32)
        self.received_L = np.zeros(spec.num_layers, dtype=np.int64)
        self.static_LR = np.zeros((spec.num_layers, spec.num_ranks), dtype=np.int64)
        self._table_LEK = self._count_LE = self._static_LEK = self._static_count_LE = torch.empty(0)

    def use(self, hook: RankHook) -> None:
        """Read the dispatch tables of this hook from now on; their contents change, the tensors do not."""
        self._table_LEK, self._count_LE = hook.dispatch_table_LEK, hook.dispatch_count_LE
        self._static_LEK, self._static_count_LE = self._table_LEK.clone(), self._count_LE.clone()

    def __call__(
        self, layer: int, hidden_ND: torch.Tensor, expert_ids_NK: torch.Tensor, gates_NK: torch.Tensor
    ) -> torch.Tensor:
        """Compute, and count the load."""
        width, num_ranks = self._spec.slots_per_rank, self._spec.num_ranks
        experts = expert_ids_NK.flatten()
        self.load_LE[layer] += torch.bincount(experts, minlength=self._spec.num_experts)
        entry = torch.arange(len(experts))
        slots = self._table_LEK[layer, experts, entry % self._count_LE[layer, experts]]
        static = self._static_LEK[layer, experts, entry % self._static_count_LE[layer, experts]]
        self.static_LR[layer] = torch.bincount(static // width, minlength=num_ranks).numpy()
        # sorted by slot, entries are sorted by rank as well
        slots, order = torch.sort(slots, stable=True)
        sent = torch.bincount(slots // width, minlength=num_ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        rows = self._exchange(hidden_ND.index_select(0, order // expert_ids_NK.shape[1]), sent, received)
        places = self._exchange(slots % width, sent, received)
        self.received_L[layer] = len(places)
        done = grouped_ffn(rows, places[:, None], self._weights[layer])[:, 0]
        back = self._exchange(done, received, sent)
        outputs = torch.empty_like(back)
        outputs[order] = back
        return combine(outputs.view(*expert_ids_NK.shape, -1), gates_NK)

    def _exchange(self, rows: torch.Tensor, sent: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
        result = rows.new_empty(int(received.sum()), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), received.tolist(), sent.tolist())
        return result


def serve_rank(request: ServeRequest, rank: int, progress: Connection) -> None:
    """The rank's process: serve the whole stream, send step numbers through `progress`, then the RankResult."""
    torch.set_num_threads(1)
    os.environ.update(request.environ)
    num_ranks = request.stream.num_ranks
    dist.init_process_group(
        "gloo",
        init_method=f"file://{request.rendezvous}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=COLLECTIVE_DEADLINE_S),
    )
    model = load_model(request.weights)
    spec = demo_spec(model, num_ranks)
    mine = torch.from_numpy(initial_placement(spec)).long()[:, rank * spec.slots_per_rank :][:, : spec.slots_per_rank]
    layers = [
        {name: tensor[mine[layer]] for name, tensor in model.layer_expert_tensors(layer).items()}
        for layer in range(spec.num_layers)
    ]
    weights = share_weights(GROUP, rank, layers)
    experts = ShardedExperts(spec, weights)
    try:
        with RankHook.attach(
            group=GROUP,
            rank=rank,
            spec=spec,
            weights=weights,
            load=experts.load_LE,
            daemon="auto",
            settings=load_settings(environ=request.environ),
        ) as hook:
            experts.use(hook)
            progress.send(_serve(request.stream, rank, model, experts, hook, progress))
    finally:
        weights.close()
    dist.destroy_process_group()


def _serve(
    stream: Stream, rank: int, model: MoEModel, experts: ShardedExperts, hook: RankHook, progress: Connection
) -> RankResult:
    result = RankResult.empty(stream, hook.spec)
    before_LP = hook.slot_to_expert_LP.clone()
    clock = time.perf_counter_ns
    for step, tokens_BT in enumerate(stream.steps(rank)):
        start = clock()
        hook.before_forward("prefill", tokens_BT.numel())
        entered = clock()
        with torch.inference_mode():
            logits_BTV = model(tokens_BT, experts)
        left = clock()
        hook.after_forward()
        end = clock()
        result.added_us_T[step] = (entered - start + end - left) / 1e3
        result.step_us_T[step] = (end - start) / 1e3
        result.next_TBT[step] = next_tokens(logits_BTV).numpy()
        result.digests.append(logits_digest(logits_BTV))
        result.received_TL[step] = experts.received_L
        result.static_TLR[step] = experts.static_LR
        result.changed_TL[step] = (hook.slot_to_expert_LP != before_LP).any(dim=1).numpy()
        before_LP.copy_(hook.slot_to_expert_LP)
        statistics = hook.statistics()
        result.plan_T[step] = statistics.generation - (statistics.position == 0)
        progress.send(step + 1)
    return result

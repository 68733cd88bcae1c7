"""The engine: a decoding MoE model on R ranks, whose step never waits for the host.

The model is embedding -> L x [ x + sum of the top-k experts of norm(x) ] -> norm -> head; each of N sequences per rank decodes
greedily, its next token is its argmax. There is no attention: what is measured is the MoE part. The head is the embedding
with its features rolled by one, since with the embedding itself every token would be its own successor. Which experts a
token gets comes from routing.py, so loads are those of a recorded trace, and drift as they did.

A layer, on each rank:

    1. normalised tokens of all ranks are gathered                                         all-gather  [M, D]
    2. pair (token i, expert e) goes to slot table[l, e, i % count[l, e]], i a number over all ranks
    3. the rank computes the pairs whose slots it holds, and writes zeros for all others    [M, k, D]
    4. each rank gets the rows of its own tokens, summed over ranks                         reduce-scatter [N, k, D]
    5. the weighted sum over k, in the order of k, is added to the residual

Why the result does not depend on the placement, bit for bit: every replica of an expert has the same bytes; the result of a
pair depends on its row and its expert alone (see kernels.grouped_product); step 4 adds one row and R - 1 rows of zeros, which is
exact in any order (a negative zero becomes a positive one, everywhere alike); and step 5 adds at home, in an order that knows
no slots. So two runs can be compared by hashes, whatever moved in them.

As a library:

    engine = Engine(config, rank, device)     # torch.distributed is initialised, unless R is 1
    engine.use(hook)                          # or any object with the three map tensors
    engine.prepare(first_step=0, count=2000)  # ids of these steps, on the device
    engine.warm_up()                          # runs steps without the hook, and captures the graph
    for step in range(2000):
        hook.before_forward("decode", config.tokens_per_rank)
        engine.run_step(step)
        hook.after_forward()
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch.nn import functional

from benchmarks.engine import kernels
from benchmarks.engine.config import EngineConfig
from benchmarks.engine.routing import Routing, gates_LMK, hash32
from eplb_async.core.placement import initial_placement

__all__ = ["Engine", "Maps", "expert_weights"]

EPSILON = 1e-6
WARM_UP_STEPS = 3
DOWN_SCALE = 2.0
"""Makes a layer add about 0.4 of the size of an embedding, so that the experts decide the next token."""

# newer versions of torch renamed them
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Maps(Protocol):
    """What the engine reads of a hook; `eplb_async.rank.maps.Maps` has it too."""

    slot_to_expert_LP: torch.Tensor
    dispatch_table_LEK: torch.Tensor
    dispatch_count_LE: torch.Tensor


def expert_weights(config: EngineConfig, layer: int, expert: int, device: torch.device) -> dict[str, torch.Tensor]:
    """One expert's tensors, bfloat16 "gate_up" [2F, D] and "down" [D, F]: a function of (seed, layer, expert)."""
    generator = torch.Generator(device=device)
    generator.manual_seed((config.seed * 1_000_003 + layer) * 1_000_003 + expert)
    gate_up = torch.empty((2 * config.width, config.hidden), dtype=torch.bfloat16, device=device)
    down = torch.empty((config.hidden, config.width), dtype=torch.bfloat16, device=device)
    gate_up.normal_(0.0, config.hidden**-0.5, generator=generator)
    down.normal_(0.0, DOWN_SCALE * config.width**-0.5, generator=generator)
    return {"gate_up": gate_up, "down": down}


class Engine:
    """One rank. All methods belong to one thread, and run on its current stream.

    Attributes:
        config, rank, device: as given.
        weights: per layer "gate_up" [S, 2F, D] and "down" [S, D, F]. Replace the list before `warm_up` if the tensors must lie
            elsewhere; afterwards the graph knows their addresses.
        load: int32 [L, E], pairs of this rank's tokens per logical expert; counted up by each step, zeroed by others.
        tokens: int64 [N], the next input token of each sequence.
        record: int64 [N + 1 + L], rewritten by each step: its output tokens, a checksum of all bits of the last hidden state,
            and the pairs that this rank computed in each layer.
    """

    def __init__(self, config: EngineConfig, rank: int, device: torch.device) -> None:
        if config.num_ranks > 1 and dist.get_world_size() != config.num_ranks:
            raise ValueError(f"{config.num_ranks} ranks were configured; the process group has {dist.get_world_size()}")
        self.config, self.rank, self.device = config, rank, device
        self.spec = config.spec
        self.kernels = config.kernels if device.type == "cuda" else "torch"
        self.routing = Routing.load(config, device)
        self.weights: Sequence[dict[str, torch.Tensor]] = self._load_weights()
        generator = torch.Generator(device=device)
        generator.manual_seed(config.seed)
        self.embedding = torch.empty((config.vocabulary, config.hidden), dtype=torch.bfloat16, device=device)
        self.embedding.normal_(0.0, 1.0, generator=generator)
        own = slice(rank * config.tokens_per_rank, (rank + 1) * config.tokens_per_rank)
        self._own = own
        self._gates_LNK = gates_LMK(config, device)[:, own].contiguous()
        shape = (config.num_layers, config.num_tokens, config.top_k)
        self._ids_LMK = torch.zeros(shape, dtype=torch.int64, device=device)
        self._ones = torch.ones(
            (config.num_layers, config.tokens_per_rank * config.top_k), dtype=torch.int32, device=device
        )
        self._index_M1 = torch.arange(config.num_tokens, device=device)[:, None]
        self._row_weights = 2 * torch.arange(config.tokens_per_rank, device=device) + 1
        self.load = torch.zeros((config.num_layers, config.num_experts), dtype=torch.int32, device=device)
        self.tokens = torch.zeros(config.tokens_per_rank, dtype=torch.int64, device=device)
        size = config.tokens_per_rank + 1 + config.num_layers
        self.record = torch.zeros(size, dtype=torch.int64, device=device)
        self._maps: Maps | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._prepared, self._first = torch.empty(0), 0
        self.reset()

    def use(self, maps: Maps) -> None:
        """Read these map tensors from now on. Only before `warm_up`."""
        assert self._graph is None, "the graph knows the addresses of the maps before"
        self._maps = maps

    @property
    def maps(self) -> Maps:
        """What `use` was given."""
        assert self._maps is not None, "call use() first"
        return self._maps

    def reset(self) -> None:
        """Back to the first tokens, with no load counted."""
        count = self.config.tokens_per_rank
        first = torch.arange(self.rank * count, (self.rank + 1) * count, device=self.device)
        self.tokens.copy_(hash32(first + self.config.seed) % self.config.vocabulary)
        self.load.zero_()

    def prepare(self, first_step: int, count: int) -> None:
        """Draw the ids of steps first_step .. first_step + count - 1 into device memory (L * M * k bytes for each step)."""
        self._prepared, self._first = self.routing.ids(first_step, count), first_step

    def ids_of(self, step: int) -> torch.Tensor:
        """The ids of a prepared step, [L, M, k]."""
        if not self._first <= step < self._first + len(self._prepared):
            raise ValueError(f"step {step} is not prepared; steps {self._first} and {len(self._prepared) - 1} more are")
        return self._prepared[step - self._first]

    def run_step(self, step: int) -> None:
        """Run one prepared step; returns when it is issued."""
        self._ids_LMK.copy_(self.ids_of(step))
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()

    def warm_up(self, steps: int = WARM_UP_STEPS) -> None:
        """Run the first prepared step a few times on a side stream, capture it, and `reset`. All ranks must call it at once."""
        if self.device.type != "cuda":
            for _ in range(steps):
                self.run_step(self._first)
            self.reset()
            return
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
        self._ids_LMK.copy_(self.ids_of(self._first))
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(steps):
                self._run()
        current.wait_stream(side)
        torch.cuda.synchronize()
        if self.config.graphs == "whole":
            graph = torch.cuda.CUDAGraph()
            # other threads (watchdog of the collectives, the hook's) may call the driver meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
            self._graph = graph
            torch.cuda.synchronize()
            for _ in range(steps):
                self.run_step(self._first)
            torch.cuda.synchronize()
        self.reset()

    def close(self) -> None:
        """Drop the graph, before the process group whose collectives it holds. Idempotent."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._graph = None

    @torch.no_grad()
    def _run(self) -> None:
        """One step on the static buffers: `tokens` and ids in; `tokens`, `load` and `record` out."""
        config, count = self.config, self.config.tokens_per_rank
        self.load.scatter_add_(1, self._ids_LMK[:, self._own].reshape(config.num_layers, -1), self._ones)
        hidden_ND = self.embedding.index_select(0, self.tokens).float()
        for layer in range(config.num_layers):
            everyone_MD = self._gather(self._norm(hidden_ND))
            rows_QD, num_rows = self._experts(layer, everyone_MD)
            rows_NKD = self._scatter(rows_QD).view(count, config.top_k, config.hidden)
            hidden_ND = kernels.combine(hidden_ND, rows_NKD, self._gates_LNK[layer], self.kernels)
            self.record[count + 1 + layer : count + 2 + layer].copy_(num_rows)
        logits_NV = self._norm(hidden_ND).roll(1, dims=1) @ self.embedding.T
        self.tokens.copy_(logits_NV.argmax(dim=1))
        self.record[:count].copy_(self.tokens)
        # integers: the same in any order of summation
        rows = hidden_ND.view(torch.int32).sum(dim=1, dtype=torch.int64)
        self.record[count].copy_((rows * self._row_weights).sum())

    def _experts(self, layer: int, everyone_MD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Results of this rank's pairs among zeros, [Q, D], and their number, int32 [1]."""
        config, maps = self.config, self.maps
        ids_MK, table_EK = self._ids_LMK[layer], maps.dispatch_table_LEK[layer]
        entry_MK = self._index_M1 % maps.dispatch_count_LE[layer][ids_MK]
        slots_MK = table_EK.view(-1)[ids_MK * table_EK.shape[1] + entry_MK]
        pairs = kernels.order_pairs(slots_MK, self.rank, self.spec.slots_per_rank)
        rows_QD = kernels.gather_rows(everyone_MD, pairs, config.top_k, self.kernels)
        done_QD = kernels.expert_rows(rows_QD, self.weights[layer], pairs, self.kernels, config.products)
        return kernels.expand_rows(done_QD, pairs, self.kernels), pairs.num_rows

    def _norm(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden_ND, (self.config.hidden,), eps=EPSILON).to(torch.bfloat16)

    def _gather(self, rows_ND: torch.Tensor) -> torch.Tensor:
        if self.config.num_ranks == 1:
            return rows_ND
        result_MD = rows_ND.new_empty((self.config.num_tokens, rows_ND.shape[1]))
        _ALL_GATHER(result_MD, rows_ND)
        return result_MD

    def _scatter(self, rows_QD: torch.Tensor) -> torch.Tensor:
        if self.config.num_ranks == 1:
            return rows_QD
        own_QD = rows_QD.new_empty((len(rows_QD) // self.config.num_ranks, rows_QD.shape[1]))
        _REDUCE_SCATTER(own_QD, rows_QD)
        return own_QD

    def _load_weights(self) -> list[dict[str, torch.Tensor]]:
        config, width = self.config, self.spec.slots_per_rank
        own_LS = initial_placement(self.spec)[:, self.rank * width : (self.rank + 1) * width]
        layers = []
        for layer in range(config.num_layers):
            shapes = {"gate_up": (width, 2 * config.width, config.hidden), "down": (width, config.hidden, config.width)}
            tensors = {
                name: torch.empty(shape, dtype=torch.bfloat16, device=self.device) for name, shape in shapes.items()
            }
            for slot, expert in enumerate(own_LS[layer].tolist()):
                for name, tensor in expert_weights(config, layer, expert, self.device).items():
                    tensors[name][slot].copy_(tensor)
            layers.append(tensors)
        return layers

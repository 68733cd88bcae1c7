"""A byte-level MoE language model small enough to serve on two cores, whose expert computation can be replaced.

The model computes everything but its experts: at MoE layer l it calls `experts(l, hidden_ND, expert_ids_NK, gates_NK)`
and adds what comes back to the residual stream. `LocalExperts` is the unsharded twin; serving with expert parallelism
passes a function that sends rows to the ranks that hold the experts.

    tokens_BT -> embedding -> L x [ x + attention(norm(x));  x + experts(l, norm(x), top-K of softmax(router)) ]
              -> norm -> head -> logits_BTV

Why both give the same bits. A matrix product may round differently for another number of rows, because kernels are
chosen by shape. So `expert_ffn` cuts its rows into blocks of BLOCK_ROWS, fills up the last one, and every product of an
expert has one and the same shape; within it a row's result depends neither on its place nor on the other rows. What is
left is elementwise (exact for any shape) or runs on the same [B, T] on both sides, and `combine` adds the experts'
shares in the order of k. The tests check this bit for bit; it is promised for one torch thread per process.

Shape suffixes beyond the project's: B sequences, T positions, V bytes, N = B * T rows, K experts per token (here only),
D hidden, F expert width, M rows of one expert, H heads.
"""

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from eplb_async.core.errors import SpecError

__all__ = [
    "BLOCK_ROWS",
    "EXPERT_TENSORS",
    "ExpertsFunction",
    "Layer",
    "LocalExperts",
    "MoEModel",
    "ModelShape",
    "Routing",
    "combine",
    "expert_ffn",
    "grouped_ffn",
    "load_model",
    "save_model",
]

BLOCK_ROWS = 16
"""Rows of every expert product: small enough that padding is cheap, large enough that a row costs 2 us, not 10."""

EXPERT_TENSORS = {"gate_up": torch.bfloat16, "down": torch.bfloat16, "bias": torch.float32}
"""Tensors of every expert as stored and served: [E, 2F, D], [E, D, F] and [E, D]."""

ExpertsFunction = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, hidden_ND, expert_ids_NK int64, gates_NK float32) -> [N, D]: the gate-weighted sum of K experts per row."""


class ModelShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of the model; stored in the weights file.

    Fields:
        num_layers: L; every layer is a MoE layer.
        num_experts: E.
        top_k: experts per token (K in this file).
        hidden: D.
        expert_width: F.
        num_heads: attention heads; divides hidden into an even head size.
        context: most positions of a sequence.
        vocabulary: V; bytes.
    """

    num_layers: int = 5
    num_experts: int = 32
    top_k: int = 4
    hidden: int = 128
    expert_width: int = 48
    num_heads: int = 4
    context: int = 128
    vocabulary: int = 256


class Routing(NamedTuple):
    """What one MoE layer's router said: softmax_NE, and per row the chosen experts and their renormalised weights."""

    softmax_NE: Tensor
    expert_ids_NK: Tensor
    gates_NK: Tensor


class _Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        """Attend; cos and sin have half a head's size as their last dimension."""
        batch, length, hidden = x_BTD.shape
        qkv = self.qkv(x_BTD).view(batch, length, 3, self.num_heads, hidden // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key = _rotate(qkv[0], cos_TC, sin_TC), _rotate(qkv[1], cos_TC, sin_TC)
        mixed = functional.scaled_dot_product_attention(query, key, qkv[2], is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        return out


class _Experts(nn.Module):
    """The stacked weights of one layer's experts."""

    def __init__(self, shape: ModelShape, dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__()
        experts, hidden, width = shape.num_experts, shape.hidden, shape.expert_width
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * width, hidden).mul_(hidden**-0.5).to(dtypes["gate_up"]))
        deep = (2 * shape.num_layers * width) ** -0.5
        self.down = nn.Parameter(torch.randn(experts, hidden, width).mul_(deep).to(dtypes["down"]))
        self.bias = nn.Parameter(torch.zeros(experts, hidden, dtype=dtypes["bias"]))


class Layer(nn.Module):
    """Attention and the router of one MoE layer, and the layer's own experts."""

    def __init__(self, shape: ModelShape, dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.attention = _Attention(shape)
        self.experts_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.router = nn.Linear(shape.hidden, shape.num_experts, bias=False)
        self.experts = _Experts(shape, dtypes)
        self.top_k = shape.top_k

    def route(self, hidden_ND: Tensor) -> Routing:
        """Softmax over all experts, then the top K, renormalised to sum to 1."""
        softmax_NE = torch.softmax(self.router(hidden_ND), dim=-1)
        best_NK, expert_ids_NK = torch.topk(softmax_NE, self.top_k, dim=-1)
        return Routing(softmax_NE, expert_ids_NK, best_NK / best_NK.sum(dim=-1, keepdim=True))


class MoEModel(nn.Module):
    """The whole model. Parameters are float32 except the experts', whose dtypes are given (training uses float32)."""

    cos_TC: Tensor
    sin_TC: Tensor

    def __init__(self, shape: ModelShape, dtypes: Mapping[str, torch.dtype] = EXPERT_TENSORS) -> None:
        super().__init__()
        if shape.hidden % (2 * shape.num_heads):
            raise SpecError(f"hidden {shape.hidden} does not divide into {shape.num_heads} heads of even size")
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, dtypes) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        half = shape.hidden // shape.num_heads // 2
        angle_TC = torch.outer(torch.arange(shape.context), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos_TC", angle_TC.cos(), persistent=False)
        self.register_buffer("sin_TC", angle_TC.sin(), persistent=False)

    def forward(self, tokens_BT: Tensor, experts: ExpertsFunction, routings: list[Routing] | None = None) -> Tensor:
        """Logits of the next byte at every position.

        Args:
            tokens_BT: int64 bytes, T <= context.
            experts: computes the experts of each layer; called once per layer, in order, with rows in the order of
                tokens_BT.flatten().
            routings: if given, each layer's routing is appended to it (for losses and statistics).

        Returns:
            float32 [B, T, V].
        """
        batch, length = tokens_BT.shape
        cos_TC, sin_TC = self.cos_TC[:length], self.sin_TC[:length]
        x_BTD = self.embedding(tokens_BT)
        for index, layer in enumerate(self.moe_layers):
            x_BTD = x_BTD + layer.attention(layer.attention_norm(x_BTD), cos_TC, sin_TC)
            hidden_ND = layer.experts_norm(x_BTD).view(batch * length, self.shape.hidden)
            routing = layer.route(hidden_ND)
            if routings is not None:
                routings.append(routing)
            out_ND = experts(index, hidden_ND, routing.expert_ids_NK, routing.gates_NK)
            x_BTD = x_BTD + out_ND.view_as(x_BTD)
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV

    @property
    def moe_layers(self) -> list[Layer]:
        """The L layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def layer_expert_tensors(self, layer: int) -> dict[str, Tensor]:
        """The stacked weights of one layer by name (`EXPERT_TENSORS`), each with E first; not copies."""
        experts = self.moe_layers[layer].experts
        return {name: getattr(experts, name).detach() for name in EXPERT_TENSORS}


class LocalExperts:
    """The unsharded twin: all experts of a model, computed in this process. An `ExpertsFunction`.

    Attributes:
        load_LE: int64 [L, E], rows sent to each expert since it was made or last zeroed.
    """

    def __init__(self, model: MoEModel) -> None:
        self.layers = [model.layer_expert_tensors(layer) for layer in range(model.shape.num_layers)]
        self.load_LE = torch.zeros(model.shape.num_layers, model.shape.num_experts, dtype=torch.int64)

    def __call__(self, layer: int, hidden_ND: Tensor, expert_ids_NK: Tensor, gates_NK: Tensor) -> Tensor:
        """Compute, and count the load."""
        flat = expert_ids_NK.flatten()
        self.load_LE[layer] += torch.bincount(flat, minlength=self.load_LE.shape[1])
        return combine(grouped_ffn(hidden_ND, expert_ids_NK, self.layers[layer]), gates_NK)


def combine(outputs_NKD: Tensor, gates_NK: Tensor) -> Tensor:
    """The gate-weighted sum over k, added in the order of k, so that it rounds the same on every side: [N, D]."""
    total_ND = outputs_NKD[:, 0] * gates_NK[:, 0, None]
    for k in range(1, gates_NK.shape[1]):
        total_ND = total_ND + outputs_NKD[:, k] * gates_NK[:, k, None]
    return total_ND


def grouped_ffn(rows_ND: Tensor, places_NK: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Every row through the experts at its K places in the stacked tensors (expert ids, or slots of this rank).

    Args:
        rows_ND: float32, in any order; N may be 0.
        places_NK: int64, indices into the tensors' first dimension; K is 1 where rows were sent once per expert.
        tensors: stacked weights (`EXPERT_TENSORS`) with any first dimension.

    Returns:
        float32 [N, K, D]; each row's result is that of `expert_ffn`, bit for bit.
    """
    num_rows, top_k = places_NK.shape
    if not num_rows:
        return rows_ND.new_empty(0, top_k, rows_ND.shape[1])
    places = places_NK.flatten()
    counts = torch.bincount(places, minlength=len(tensors["bias"]))
    blocks = -(-counts // BLOCK_ROWS)
    # entry i of the sorted places goes to row target[i] of a buffer in which every place starts a new block
    sorted_places, order = torch.sort(places, stable=True)
    shift = (blocks.cumsum(0) - blocks) * BLOCK_ROWS - (counts.cumsum(0) - counts)
    target = torch.arange(len(places)) + shift[sorted_places]
    source = torch.zeros(int(blocks.sum()) * BLOCK_ROWS, dtype=torch.int64)  # unused rows repeat row 0: rows do not mix
    source[target] = order // top_k
    buffer = rows_ND.index_select(0, source)
    start = 0
    for place, num_blocks in enumerate(blocks.tolist()):
        if num_blocks:
            stop = start + num_blocks * BLOCK_ROWS
            _run_blocks(buffer[start:stop], {name: tensor[place] for name, tensor in tensors.items()})
            start = stop
    back = torch.empty_like(target)
    back[order] = target
    return buffer.index_select(0, back).view(num_rows, top_k, -1)


def expert_ffn(rows_MD: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """SwiGLU of one expert in float32: down(silu(gate(x)) * up(x)) + bias.

    A row's result is a function of that row alone, bit for bit: see the module's docstring. M = 20 runs as blocks of
    rows 0..15 and rows 16..19 with 12 rows of zeros.

    Args:
        rows_MD: float32 [M, D], any M.
        weights: `EXPERT_TENSORS` of one expert: gate_up [2F, D] (gate first), down [D, F], bias [D].

    Returns:
        float32 [M, D].
    """
    num_rows = rows_MD.shape[0]
    buffer = rows_MD.new_zeros(-(-num_rows // BLOCK_ROWS) * BLOCK_ROWS, rows_MD.shape[1])
    buffer[:num_rows] = rows_MD
    _run_blocks(buffer, weights)
    return buffer[:num_rows]


def _run_blocks(buffer: Tensor, weights: Mapping[str, Tensor]) -> None:
    """Replace rows by one expert's results, a block at a time; the number of rows is a multiple of BLOCK_ROWS.

    The buffer must be fresh memory of the allocator or whole blocks of it, never a caller's view: kernels may round
    by alignment, and so all blocks have the same.
    """
    gate_up, down = weights["gate_up"].float().t(), weights["down"].float().t()
    for block in torch.split(buffer, BLOCK_ROWS):
        gate, up = torch.mm(block, gate_up).chunk(2, dim=1)
        torch.addmm(weights["bias"], functional.silu(gate).mul_(up), down, out=block)


def _rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotary positions: the two halves of a head are the two coordinates that turn (RoFormer, arXiv:2104.09864)."""
    first, second = x_BHTC.chunk(2, dim=-1)
    return torch.cat((first * cos_TC - second * sin_TC, second * cos_TC + first * sin_TC), dim=-1)


def save_model(model: MoEModel, path: Path) -> None:
    """Write the weights as served: experts as in `EXPERT_TENSORS`, all else float32, the shape as metadata."""
    tensors = {
        name: tensor.detach().to(
            EXPERT_TENSORS.get(name.rsplit(".", 1)[-1], torch.float32) if ".experts." in name else torch.float32
        )
        for name, tensor in model.state_dict().items()
    }
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"shape": msgspec.json.encode(model.shape).decode()})


def load_model(path: Path | None = None) -> MoEModel:
    """The trained model, on CPU, for inference only; from the package's own weights unless a file is named.

    Raises:
        SpecError: the file was not written by `save_model`.
    """
    if path is None:
        with resources.as_file(resources.files("eplb_async.demo") / "weights" / "model.safetensors") as own:
            return load_model(own)
    try:
        with safe_open(path, framework="pt") as file:
            shape = msgspec.json.decode((file.metadata() or {})["shape"], type=ModelShape)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, KeyError, msgspec.MsgspecError) as error:
        raise SpecError(
            f"{path} has no shape and weights of this model ({error}); needed a file that eplb_async.demo.train wrote"
        ) from error
    # the first use of the meta device would cost 1.5 s of imports, drawing weights that are replaced at once 0.1 s
    with torch.random.fork_rng(devices=[]):
        model = MoEModel(shape)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()

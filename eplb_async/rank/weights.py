"""The expert weights of one rank, as rows of bytes: every tensor that belongs to an expert moves with it.

A layer has one or several tensors, [S, ...] each, of any dtype: weights, scales, biases, packed formats. Row s of each is
the part of the expert in slot s. Names do not matter to the transfer, only to people.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch

from eplb_async.core.errors import SpecError
from eplb_async.core.spec import MoESpec

__all__ = ["LayerTensors", "WeightRows", "named_tensors"]

LayerTensors = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


def named_tensors(layer: LayerTensors) -> dict[str, torch.Tensor]:
    """The tensors of a layer by name; numbered where they come without names."""
    if isinstance(layer, torch.Tensor):
        return {"0": layer}
    if isinstance(layer, Mapping):
        return dict(layer)
    return {str(index): tensor for index, tensor in enumerate(layer)}


class WeightRows:
    """Checked byte views of all layers.

    Attributes:
        rows: for each layer, for each tensor, uint8 [S, bytes of one row]; views of the engine's own memory.
        slot_bytes: per layer, bytes of one slot over all tensors.
        digest: of names, dtypes and row shapes of all layers; equal on all ranks of a group.

    Raises:
        SpecError: not L layers, no tensors, a first dimension that is not S, rows that are not contiguous, or tensors on
            different devices.
    """

    def __init__(self, weights_per_layer: Sequence[LayerTensors], spec: MoESpec) -> None:
        if len(weights_per_layer) != spec.num_layers:
            raise SpecError(
                f"weights of {len(weights_per_layer)} layers were given; the spec has {spec.num_layers} MoE layers"
            )
        self.rows: list[list[torch.Tensor]] = []
        description: list[str] = []
        for layer, tensors in enumerate(weights_per_layer):
            named = named_tensors(tensors)
            if not named:
                raise SpecError(f"layer {layer} has no tensors; pass every tensor that belongs to an expert")
            self.rows.append([_byte_rows(layer, name, tensor, spec) for name, tensor in named.items()])
            description += [f"{layer} {name} {tensor.dtype} {list(tensor.shape[1:])}" for name, tensor in named.items()]
        devices = {str(tensor.device) for tensors in self.rows for tensor in tensors}
        if len(devices) > 1:
            raise SpecError(f"expert tensors lie on {', '.join(sorted(devices))}; all of a rank must lie on one device")
        self.slot_bytes = [sum(tensor.shape[1] for tensor in tensors) for tensors in self.rows]
        self.digest = hashlib.sha256("\n".join(description).encode()).hexdigest()[:16]


def _byte_rows(layer: int, name: str, tensor: torch.Tensor, spec: MoESpec) -> torch.Tensor:
    where = f"layer {layer} tensor {name!r} of shape {list(tensor.shape)}"
    if tensor.dim() < 1 or tensor.shape[0] != spec.slots_per_rank:
        raise SpecError(f"{where}: the first dimension must be S = {spec.slots_per_rank}, the slots of one rank")
    if tensor.numel() == 0:
        raise SpecError(f"{where}: it is empty; leave tensors without data out")
    if not tensor[0].is_contiguous():
        raise SpecError(
            f"{where}: rows are not contiguous (strides {list(tensor.stride())}); pass tensor.contiguous() memory"
        )
    row_elements = math.prod(tensor.shape[1:])
    if spec.slots_per_rank > 1 and tensor.stride(0) < row_elements:
        raise SpecError(f"{where}: rows overlap (strides {list(tensor.stride())}); every slot needs memory of its own")
    flat = tensor.detach().as_strided((tensor.shape[0], row_elements), (max(tensor.stride(0), row_elements), 1))
    return flat.view(torch.uint8)

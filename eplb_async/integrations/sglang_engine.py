"""What one rank of SGLang has, read once its model is loaded, and what of it we cannot serve.

SGLang's modules are imported here, inside functions: this package is imported where there is no SGLang.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from eplb_async.core.errors import EngineDeclined
from eplb_async.core.load import LoadKind
from eplb_async.core.placement import IntArray
from eplb_async.core.spec import MoESpec
from eplb_async.integrations.engine_group import Offer, TorchRanks, as_expected, spec_of
from eplb_async.rank.weights import LayerTensors, named_tensors

__all__ = ["Counts", "SglangModel", "engine_ranks", "expert_weights", "refusals"]

DISPATCH = ("dynamic", "static")
"""dynamic reads the table and its lengths, static a slot per expert that follows from them. "lp" solves for shares of its own."""
COUNTS_START = 16
"""Bytes: counts are recorded on the device in accesses of this size, so they begin at a multiple of it."""


def refusals() -> list[str]:
    """Why this engine's configuration cannot be served; the same on all its ranks, since its arguments are."""
    runtime = import_module("sglang.srt.runtime_context")
    execution, model, parallel = runtime.get_exec(), runtime.get_model(), runtime.get_parallel()
    ranks, world = parallel.moe_ep_group.world_size, dist.get_world_size()
    cases = {
        "elastic EP changes the ranks of a running model": execution.moe.elastic_ep_backend is not None,
        f"--ep-dispatch-algorithm {execution.moe.ep_dispatch_algorithm} has tables of its own; served are {', '.join(DISPATCH)}": (
            execution.moe.ep_dispatch_algorithm not in DISPATCH
        ),
        # SGLang's own balancing works over all of them: groups of which one declines would make it wait for ever
        f"its {world} ranks are not one expert-parallel group of {ranks} (pipeline stages, moe-dp or moe-tp)": ranks
        != world,
        "weights that are loaded while graphs are captured change after attach": model.is_startup_weight_load_overlap,
        "weights in a weight cache belong to its daemon": model.weight_cache_mode != "off",
        "--enable-memory-saver takes the memory of weights away and gives it back": execution.features.enable_memory_saver,
        "--enable-pdmux runs two forwards at once": runtime.get_disagg().enable_pdmux,
    }
    return [reason for reason, holds in cases.items() if holds]


def engine_ranks() -> TorchRanks:
    """The expert-parallel ranks, over SGLang's own group for the CPU."""
    return TorchRanks(import_module("sglang.srt.runtime_context").get_parallel().moe_ep_group.cpu_group)


class Counts:
    """What SGLang's recorder counts in a forward, as one tensor of the MoE layers.

    SGLang adds to `data`, also from captured graphs, and clears it when the next forward begins. If the MoE layers are consecutive, the
    hook reads their rows where they are; else they are copied together behind the forward.

    Attributes:
        load: int32 [L, width], contiguous, at an address that never changes.
    """

    def __init__(self, data: torch.Tensor, layer_ids: Sequence[int]) -> None:
        first, last = layer_ids[0], layer_ids[-1]
        rows = data[first : last + 1]
        self._data, self._index = data, None
        if len(layer_ids) == len(rows) and rows.data_ptr() % COUNTS_START == 0:
            self.load = rows
        else:
            self._index = torch.tensor(layer_ids, device=data.device)
            self.load = torch.zeros(len(layer_ids), data.shape[1], dtype=data.dtype, device=data.device)

    def gather(self) -> None:
        """Behind a forward, before the hook reads `load`."""
        if self._index is not None:
            torch.index_select(self._data, 0, self._index, out=self.load)
            self._data.zero_()  # SGLang does not, while an operator has stopped its recorder


@dataclass(frozen=True, kw_only=True)
class SglangModel:
    """The model of one rank.

    Attributes:
        metadata: SGLang's ExpertLocationMetadata.
        layer_ids: SGLang's number of each MoE layer, ascending; dense layers have numbers, too.
        counts: see there.
        offer: for our group.
        addresses: of those expert tensors that begin where a parameter of the model does.
    """

    metadata: Any
    layer_ids: Sequence[int]
    counts: Counts
    offer: Offer
    addresses: frozenset[int]

    @classmethod
    def read(cls, model: Any, model_config: Any) -> "SglangModel":
        """Look at the model.

        Raises:
            EngineDeclined: something is not there, or is not what it was when this was written.
        """
        return as_expected("SGLang", lambda: cls._read(model, model_config))

    @classmethod
    def _read(cls, model: Any, model_config: Any) -> "SglangModel":
        location = import_module("sglang.srt.eplb.expert_location")
        metadata = location.get_global_expert_location_metadata()
        if metadata is None:
            raise EngineDeclined(["the model tells SGLang nothing of its experts' location"])
        layer_ids = sorted(model.routed_experts_weights_of_layer.keys())
        if not layer_ids or layer_ids[-1] >= metadata.num_layers:
            raise EngineDeclined([f"the model's MoE layers are {layer_ids}, of {metadata.num_layers} that have a map"])
        config = location.ModelConfigForExpertLocation.from_model_config(model_config)
        experts, slots = metadata.num_logical_experts, metadata.num_physical_experts
        spec = spec_of(len(layer_ids), experts, slots, metadata.ep_size, config.num_groups)
        placement_LP = metadata.physical_to_logical_map_cpu[layer_ids].numpy().astype(np.int32)
        _check_loaded(placement_LP, spec)
        data, kind = _counted(metadata, spec)
        counts, weights = Counts(data, layer_ids), expert_weights(model, layer_ids)
        return cls(
            metadata=metadata,
            layer_ids=layer_ids,
            counts=counts,
            offer=Offer(
                model=str(model_config.model_path),
                spec=spec,
                weights=weights,
                load=counts.load,
                placement=placement_LP,
                load_kind=kind,
            ),
            addresses=_parameters(model)
            & {tensor.data_ptr() for layer in weights for tensor in named_tensors(layer).values()},
        )

    def moved(self, model: Any) -> str:
        """Why the tensors that were given to the hook are not the model's any more, or ""."""
        gone = len(self.addresses - _parameters(model))
        return f"{gone} expert tensors have been made anew since the model was loaded" if gone else ""


def expert_weights(model: Any, layer_ids: Sequence[int]) -> Sequence[LayerTensors]:
    """What SGLang's own balancing would move, per MoE layer."""
    return [list(model.routed_experts_weights_of_layer[layer]) for layer in layer_ids]


def _check_loaded(placement_LP: IntArray, spec: MoESpec) -> None:
    """With tokens sent from rank to rank, SGLang 0.5.23 loads one slot of each expert on a rank, and leaves a second one empty."""
    if import_module("sglang.srt.runtime_context").get_exec().moe.moe_a2a_backend == "none":
        return
    for layer, row_P in enumerate(placement_LP):
        for rank, own_S in enumerate(row_P.reshape(spec.num_ranks, -1)):
            if len(np.unique(own_S)) < len(own_S):
                raise EngineDeclined(
                    [
                        f"MoE layer {layer} starts with two slots of one expert on rank {rank}; SGLang loads only one of them"
                    ]
                )


def _counted(metadata: Any, spec: MoESpec) -> tuple[torch.Tensor, LoadKind]:
    """The tensor in which SGLang's recorder counts one forward."""
    recorder = import_module("sglang.srt.eplb.expert_distribution").get_global_expert_distribution_recorder()
    gatherers = list(recorder._single_pass_gatherers.values())
    data = getattr(gatherers[0], "_data", None)
    if len(gatherers) != 1 or not isinstance(data, torch.Tensor):
        kinds = ", ".join(type(gatherer).__name__ for gatherer in gatherers)
        raise EngineDeclined(
            [f"SGLang counts with {kinds}, not in one tensor; --expert-distribution-recorder-mode stat does"]
        )
    widths = {spec.num_slots: LoadKind.GLOBAL_SLOTS, spec.slots_per_rank: LoadKind.LOCAL_SLOTS}
    kind = widths.get(data.shape[1])
    if kind is None or len(data) != metadata.num_layers:
        raise EngineDeclined(
            [f"SGLang's counts are {list(data.shape)}; needed [{metadata.num_layers}, {' or '.join(map(str, widths))}]"]
        )
    return data, kind


def _parameters(model: Any) -> frozenset[int]:
    return frozenset(parameter.data_ptr() for parameter in model.parameters())

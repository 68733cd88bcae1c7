"""As much of SGLang as the plugin touches, in our own words, small enough to run on a CPU: `install(options)` makes `import sglang` find it.

A rank serves one model whose experts are numbers: expert e of layer l turns every token into 100 l + e. What comes out of a layer is summed
over ranks, so that a token computed twice, not at all, or by another expert shows.
"""

import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from eplb_async.core.placement import expert_to_slots, initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.integrations.sglang_maps import rank_slots
from eplb_async.rank.transfer.shm import SharedWeights, share_weights

__all__ = ["Batch", "ForwardMode", "ModelRunner", "Options", "WeightUpdater", "install"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the engine is started.

    Attributes:
        num_layers, moe_layers: of the model; `spec` has the MoE layers only.
        local_counts: each rank counts what reaches its own slots, instead of what its tokens are sent to.
        per_token: the recorder keeps tokens, not counts.
        second_slot: the placement starts with two slots of one expert on rank 0.
    """

    group: str
    rank: int
    spec: MoESpec
    num_layers: int
    moe_layers: tuple[int, ...]
    dispatch: str = "dynamic"
    a2a: str = "none"
    local_counts: bool = False
    enable_eplb: bool = True
    elastic: str | None = None
    second_slot: bool = False
    per_token: bool = False


class ForwardMode(IntEnum):
    """Kinds of forward."""

    EXTEND = auto()
    DECODE = auto()
    IDLE = auto()


class Batch(NamedTuple):
    """Tokens of a forward; here their ids are the experts that they want."""

    input_ids: torch.Tensor
    forward_mode: ForwardMode = ForwardMode.DECODE
    is_extend_in_batch: bool = False


class HookType(Enum):
    """Kinds of hooks."""

    BEFORE = "before"
    AFTER = "after"
    REPLACE = "replace"


class HookSource(NamedTuple):
    """Whose hook it is."""

    plugin_name: str
    dist_name: str


class HookRegistry:
    """Hooks by the dotted name of what they hook."""

    _hooks: dict[str, Any] = defaultdict(list)  # noqa: RUF012
    _patched: set[str] = set()  # noqa: RUF012

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: HookType = HookType.AFTER, *, source: Any = None) -> None:
        """Note a hook."""
        cls._hooks[target].append((hook_type, hook))

    @classmethod
    def apply_hooks(cls) -> None:
        """Put the hooks in place that are not."""
        for target in set(cls._hooks) - cls._patched:
            module, *names = _split(target)
            owner: Any = import_module(module)
            for name in names[:-1]:
                owner = getattr(owner, name)
            original = made = getattr(owner, names[-1])
            for kind, hook in cls._hooks[target]:
                made = hook if kind is HookType.REPLACE else _wrapped(made, hook, kind)
            for holder in [owner, *sys.modules.values()]:
                if getattr(holder, "__dict__", {}).get(names[-1]) is original:
                    setattr(holder, names[-1], made)
            cls._patched.add(target)


def _split(target: str) -> list[str]:
    module = max((name for name in MODULES if target.startswith(name + ".")), key=len)
    return [module, *target.removeprefix(module + ".").split(".")]


def _wrapped(function: Callable[..., Any], hook: Callable[..., Any], kind: HookType) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if kind is HookType.BEFORE:
            hook(*args, **kwargs)
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        hook(result, *args, **kwargs)
        return result

    return call


@dataclass
class ExpertLocationMetadata:
    """The maps of all layers, also of dense ones."""

    physical_to_logical_map: torch.Tensor
    physical_to_logical_map_cpu: torch.Tensor
    logical_to_all_physical_map: torch.Tensor
    logical_to_all_physical_map_cpu: torch.Tensor
    logical_to_all_physical_map_num_valid: torch.Tensor
    logical_to_rank_dispatch_physical_map: torch.Tensor | None
    ep_size: int

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self.physical_to_logical_map)

    @property
    def num_physical_experts(self) -> int:
        """Slots."""
        return self.physical_to_logical_map.shape[1]

    @property
    def num_logical_experts(self) -> int:
        """Experts."""
        return self.logical_to_all_physical_map.shape[1]


class ModelConfigForExpertLocation:
    """What a model says of its experts."""

    num_groups: int | None = None

    @staticmethod
    def from_model_config(model_config: Any) -> "ModelConfigForExpertLocation":
        """For any model the same."""
        return ModelConfigForExpertLocation()


class Gatherer:
    """Counts of one forward."""

    def __init__(self, num_layers: int, width: int) -> None:
        self._data = torch.zeros(num_layers, width, dtype=torch.int)


class Recorder:
    """The recorder of a process."""

    def __init__(self, options: Options) -> None:
        width = options.spec.slots_per_rank if options.local_counts else options.spec.num_slots
        self._gatherer = Gatherer(options.num_layers, width)
        self._single_pass_gatherers: dict[str, Any] = {"primary": None if options.per_token else self._gatherer}

    @contextlib.contextmanager
    def with_forward_pass(self) -> Iterator[torch.Tensor]:
        """Around a forward, which adds to the counts."""
        counts = self._gatherer._data
        counts[...] = 0
        yield counts


class EPLBManager:
    """The balancing that stays where ours does not fit; here it only tells that it was called."""

    def __init__(self, *, model_config: Any, get_model: Callable[[], Any]) -> None:
        self._model_config, self._get_model = model_config, get_model
        self.own_steps, self.disabled = 0, ""

    def on_forward_pass_end(self) -> None:
        """Behind every forward."""
        self.own_steps += 1

    def reset_generator(self) -> None:
        """Begin to count anew."""
        self.own_steps = 0

    def disable_rebalance(self, reason: str) -> None:
        """Move nothing from now on."""
        self.disabled = reason

    def rebalance(self) -> Iterator[None]:
        """Move now."""
        yield


class Model:
    """See the module."""

    def __init__(self, options: Options, placement_LP: Any) -> None:
        self.options = options
        first = options.rank * options.spec.slots_per_rank
        own_LS = placement_LP[:, first : first + options.spec.slots_per_rank]
        layers = [
            {"w": torch.tensor([[100.0 * layer + expert] * 3 for expert in row_S])}
            for layer, row_S in zip(options.moe_layers, own_LS.tolist(), strict=True)
        ]
        self.shared: SharedWeights = share_weights(options.group, options.rank, layers)
        self.weights = [torch.nn.Parameter(layer["w"], requires_grad=False) for layer in self.shared]
        self.routed_experts_weights_of_layer = {
            layer: [weight.data] for layer, weight in zip(options.moe_layers, self.weights, strict=True)
        }

    def parameters(self) -> Sequence[torch.Tensor]:
        """All tensors of the model."""
        return self.weights

    def forward(self, experts: torch.Tensor, counts: torch.Tensor) -> dict[int, torch.Tensor]:
        """What each MoE layer makes of the tokens."""
        return {layer: self._layer(layer, experts, counts[layer]) for layer in self.options.moe_layers}

    def _layer(self, layer: int, experts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        options, width = self.options, self.options.spec.slots_per_rank
        slots_RT = self._slots(layer, experts)[None]
        if options.a2a != "none":
            sent = [torch.empty_like(slots_RT[0]) for _ in range(options.spec.num_ranks)]
            dist.all_gather(sent, slots_RT[0])
            slots_RT = torch.stack(sent)
        here_RT = slots_RT // width == options.rank
        counted = slots_RT[here_RT] % width if options.local_counts else self._sent(slots_RT)
        counts += torch.bincount(counted, minlength=len(counts)).to(torch.int)
        made_RT = torch.zeros(slots_RT.shape)
        made_RT[here_RT] = self.routed_experts_weights_of_layer[layer][0][slots_RT[here_RT] % width, 0]
        dist.all_reduce(made_RT)
        return self._sent(made_RT)

    def _sent(self, values_RT: torch.Tensor) -> torch.Tensor:
        return values_RT[self.options.rank if len(values_RT) > 1 else 0]

    def _slots(self, layer: int, experts: torch.Tensor) -> torch.Tensor:
        metadata = RESOURCES.metadata
        if self.options.dispatch == "static":
            found: torch.Tensor = metadata.logical_to_rank_dispatch_physical_map[layer][experts]
            return found
        entry = torch.arange(len(experts)) % metadata.logical_to_all_physical_map_num_valid[layer][experts]
        picked: torch.Tensor = metadata.logical_to_all_physical_map[layer][experts, entry]
        return picked


class WeightUpdater:
    """Replaces weights."""

    def __init__(self, get_model_runner: Callable[[], Any]) -> None:
        self.get_model_runner = get_model_runner

    def update_weights_from_disk(self, *args: Any) -> None:
        """As named; so are the others."""

    load_weights_from_distributed = update_weights_from_tensor = update_weights_from_disk
    update_weights_from_ipc = begin_weight_update = update_weights_from_disk


class ModelRunner:
    """Loads a model and runs its forwards."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.eplb_manager: Any = None
        self.model: Model
        self.initialize()
        self.weight_updater = WeightUpdater(lambda: self)

    def initialize(self) -> None:
        """Everything before the KV cache."""
        options = self.options
        placement_LP = initial_placement(options.spec)
        if options.second_slot:
            placement_LP[:, 0] = placement_LP[:, 1]
        RESOURCES.metadata, RESOURCES.recorder = _metadata(options, placement_LP), Recorder(options)
        if options.enable_eplb:
            manager = sys.modules["sglang.srt.model_executor.model_runner"].__dict__["EPLBManager"]
            config = SimpleNamespace(model_path="maker/model-of-numbers")
            self.eplb_manager = manager(model_config=config, get_model=lambda: self.model)
        self.model = Model(options, placement_LP)

    def forward(self, forward_batch: Batch) -> dict[int, torch.Tensor]:
        """One forward."""
        with RESOURCES.recorder.with_forward_pass() as counts:
            output = self.model.forward(forward_batch.input_ids, counts)
        if self.eplb_manager is not None:
            self.eplb_manager.on_forward_pass_end()
        return output


def _metadata(options: Options, placement_LP: Any) -> ExpertLocationMetadata:
    spec = options.spec
    maps_LP = initial_placement(spec)[:1].repeat(options.num_layers, axis=0)
    maps_LP[list(options.moe_layers)] = placement_LP
    table_LEK, count_LE = expert_to_slots(maps_LP, spec.num_experts, spec.num_slots)
    maps, tables, counts = (torch.from_numpy(array.astype(np.int64)) for array in (maps_LP, table_LEK, count_LE))
    shape = options.rank, spec.slots_per_rank, spec.num_ranks
    static = [rank_slots(table, count, *shape) for table, count in zip(tables, counts, strict=True)]
    return ExpertLocationMetadata(
        physical_to_logical_map=maps,
        physical_to_logical_map_cpu=maps.clone(),
        logical_to_all_physical_map=tables,
        logical_to_all_physical_map_cpu=tables.clone(),
        logical_to_all_physical_map_num_valid=counts,
        logical_to_rank_dispatch_physical_map=torch.stack(static) if options.dispatch == "static" else None,
        ep_size=spec.num_ranks,
    )


RESOURCES = SimpleNamespace(metadata=None, recorder=None, options=None)
"""Of the one engine of this process."""


def _exec() -> SimpleNamespace:
    options = RESOURCES.options
    moe = {
        "elastic_ep_backend": options.elastic,
        "ep_dispatch_algorithm": options.dispatch,
        "moe_a2a_backend": options.a2a,
    }
    return SimpleNamespace(moe=SimpleNamespace(**moe), features=SimpleNamespace(enable_memory_saver=False))


def _parallel() -> SimpleNamespace:
    size = RESOURCES.options.spec.num_ranks
    return SimpleNamespace(moe_ep_group=SimpleNamespace(cpu_group=dist.group.WORLD, world_size=size))


MODULES: dict[str, dict[str, Any]] = {
    "sglang": {"__path__": [], "__file__": __file__},
    "sglang.srt": {"__path__": []},
    "sglang.srt.runtime_context": {
        "get_exec": _exec,
        "get_parallel": _parallel,
        "get_model": lambda: SimpleNamespace(is_startup_weight_load_overlap=False, weight_cache_mode="off"),
        "get_disagg": lambda: SimpleNamespace(enable_pdmux=False),
    },
    "sglang.srt.eplb": {"__path__": []},
    "sglang.srt.eplb.eplb_manager": {"EPLBManager": EPLBManager},
    "sglang.srt.eplb.expert_location": {
        "ModelConfigForExpertLocation": ModelConfigForExpertLocation,
        "get_global_expert_location_metadata": lambda: RESOURCES.metadata,
    },
    "sglang.srt.eplb.expert_distribution": {"get_global_expert_distribution_recorder": lambda: RESOURCES.recorder},
    "sglang.srt.plugins": {"__path__": []},
    "sglang.srt.plugins.hook_registry": {"HookRegistry": HookRegistry, "HookSource": HookSource, "HookType": HookType},
    "sglang.srt.model_executor": {"__path__": []},
    "sglang.srt.model_executor.model_runner_components": {"__path__": []},
    "sglang.srt.model_executor.model_runner_components.weight_updater": {"WeightUpdater": WeightUpdater},
    "sglang.srt.model_executor.model_runner": {"ModelRunner": ModelRunner, "EPLBManager": EPLBManager},
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        return ModuleSpec(fullname, self, is_package="__path__" in MODULES[fullname])

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(MODULES[module.__name__])


def install(options: Options) -> None:
    """For the rest of this process."""
    RESOURCES.options = options
    EPLBManager.__module__ = "sglang.srt.eplb.eplb_manager"
    sys.meta_path.append(_Finder())

"""As much of vLLM as its EplbState needs of its surroundings, for tests without a GPU: groups, configurations, and a model.

The parent of the plugin's class is `StandInState`, which does by itself what the plugin leaves to it, or the EplbState of a wheel.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from eplb_async.core.spec import MoESpec
from eplb_async.rank.transfer.shm import SharedWeights, share_weights
from tests.integrations.wheels import execute

__all__ = [
    "SPEC",
    "ChangedModel",
    "StandInModel",
    "StandInState",
    "install_modules",
    "model_config",
    "parallel_config",
    "placement",
]

EXPERTS, REDUNDANT, LAYERS, ROW = 8, 4, 3, 32
SPEC = MoESpec(num_layers=LAYERS, num_experts=EXPERTS, num_redundant=REDUNDANT, num_ranks=2)
STATE = "vllm.distributed.eplb.eplb_state"


class ListedWeights(SharedWeights):
    """Layers as lists, which is what vLLM's models have."""

    def __getitem__(self, layer: int) -> Any:  # type: ignore[override]
        return list(super().__getitem__(layer).values())

    def __iter__(self) -> Iterator[Any]:
        return (self[layer] for layer in range(len(self)))


class StandInModel:
    """What MixtureOfExperts promises, of LAYERS layers; slot p of a layer holds the bytes of expert p % EXPERTS."""

    num_moe_layers, num_expert_groups = LAYERS, 1
    num_logical_experts = num_routed_experts = EXPERTS
    num_redundant_experts, num_physical_experts = REDUNDANT, EXPERTS + REDUNDANT
    num_shared_experts = 0

    def __init__(self, name: str, rank: int, num_ranks: int, broken: bool = False) -> None:
        """`broken`: its tensors are not such as the hook needs."""
        self.rank, slots = rank, self.num_physical_experts // num_ranks
        self.num_local_physical_experts = slots
        first = rank * slots
        layers = [
            {
                "w13": torch.stack([content(layer, (first + slot) % EXPERTS) for slot in range(slots)]),
                "w2": torch.stack([content(layer, (first + slot) % EXPERTS)[:8] * 2 for slot in range(slots)]),
            }
            for layer in range(LAYERS)
        ]
        shared = share_weights(name, rank, layers)
        self.shared = ListedWeights(shared.segment, list(shared))
        self.expert_weights: Any = list(self.shared) if broken else self.shared
        self.moe_layers: list[Any] = [SimpleNamespace(eplb_state=None) for _ in range(LAYERS)]

    def set_eplb_state(self, expert_load_view: Any, logical_to_physical_map: Any, logical_replica_count: Any) -> None:
        """Keep what a router would read."""
        self.load, self.table, self.count = expert_load_view, logical_to_physical_map, logical_replica_count

    def wrong_slots(self, slot_to_expert_LP: torch.Tensor) -> int:
        """Slots of this rank whose bytes are not those of the expert in the map."""
        slots, wrong = self.num_local_physical_experts, 0
        for layer, (w13, w2) in enumerate(self.expert_weights):
            for slot in range(slots):
                expected = content(layer, int(slot_to_expert_LP[layer, self.rank * slots + slot]))
                wrong += not (torch.equal(w13[slot], expected) and torch.equal(w2[slot], expected[:8] * 2))
        return wrong

    def forward(self, experts: torch.Tensor) -> list[torch.Tensor]:
        """What each layer makes of tokens that want these experts, the same on all ranks: the first weight of each one's expert.

        Counts slots as vLLM's kernel does: token i of an expert takes entry i % count.
        """
        made, width = [], self.num_local_physical_experts
        for layer in range(LAYERS):
            entry = torch.arange(len(experts)) % self.count[layer, experts]
            slots = self.table[layer, experts, entry]
            self.load[layer].index_add_(0, slots, torch.ones(len(slots), dtype=self.load.dtype))
            here = slots // width == self.rank
            output = torch.zeros(len(experts))
            output[here] = self.expert_weights[layer][0][slots[here] % width, 0]
            dist.all_reduce(output)
            made.append(output)
        return made


class ChangedModel(StandInModel):
    """Of a release in which a field has another name."""

    @property
    def num_expert_groups(self) -> int:  # type: ignore[override]
        """Gone."""
        raise AttributeError("num_expert_groups")


def placement() -> Any:
    """Where vLLM puts experts at first."""
    return (torch.arange(EXPERTS + REDUNDANT) % EXPERTS).repeat(LAYERS, 1).numpy()


def content(layer: int, expert: int) -> torch.Tensor:
    """The weights of an expert."""
    return torch.arange(ROW, dtype=torch.float32) + 100 * expert + 10_000 * layer


class StandInState:
    """The parts of an EplbState that the plugin's subclass leaves to its parent."""

    def __init__(self, parallel_config: Any, device: torch.device) -> None:
        self.parallel_config, self.device = parallel_config, device
        self.model_states: dict[str, Any] = {}
        self.is_async, self.expert_rearrangement_step = False, 0
        self.own: list[str] = []

    def add_model(self, model: Any, model_config: Any, model_name: str | None = None) -> None:
        """Make the maps of a model."""
        self.is_async = self.parallel_config.eplb_config.use_async
        slots = torch.arange(model.num_physical_experts) % EXPERTS
        table = torch.full((LAYERS, EXPERTS, 1024), -1)
        for slot, expert in enumerate(slots.tolist()):
            table[:, expert, slot // EXPERTS] = slot
        state = SimpleNamespace(
            model=model,
            model_name=model_name or model_config.model,
            physical_to_logical_map=slots.repeat(LAYERS, 1),
            logical_to_physical_map=table,
            logical_replica_count=(table >= 0).sum(-1),
            expert_load_pass=torch.zeros(LAYERS, len(slots), dtype=torch.int32),
            expert_load_window=torch.zeros(4, LAYERS, len(slots), dtype=torch.int32),
            expert_buffer=[torch.empty(1)],
            communicator=object(),
        )
        model.set_eplb_state(state.expert_load_pass, state.logical_to_physical_map, state.logical_replica_count)
        self.model_states[model_config.compute_hash()] = state

    def prepare_forward(self, model_config: Any, num_unpadded_tokens: int, ubatch_slices: Any = None) -> None:
        """Nothing that tests look at."""

    def step(self, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False) -> None:
        """Note that it was called."""
        self.own.append("step")

    def rearrange(self, is_profile: bool = False, rank_mapping: Any = None) -> None:
        """Note that it was called."""
        self.own.append("rearrange")

    def start_async_loop(self, rank_mapping: Any = None, is_profile: bool = False) -> None:
        """Note that it was called."""
        self.own.append("start_async_loop")

    def drain_async(self) -> None:
        """Note that it was called."""
        self.own.append("drain_async")

    def update_mapping(self, config: Any, expanded_physical_to_logical: Any) -> None:
        """Note that it was called."""
        self.own.append("update_mapping")

    def _sync_load_pass(self) -> list[torch.Tensor]:
        loads = [state.expert_load_pass.clone() for state in self.model_states.values()]
        for load in loads:
            dist.all_reduce(load)
        return loads


def parallel_config(use_async: bool = True, elastic: bool = False) -> Any:
    """What the state reads of ParallelConfig."""
    eplb = SimpleNamespace(
        use_async=use_async,
        window_size=4,
        step_interval=1_000_000,
        log_balancedness=False,
        log_balancedness_interval=10,
        communicator="torch_gloo",
        policy="default",
    )
    return SimpleNamespace(enable_eplb=True, enable_elastic_ep=elastic, num_ubatches=0, eplb_config=eplb)


def model_config(name: str) -> Any:
    """What the state reads of ModelConfig."""
    return SimpleNamespace(model=name, compute_hash=lambda: name)


class _Nothing:
    """Takes all arguments, has all methods, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


class _Anything(ModuleType):
    """A module in which every name is a class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


def install_modules(extra: Any, wheel: Path | None = None) -> type[Any]:
    """Put the groups and the configuration of this process where the plugin looks; returns the parent class to use.

    Args:
        extra: vLLM's additional_config.
        wheel: whose EplbState is the parent, in surroundings that do nothing; None for the stand-in.
    """
    world = dist.group.WORLD
    group = SimpleNamespace(
        cpu_group=world, device_group=world, rank_in_group=dist.get_rank(), world_size=dist.get_world_size()
    )
    config = SimpleNamespace(
        additional_config=extra,
        scheduler_config=SimpleNamespace(max_num_seqs=16),
        speculative_config=None,
    )
    names: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: config},
        "vllm.config.utils": {"compute_hash_cached": lambda config: config.compute_hash()},
        "vllm.distributed": {"get_ep_group": lambda: group},
        "vllm.distributed.parallel_state": {"get_ep_group": lambda: group, "get_eplb_group": lambda: group},
        "vllm.distributed.eplb": {},
        "vllm.distributed.eplb.eplb_communicator": {"create_eplb_communicator": lambda **kwargs: object()},
        "vllm.distributed.eplb.policy": {"EPLB_POLICIES": {"default": object}},
        "vllm.utils.gpu_sync_debug": {"gpu_sync_allowed": contextlib.nullcontext},
    }
    others = ["stateless_coordinator", "utils", "eplb.async_worker", "eplb.eplb_utils", "eplb.rebalance_execute"]
    names |= {f"vllm.distributed.{name}": {} for name in others}
    others = ["logger", "model_executor", "model_executor.models", "model_executor.models.interfaces", "platforms"]
    names |= {f"vllm.{name}": {} for name in [*others, "utils", "utils.torch_utils"]}
    for name, contents in names.items():
        sys.modules[name] = _Anything(name)
        vars(sys.modules[name]).update(contents)
    if wheel is None:
        return StandInState
    theirs: type[Any] = execute(wheel, STATE).EplbState
    return theirs

"""As much of vLLM as its EplbState needs of its surroundings, for tests without a GPU: groups, configurations, and a model.

With vLLM installed its own EplbState is used; else `StandInState`, which does by itself what the plugin leaves to its parent.
"""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from eplb_async.rank.transfer.shm import SharedWeights, share_weights

__all__ = ["ListedWeights", "StandInModel", "StandInState", "install_modules", "model_config", "parallel_config"]

EXPERTS, REDUNDANT, LAYERS, ROW = 8, 4, 3, 32


class ListedWeights(SharedWeights):
    """Layers as lists, which is what vLLM's models have."""

    def __getitem__(self, layer: int) -> Any:
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
        slots = self.num_physical_experts // num_ranks
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
        self.expert_weights = ListedWeights(shared.segment, list(shared))
        if broken:
            self.expert_weights._layers[1].pop("w2")
            self.expert_weights._layers[1]["w2"] = torch.zeros(slots + 1, 8)
        self.moe_layers: list[Any] = [SimpleNamespace(eplb_state=None) for _ in range(LAYERS)]

    def set_eplb_state(self, expert_load_view: Any, logical_to_physical_map: Any, logical_replica_count: Any) -> None:
        """Keep what a router would read."""
        self.load, self.table, self.count = expert_load_view, logical_to_physical_map, logical_replica_count

    def wrong_slots(self, slot_to_expert_LP: torch.Tensor, rank: int) -> int:
        """Slots of this rank whose bytes are not those of the expert in the map."""
        slots, wrong = self.num_local_physical_experts, 0
        for layer, (w13, w2) in enumerate(self.expert_weights):
            for slot in range(slots):
                expected = content(layer, int(slot_to_expert_LP[layer, rank * slots + slot]))
                wrong += not (torch.equal(w13[slot], expected) and torch.equal(w2[slot], expected[:8] * 2))
        return wrong

    def forward(self, hot: int, num_tokens: int) -> None:
        """Route tokens: most go to two experts. Counts slots as vLLM's kernel does: token i of an expert takes entry i % count."""
        for layer in range(LAYERS):
            experts = torch.cat([torch.full((num_tokens,), hot), torch.arange(num_tokens // 4) % EXPERTS])
            entry = torch.arange(len(experts)) % self.count[layer, experts]
            slots = self.table[layer, experts, entry]
            assert (slots >= 0).all()
            self.load[layer].index_add_(0, slots, torch.ones(len(slots), dtype=self.load.dtype))


def content(layer: int, expert: int) -> torch.Tensor:
    """The weights of an expert."""
    return torch.arange(ROW, dtype=torch.float32) + 100 * expert + 10_000 * layer


class StandInState:
    """The parts of an EplbState that the plugin's subclass leaves to its parent."""

    def __init__(self, parallel_config: Any, device: torch.device) -> None:
        self.parallel_config, self.device = parallel_config, device
        self.model_states: dict[str, Any] = {}
        self.is_async, self.expert_rearrangement_step, self.steps_of_its_own = False, 0, 0

    def add_model(self, model: Any, model_config: Any, model_name: str | None = None) -> None:
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
        pass

    def step(self, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False) -> None:
        self.steps_of_its_own += 1

    def rearrange(self, is_profile: bool = False, rank_mapping: Any = None) -> None:
        self.steps_of_its_own += 1

    def start_async_loop(self, rank_mapping: Any = None, is_profile: bool = False) -> None:
        self.steps_of_its_own += 1

    def drain_async(self) -> None:
        self.steps_of_its_own += 1

    def _sync_load_pass(self) -> list[torch.Tensor]:
        return [state.expert_load_pass for state in self.model_states.values()]


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


def install_modules(extra: dict[str, Any] | None = None) -> type[Any]:
    """Put the groups and the configuration of this process where the plugin looks; returns the parent class to use.

    Args:
        extra: vLLM's additional_config.
    """
    world = dist.group.WORLD
    group = SimpleNamespace(
        cpu_group=world, device_group=world, rank_in_group=dist.get_rank(), world_size=dist.get_world_size()
    )
    config = SimpleNamespace(
        additional_config=extra or {},
        scheduler_config=SimpleNamespace(max_num_seqs=16),
        speculative_config=None,
    )
    package, configs, distributed = ModuleType("vllm"), ModuleType("vllm.config"), ModuleType("vllm.distributed")
    vars(configs)["get_current_vllm_config_or_none"] = lambda: config
    vars(distributed)["get_ep_group"] = lambda: group
    sys.modules.update({"vllm": package, "vllm.config": configs, "vllm.distributed": distributed})
    return StandInState

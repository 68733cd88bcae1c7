"""What of vLLM the plugin touches: the releases it was checked against, and all that must be so in their sources.

When a release changes one of these, the plugin says which and leaves vLLM's own EPLB in place. To look at a release before it is used:

    scripts/check_engines vllm==0.34.0

Upstream discusses a seam of its own for balancers (vllm-project/vllm issues 49700 and 49702: who plans, who makes a layer's state, a
call when a layer is committed). What would move to it is in vllm_state.py; this file would shrink to that seam.
"""

from eplb_async.integrations.registration import Engine
from eplb_async.integrations.source_check import Calls, Constant, Expectation, Fields, Function, Instance, Uses

__all__ = ["VLLM", "expectations"]

VLLM = Engine(
    name="vLLM",
    package="vllm",
    releases=("0.26", "0.33"),
    release_of=lambda version: ".".join(version.split(".")[:2]),
)
"""Both were compared with their wheels, and their EplbState was run with the hook in it on a CPU; 0.26 also as a whole, on GPUs."""

STATE = "vllm/distributed/eplb/eplb_state.py"
V1, V2 = "vllm/v1/worker/gpu_model_runner.py", "vllm/v1/worker/gpu/eplb_utils.py"
CALLED = frozenset(
    {
        "add_model",
        "build_initial_global_physical_to_logical_map",
        "drain_async",
        "is_async",
        "model_states",
        "prepare_forward",
        "rearrange",
        "should_record_tensor",
        "start_async_loop",
        "step",
        "update_mapping",
    }
)
"""All that vLLM's code does with an EplbState outside of elastic EP."""


def expectations() -> list[Expectation]:
    """All of them; each names the place it looks at."""
    return [*_state(), *_tensors(), *_callers(), *_surroundings()]


def _state() -> list[Expectation]:
    cls = f"{STATE}:EplbState"
    return [
        Function(f"{cls}.__init__", ("self, parallel_config, device",)),
        Function(f"{cls}.add_model", ("self, model, model_config", "self, model, model_config, model_name=")),
        Function(f"{cls}.prepare_forward", ("self, model_config, num_unpadded_tokens, ubatch_slices=",)),
        Function(f"{cls}.step", ("self, is_dummy=, is_profile=, log_stats=",)),
        Function(
            f"{cls}.rearrange",
            ("self, is_profile=, rank_mapping=", "self, is_profile=, rank_mapping=, use_last_expert_load="),
        ),
        Function(f"{cls}.start_async_loop", ("self, rank_mapping=, is_profile=",)),
        Function(f"{cls}.drain_async", ("self",)),
        Function(f"{cls}._sync_load_pass", ("self",)),
        Instance(cls, ("parallel_config", "device", "model_states", "is_async", "expert_rearrangement_step")),
        Instance(cls, ("should_record_tensor",)),
        Uses(f"{cls}.__init__", ("self.model_states", "self.should_record_tensor")),
        Uses(f"{cls}.add_model", ("self.model_states[model_config.compute_hash()]",)),
        # counts are kept at every step while nobody clears the flag
        Uses(f"{cls}._propagate_shared_tensors", ("torch.ones((), dtype=torch.bool, device=self.device)",)),
        Fields(
            f"{STATE}:EplbModelState",
            (
                "physical_to_logical_map",
                "logical_to_physical_map",
                "logical_replica_count",
                "expert_load_pass",
                "expert_load_window",
                "expert_buffer",
                "model_name",
                "model",
                "communicator",
            ),
        ),
    ]


def _tensors() -> list[Expectation]:
    """Who reads the maps, and how: at addresses taken in set_eplb_state, with rows of any length."""
    router = "vllm/model_executor/layers/fused_moe/router/base_router.py"
    views = "self, moe_layer_idx, expert_load_view, logical_to_physical_map, logical_replica_count"
    return [
        Function(f"{STATE}:EplbLayerState.set_layer_state", (views,)),
        Function(
            "vllm/model_executor/models/interfaces.py:MixtureOfExperts.set_eplb_state",
            ("self, expert_load_view, logical_to_physical_map, logical_replica_count",),
        ),
        Fields(
            "vllm/model_executor/models/interfaces.py:MixtureOfExperts",
            (
                "expert_weights",
                "num_moe_layers",
                "num_expert_groups",
                "num_logical_experts",
                "num_physical_experts",
                "num_local_physical_experts",
                "num_redundant_experts",
                "set_eplb_state",
            ),
        ),
        Uses(f"{router}:_eplb_map_and_record_triton", ("logical_to_physical_map.shape[1]",)),
        Uses(f"{router}:_eplb_map_and_record_triton", ("expert_load_view.shape[0]", "logical_replica_count.shape[0]")),
        Function(
            "vllm/model_executor/layers/fused_moe/routed_experts.py:RoutedExperts.get_expert_weights",
            ("self",),
        ),
    ]


def _callers() -> list[Expectation]:
    return [
        Uses(f"{V1}:GPUModelRunner", ("EplbState(self.parallel_config, self.device)", "self.eplb_state.is_async")),
        Uses(f"{V1}:GPUModelRunner.eplb_step", ("self.eplb_state.step",)),
        Function(f"{V1}:GPUModelRunner.eplb_step", ("self, is_dummy=, is_profile=",)),
        Uses(f"{V2}:EPLBController.prepare_load", ("EplbState(self.parallel_config, self.device)",)),
        Uses(f"{V2}:EPLBController.step", ("self.state.step",)),
        # "setter": a property of that name
        Calls("vllm/v1/", ("self.eplb_state", "eplb_state", "model_runner.eplb_state"), CALLED | {"setter"}),
        Calls(V2, ("self.state",), CALLED),
    ]


def _surroundings() -> list[Expectation]:
    parallel = "vllm/distributed/parallel_state.py"
    return [
        Constant("vllm/plugins/__init__.py:DEFAULT_PLUGINS_GROUP", "vllm.general_plugins"),
        Function(f"{parallel}:get_ep_group", ("",)),
        Instance(f"{parallel}:GroupCoordinator", ("cpu_group", "rank_in_group", "world_size")),
        Function("vllm/config/vllm.py:get_current_vllm_config_or_none", ("",)),
        Fields("vllm/config/vllm.py:VllmConfig", ("additional_config", "scheduler_config", "speculative_config")),
        Fields("vllm/config/parallel.py:ParallelConfig", ("enable_eplb", "enable_elastic_ep", "eplb_config")),
        Fields("vllm/config/parallel.py:EPLBConfig", ("log_balancedness", "log_balancedness_interval")),
        Fields("vllm/config/scheduler.py:SchedulerConfig", ("max_num_seqs",)),
        Function("vllm/logger.py:init_logger", ("name",)),
    ]

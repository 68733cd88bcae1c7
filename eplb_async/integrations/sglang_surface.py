"""What of SGLang the plugin touches: the releases it was checked against, and all that must be so in their sources.

When a release changes one of these, the plugin says which and leaves SGLang's own EPLB in place. To look at a release before it is used:

    EPLB_ENGINE_WHEELS=FOLDER pytest tests/integrations/test_sglang_wheel.py         (FOLDER holds sglang-*.whl)
"""

from eplb_async.integrations.registration import Engine
from eplb_async.integrations.source_check import Calls, Expectation, Fields, Function, Instance, Uses

__all__ = ["SGLANG", "WEIGHT_CHANGES", "expectations"]

SGLANG = Engine(
    name="SGLang",
    package="sglang",
    releases=("0.5.23",),
    release_of=lambda version: version.partition("+")[0],
)
"""Compared with its wheel; not run on GPUs."""

WEIGHT_CHANGES = {
    "update_weights_from_disk": "self, model_path, load_format, weight_name_filter=, recapture_cuda_graph=",
    "load_weights_from_distributed": "self, named_tensors",
    "update_weights_from_tensor": "self, named_tensors, load_format=",
    "update_weights_from_ipc": "self, recv_req",
    "begin_weight_update": "self",
}
"""Methods of WeightUpdater after which weights are others, with their parameters. All else there calls or is called by these."""

OTHER_UPDATES = (
    "destroy_weights_update_group",
    "end_weight_update",
    "init_weights_update_group",
    "receive_weights_from_distributed",
)
EPLB, RUNNER = "sglang/srt/eplb", "sglang/srt/model_executor/model_runner.py"
UPDATER = "sglang/srt/model_executor/model_runner_components/weight_updater.py"
ELASTIC = ("sglang/srt/elastic_ep/",)


def expectations() -> list[Expectation]:
    """All of them; each names the place it looks at."""
    return [*_balancer(), *_callers(), *_maps(), *_counts(), *_weights(), *_surroundings()]


def _balancer() -> list[Expectation]:
    cls = f"{EPLB}/eplb_manager.py:EPLBManager"
    getters = "get_model, get_expert_location_updater, get_expert_backup_client, get_weight_updater"
    return [
        Function(f"{cls}.__init__", (f"self, *, model_config, {getters}",)),
        Function(f"{cls}.on_forward_pass_end", ("self",)),
        Function(f"{cls}.reset_generator", ("self",)),
        Function(f"{cls}.disable_rebalance", ("self, reason",)),
        Function(f"{cls}.enable_rebalance", ("self",)),
        Function(f"{cls}.rebalance", ("self",)),
        Instance(cls, ("_get_model", "_model_config")),
        # counts of a pass are kept from the beginning
        Uses(f"{cls}.__init__", ("get_global_expert_distribution_recorder().start_record()",)),
        # when its own balancing takes over, it begins from the maps as they are
        Uses(
            f"{EPLB}/expert_location_updater.py:ExpertLocationUpdater.update",
            ("get_global_expert_location_metadata()",),
        ),
    ]


def _callers() -> list[Expectation]:
    known = frozenset({"disable_rebalance", "enable_rebalance", "on_forward_pass_end", "rebalance", "reset_generator"})
    forward = (
        "self, forward_batch, skip_attn_backend_init=, pp_proxy_tensors=, reinit_attn_backend=, split_forward_count="
    )
    return [
        Function(f"{RUNNER}:ModelRunner.initialize", ("self",)),
        Function(f"{RUNNER}:ModelRunner.forward", (forward,)),
        Uses(
            f"{RUNNER}:ModelRunner.initialize",
            ("self.maybe_init_expert_location_metadata()", "self.maybe_init_eplb_manager()", "self.load_model()"),
        ),
        Uses(
            f"{RUNNER}:ModelRunner.maybe_init_eplb_manager",
            ("get_exec().moe.enable_eplb and (not self.is_draft_worker)", "lambda: self.model"),
        ),
        Uses(
            f"{RUNNER}:ModelRunner.forward",
            ("self.eplb_manager.on_forward_pass_end()", "should_advance_eplb_counter(forward_batch)"),
        ),
        # memory is given to the KV cache, and graphs are captured, in calls of their own after the constructor
        Function(f"{RUNNER}:ModelRunner.alloc_memory_pool", ("self, memory_pool_config=, *, draft_parallel_layout=",)),
        Function(f"{RUNNER}:ModelRunner.init_cuda_graphs", ("self, capture_decode_cuda_graph=",)),
        Calls("sglang/srt/", ("self.eplb_manager", "eplb_manager", "self.tp_worker.model_runner.eplb_manager"), known),
        Fields("sglang/srt/model_executor/forward_batch_info.py:ForwardBatch", ("forward_mode", "input_ids")),
        Fields("sglang/srt/model_executor/forward_batch_info.py:ForwardBatch", ("is_extend_in_batch",)),
        Fields(
            "sglang/srt/model_executor/forward_batch_info.py:ForwardMode",
            ("EXTEND", "DECODE", "MIXED", "IDLE", "TARGET_VERIFY", "SPLIT_PREFILL", "DLLM_EXTEND"),
        ),
    ]


def _maps() -> list[Expectation]:
    cls, dispatch = f"{EPLB}/expert_location.py:ExpertLocationMetadata", f"{EPLB}/expert_location_dispatch.py"
    tensors = (
        "physical_to_logical_map",
        "physical_to_logical_map_cpu",
        "logical_to_all_physical_map",
        "logical_to_all_physical_map_cpu",
        "logical_to_all_physical_map_num_valid",
        "logical_to_rank_dispatch_physical_map",
    )
    return [
        Fields(cls, (*tensors, "ep_size", "num_layers", "num_logical_experts", "num_physical_experts")),
        # its own updates keep the tensors, so that graphs see them: ours may, too
        Uses(f"{cls}.update", ("self_field[...]",)),
        # K entries fit into a row
        Uses(f"{cls}._init_raw", ("(0, num_physical_experts - logical_to_all_physical_map.shape[-1])",)),
        Function(f"{EPLB}/expert_location.py:get_global_expert_location_metadata", ("",)),
        Function(f"{EPLB}/expert_location.py:ModelConfigForExpertLocation.from_model_config", ("model_config",)),
        Fields(
            f"{EPLB}/expert_location.py:ModelConfigForExpertLocation",
            ("num_layers", "num_logical_experts", "num_groups"),
        ),
        Uses(
            f"{dispatch}:ExpertLocationDispatchInfo.init_new",
            (
                "expert_location_metadata.logical_to_all_physical_map[layer_id, :]",
                "expert_location_metadata.logical_to_all_physical_map_num_valid[layer_id, :]",
                "expert_location_metadata.logical_to_rank_dispatch_physical_map[layer_id, :]",
            ),
        ),
        # entries may repeat: one is picked by its place, of as many as are valid
        Uses(
            f"{dispatch}:_topk_ids_logical_to_physical_dynamic",
            (
                "info.partial_logical_to_all_physical_map_num_valid[topk_ids]",
                "row_index % num_valid",
                "info.partial_logical_to_all_physical_map[topk_ids, chosen_dispatch_index]",
            ),
        ),
        Uses(
            f"{dispatch}:_topk_ids_logical_to_physical_static",
            ("info.partial_logical_to_rank_dispatch_physical_map[topk_ids]",),
        ),
        Uses(
            f"{dispatch}:topk_ids_logical_to_physical",
            ("['dynamic', 'fake']", "info.ep_dispatch_algorithm == 'static'"),
        ),
    ]


def _counts() -> list[Expectation]:
    file = f"{EPLB}/expert_distribution.py"
    real, on_device = f"{file}:_ExpertDistributionRecorderReal", f"{file}:_LayerBasedGpuSinglePassGatherer"
    return [
        Function(f"{file}:get_global_expert_distribution_recorder", ("",)),
        Instance(real, ("_single_pass_gatherers",)),
        # cleared when a pass begins, copied when it ends: in between lie on_forward_pass_end and we
        Uses(f"{real}._on_forward_pass_start", ("gatherer.reset()",)),
        Uses(f"{real}._on_forward_pass_end", ("gatherer.collect()",)),
        # captured forwards count, too
        Uses(f"{real}._on_hook", ("torch.get_device_module().is_current_stream_capturing()",)),
        Instance(on_device, ("_data",)),
        Uses(f"{on_device}.__init__", ("torch.int", "self._expert_location_metadata.num_layers")),
        Uses(f"{on_device}.reset", ("self._data[...]",)),
        Uses(f"{file}:_SelectExpertsSinglePassGatherer.on_select_experts", ("self._data[layer_idx, :]",)),
        Uses(
            f"{file}:_DeepepLowLatencySinglePassGatherer.on_deepep_dispatch_low_latency", ("self._data[layer_idx, :]",)
        ),
    ]


def _weights() -> list[Expectation]:
    cls = f"{UPDATER}:WeightUpdater"
    known = frozenset({*WEIGHT_CHANGES, *OTHER_UPDATES})
    return [
        *[Function(f"{cls}.{name}", (parameters,)) for name, parameters in WEIGHT_CHANGES.items()],
        Fields(cls, ("get_model_runner",)),
        Calls("sglang/srt/", ("runner.weight_updater", "self.model_runner.weight_updater"), known),
        Function("sglang/srt/utils/common.py:LazyValue.__getattr__", ("self, name",)),
        Function("sglang/srt/utils/common.py:LazyValue.__getitem__", ("self, key",)),
        Uses(
            f"{EPLB}/eplb_manager.py:EPLBManager._compute_update_layer_ids_chunks",
            ("self._get_model().routed_experts_weights_of_layer.keys()",),
        ),
    ]


def _surroundings() -> list[Expectation]:
    registry = "sglang/srt/plugins/hook_registry.py"
    fields = "sglang/srt/arg_groups/fields"
    moe = ("ep_dispatch_algorithm", "enable_eplb", "elastic_ep_backend", "moe_a2a_backend")
    return [
        Function(f"{registry}:HookRegistry.register", ("cls, target, hook, hook_type=, *, source=",)),
        Function(f"{registry}:HookRegistry.apply_hooks", ("cls",)),
        Fields(f"{registry}:HookRegistry", ("_hooks", "_patched")),
        Fields(f"{registry}:HookSource", ("plugin_name", "dist_name")),
        Fields(f"{registry}:HookType", ("BEFORE", "AFTER", "REPLACE")),
        *[
            Function(f"sglang/srt/runtime_context.py:{name}", ("",))
            for name in ("get_exec", "get_model", "get_parallel", "get_disagg")
        ],
        Instance("sglang/srt/distributed/parallel_state.py:GroupCoordinator", ("cpu_group", "world_size")),
        Fields(f"{fields}/exec_.py:ExecMoe", moe),
        Fields(f"{fields}/exec_.py:ExecFeatures", ("enable_memory_saver",)),
        Fields(f"{fields}/model.py:Model", ("is_startup_weight_load_overlap", "weight_cache_mode")),
        Fields(f"{fields}/disagg.py:Disagg", ("enable_pdmux",)),
    ]

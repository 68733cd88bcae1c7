"""The plugin's expectations on a released SGLang: EPLB_ENGINE_WHEELS names a folder that holds its wheel (or there is nothing to test).

Classes of the wheel that need no GPU are also run.
"""

import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eplb_async.integrations.sglang_maps import MetadataMirror
from eplb_async.integrations.sglang_surface import WEIGHT_CHANGES, expectations
from eplb_async.integrations.source_check import SourceTree, problems
from tests.integrations.wheels import changed, execute, needs, of_engine
from tests.rank.solo import SOLO, attached

PATTERN = "sglang-[0-9]*.whl"
WHEELS = of_engine(PATTERN)
pytestmark = needs(PATTERN)

EPLB, RUNNER = "sglang/srt/eplb", "sglang/srt/model_executor/model_runner.py"
SCHEDULER = "sglang/srt/managers/scheduler.py"
REGISTRY, LOCATION = "sglang.srt.plugins.hook_registry", "sglang.srt.eplb.expert_location"
DISPATCH = "sglang.srt.eplb.expert_location_dispatch"
DRIFTS = {
    "a renamed method": (f"{EPLB}/eplb_manager.py", "def on_forward_pass_end(self)", "def on_pass_end(self)"),
    "a new parameter": (
        f"{EPLB}/eplb_manager.py",
        "disable_rebalance(self, reason: str)",
        "disable_rebalance(self, reason, now)",
    ),
    "a new use": (SCHEDULER, "eplb_manager.disable_rebalance(", "eplb_manager.pause("),
    "another condition": (RUNNER, "get_exec().moe.enable_eplb and", "get_exec().moe.enable_balancing and"),
    "a tensor gone": (
        f"{EPLB}/expert_location.py",
        "    logical_to_all_physical_map_num_valid: torch.Tensor",
        "    x: torch.Tensor",
    ),
    "tensors replaced": (f"{EPLB}/expert_location.py", "self_field[...] = ", "self_field = "),
    "counts elsewhere": (f"{EPLB}/expert_distribution.py", "self._data = torch.zeros(", "self._numbers = torch.zeros("),
    "another pick": (f"{EPLB}/expert_location_dispatch.py", "row_index % num_valid", "row_index % 2"),
    "another updater": (
        "sglang/srt/model_executor/model_runner_components/weight_updater.py",
        "def begin_weight_update(self: WeightUpdater)",
        "def begin_weight_update(self: WeightUpdater, tag)",
    ),
    "a setting gone": ("sglang/srt/arg_groups/fields/disagg.py", "    enable_pdmux: A[", "    pdmux: A["),
    "another registry": ("sglang/srt/plugins/hook_registry.py", "def apply_hooks(cls)", "def apply_hooks(cls, names)"),
    "a file gone": (f"{EPLB}/eplb_manager.py", "class EPLBManager", "class Balancer"),
}


def test_the_release_is_what_is_expected() -> None:
    """Nothing that the plugin touches is otherwise."""
    assert problems(SourceTree.of_wheel(WHEELS[-1]), expectations()) == []


@pytest.mark.parametrize("name", DRIFTS)
def test_each_kind_of_drift_is_found(name: str) -> None:
    """One change in one source, of each kind, is reported with the place where it is."""
    path, old, new = DRIFTS[name]
    found = problems(changed(WHEELS[-1], path, old, new), expectations())
    assert any(path in problem for problem in found), found


def test_the_release_registers_and_applies_our_hooks() -> None:
    """SGLang's own HookRegistry, in a fresh interpreter with stand-ins for the rest, puts all hooks where they belong."""
    probe = f"""
import sys, types, zipfile
from importlib import import_module
from tests.integrations import sglang_stand_in
from eplb_async.integrations import sglang_plugin
module = types.ModuleType({REGISTRY!r})
sys.modules[{REGISTRY!r}] = module
exec(compile(zipfile.ZipFile({str(WHEELS[-1])!r}).read({REGISTRY.replace(".", "/") + ".py"!r}), "registry", "exec"), module.__dict__)
sglang_stand_in.install(None)
sglang_plugin._misfit = lambda: ""
sglang_plugin.register()
runner = import_module("sglang.srt.model_executor.model_runner")
owner = import_module("sglang.srt.eplb.eplb_manager")
updater = sglang_stand_in.WeightUpdater
assert runner.EPLBManager is owner.EPLBManager
assert runner.EPLBManager.eplb_async_complete
assert all(hasattr(getattr(runner.ModelRunner, name), "__wrapped__") for name in ("initialize", "forward"))
assert all(hasattr(getattr(updater, name), "__wrapped__") for name in {tuple(WEIGHT_CHANGES)!r})
assert not module.HookRegistry._hooks and not module.HookRegistry._patched
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def test_the_releases_metadata_and_dispatch_follow_the_hook(
    group: str, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's ExpertLocationMetadata, made by its own code, takes the hook's maps, and its dispatch finds each expert's slots."""
    moe = SimpleNamespace(ep_dispatch_algorithm="static", moe_a2a_backend="deepep", ep_join_mode=None)
    runtime: Any = types.ModuleType("sglang.srt.runtime_context")
    resources = SimpleNamespace(expert_location_metadata=None)
    runtime.get_exec, runtime.get_resources = lambda: SimpleNamespace(moe=moe), lambda: resources
    runtime.get_parallel = runtime.get_device = lambda: SimpleNamespace(ep_size=1, nnodes=1, device="cpu")
    monkeypatch.setitem(sys.modules, runtime.__name__, runtime)
    elastic: Any = types.ModuleType("sglang.srt.elastic_ep.elastic_ep")
    elastic.elastic_expanded_world_enabled = lambda: False
    monkeypatch.setitem(sys.modules, elastic.__name__, elastic)
    for name in (LOCATION, DISPATCH):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # which restores what was there
    location, dispatch = execute(WHEELS[-1], LOCATION), execute(WHEELS[-1], DISPATCH)
    with attached(group, runtime_dir) as (hook, _):
        experts = SOLO.num_experts
        table = torch.arange(experts).view(1, experts, 1).repeat(3, 1, 1)
        slots = torch.arange(SOLO.num_slots).repeat(3, 1) % experts
        resources.expert_location_metadata = metadata = location.ExpertLocationMetadata._init_raw(1, slots, table, 0)
        MetadataMirror(metadata, hook, [0, 2])
        assert metadata.logical_to_all_physical_map[2].tolist()[0] == [0, 4, -1, -1, -1, -1]
        assert metadata.logical_to_all_physical_map[1].tolist()[0] == [0, -1, -1, -1, -1, -1]
        assert metadata.logical_to_all_physical(2, 1) == [1, 5]
        tokens = torch.arange(experts).repeat(6, 1)
        for moe.ep_dispatch_algorithm, moe.moe_a2a_backend in (("dynamic", "none"), ("static", "deepep")):
            info = dispatch.ExpertLocationDispatchInfo.init_new(2)
            picked = dispatch.topk_ids_logical_to_physical(tokens, info)
            assert torch.equal(hook.slot_to_expert_LP[1][picked], tokens)
            assert len(picked[:, 0].unique()) == (2 if moe.ep_dispatch_algorithm == "dynamic" else 1)

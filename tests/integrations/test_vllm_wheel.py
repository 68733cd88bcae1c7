"""The plugin's expectations on released vLLMs: EPLB_ENGINE_WHEELS names a folder that holds their wheels (or there is nothing to test)."""

from pathlib import Path

import pytest

from eplb_async.integrations.source_check import SourceTree, problems
from eplb_async.integrations.vllm_surface import expectations
from tests.integrations.wheels import changed, needs, of_engine

PATTERN = "vllm-[0-9]*.whl"
WHEELS = of_engine(PATTERN)
pytestmark = needs(PATTERN)

EPLB, V1 = "vllm/distributed/eplb/eplb_state.py", "vllm/v1/worker/gpu_model_runner.py"
V2 = "vllm/v1/worker/gpu/eplb_utils.py"
CONFIG, ROUTER = "vllm/config", "vllm/model_executor/layers/fused_moe/router/base_router.py"
INTERFACES = "vllm/model_executor/models/interfaces.py"
DRIFTS = {
    "a renamed method": (EPLB, "def prepare_forward(", "def prepare(", "EplbState.prepare_forward"),
    "a method that takes more": (
        EPLB,
        "log_stats: bool = False,\n    ) -> None",
        "tag=0\n) -> None",
        "EplbState.step takes",
    ),
    "another class": (EPLB, "class EplbState:", "class ExpertState:", "has no EplbState"),
    "a field gone": (
        EPLB,
        "    expert_load_pass: torch.Tensor",
        "    loads: torch.Tensor",
        "EplbModelState has no expert_load_pass",
    ),
    "states kept elsewhere": (
        EPLB,
        "self.model_states[model_config.compute_hash()] =",
        "self.states[0] =",
        "EplbState.add_model has no",
    ),
    "counts off at first": (
        EPLB,
        "torch.ones(\n                (), dtype=torch.bool",
        "torch.zeros(\n                (), dtype=torch.bool",
        "_propagate_shared_tensors",
    ),
    "a new use by a caller": (V1, "self.eplb_state.step(", "self.eplb_state.advance(", "uses self.eplb_state.advance"),
    "a new use by the new runner": (V2, "self.state.prepare_forward(", "self.state.begin(", "uses self.state.begin"),
    "another way to make it": (V1, "EplbState(", "EplbState.made(", "GPUModelRunner has no"),
    "maps read otherwise": (
        ROUTER,
        "logical_to_physical_map.shape[1]",
        "MAX_REPLICAS",
        "_eplb_map_and_record_triton has no",
    ),
    "a model that says less": (
        INTERFACES,
        "    num_logical_experts: int",
        "    num_routed: int",
        "MixtureOfExperts has no num_logical_experts",
    ),
    "views given otherwise": (
        INTERFACES,
        "        logical_replica_count: Tensor,\n",
        "        counts: Tensor,\n",
        "set_eplb_state takes",
    ),
    "another group of plugins": (
        "vllm/plugins/__init__.py",
        '"vllm.general_plugins"',
        '"vllm.plugins"',
        "known: 'vllm.general_plugins'",
    ),
    "a setting gone": (
        f"{CONFIG}/parallel.py",
        "    enable_elastic_ep: bool",
        "    elastic: bool",
        "ParallelConfig has no enable_elastic_ep",
    ),
    "no room for our settings": (
        f"{CONFIG}/vllm.py",
        "    additional_config: ",
        "    more_config: ",
        "VllmConfig has no additional_config",
    ),
    "another group of ranks": (
        "vllm/distributed/parallel_state.py",
        "def get_ep_group()",
        "def get_ep_group(pool)",
        "get_ep_group takes (pool)",
    ),
}


@pytest.fixture(params=WHEELS, ids=lambda wheel: wheel.name.split("-")[1])
def wheel(request: pytest.FixtureRequest) -> Path:
    """Each of the wheels."""
    path: Path = request.param
    return path


def test_the_release_is_what_is_expected(wheel: Path) -> None:
    """Nothing that the plugin touches is otherwise."""
    assert problems(SourceTree.of_wheel(wheel), expectations()) == []


@pytest.mark.parametrize("name", DRIFTS)
def test_each_kind_of_drift_is_found(wheel: Path, name: str) -> None:
    """One change in one source, of each kind, is reported with the place where it is."""
    path, old, new, words = DRIFTS[name]
    touched = [e for e in expectations() if e.place.startswith(path) or path.startswith(e.place)]
    found = problems(changed(wheel, path, old, new), touched)
    assert found
    assert all(path in problem for problem in found), found
    assert any(words in problem for problem in found), found

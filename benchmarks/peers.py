"""Policies of other engines, wrapped so that benchmarks and tests can plan with them as with our own.

Their code is not part of this repository: unpack the wheels of vllm, sglang or vllm-ascend side by side in a folder (a
wheel is a zip archive) and name the folder. Only the files below are imported, by path, with stand-ins for the modules of
an accelerator's runtime, which last as long as the import does.

    name            file                                                plans from
    vllm            vllm/distributed/eplb/policy/default.py             the sum of the windows, the live placement
    sglang          sglang/srt/eplb/eplb_algorithms/deepseek.py         the sum of the windows (DeepSeek's own code)
    sglang-vec      sglang/srt/eplb/eplb_algorithms/deepseek_vec.py     the windows
    ascend-default  vllm_ascend/eplb/core/policy/policy_default_eplb.py   the sum, per slot of the live placement
    ascend-swift    .../policy_swift_balancer.py (SwiftBalancer)        the same
    ascend-flashlb  .../policy_flashlb.py (FlashLB; needs scipy)        the windows, per slot, and what it saw before

Each is called as its engine calls it. What differs from a policy of ours: results are not checked (the registry's
`run_loaded` does), an input on which the peer fails is a PolicyError with its message, and live placements with empty slots
are refused for those of vllm-ascend, which have no such thing. vllm-ascend's engine keeps the live row of a layer whose plan
puts an expert on a rank twice; here such a plan stands as it is. In 0.23 it also ignores FlashLB's list of layers, which is
what `all_layers` does.

Timing: torch has one thread while a peer plans; FlashLB also uses numpy's BLAS, which takes every core unless
OPENBLAS_NUM_THREADS=1 is in the environment. The conversion to and from torch is inside what is timed, about a millisecond on
75 layers of 288 slots for those of vllm-ascend, less for others.
"""

import copy
import importlib
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numba
import numpy as np
import torch
from numpy.typing import NDArray

from eplb_async.core.errors import ConfigError, PolicyError
from eplb_async.core.placement import replica_count
from eplb_async.core.spec import Topology
from eplb_async.policies.base import Policy, PolicyFunction

__all__ = ["PEER_FILES", "FlashLBOptions", "PeerOptions", "SwiftOptions", "load_peers", "slot_loads"]

PEER_FILES = {
    "vllm": "vllm/distributed/eplb/policy/default.py",
    "sglang": "sglang/srt/eplb/eplb_algorithms/deepseek.py",
    "sglang-vec": "sglang/srt/eplb/eplb_algorithms/deepseek_vec.py",
    "ascend-default": "vllm_ascend/eplb/core/policy/policy_default_eplb.py",
    "ascend-swift": "vllm_ascend/eplb/core/policy/policy_swift_balancer.py",
    "ascend-flashlb": "vllm_ascend/eplb/core/policy/policy_flashlb.py",
}
"""Where in a wheel each peer is."""

SUMMARIES = {
    "vllm": "vLLM's DefaultEplbPolicy",
    "sglang": "SGLang's deepseek, which is DeepSeek's published code",
    "sglang-vec": "SGLang's deepseek_vec",
    "ascend-default": "vllm-ascend's DefaultEplb",
    "ascend-swift": "vllm-ascend's SwiftBalanceEplb",
    "ascend-flashlb": "vllm-ascend's FlashLB",
}

STATES_KEPT = 64
"""FlashLB objects that are kept for later calls; an older state token starts anew, as a lost one does."""

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]
Planner = Callable[[FloatArray, IntArray, Topology, Any, bytes], tuple[NDArray[Any], bytes]]


class PeerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A peer without settings."""


class SwiftOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of SwiftBalancer.

    Fields:
        inside_nodes: redundant copies and swaps stay inside a node; its engine never asks for that.
    """

    inside_nodes: bool = False


class FlashLBOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of FlashLB.

    Fields:
        all_layers: deploy every layer that it planned; else only those in its list of priorities (planned to get better).
    """

    all_layers: bool = False


def load_peers(folder: Path) -> dict[str, Policy]:
    """Every peer that is somewhere under the folder, by name.

    Raises:
        ConfigError: no folder, no peer in it, the same peer twice, or one that cannot be imported (FlashLB without scipy).
    """
    if not folder.is_dir():
        raise ConfigError(f"peers in {folder}", "is not a folder; unpack the peers' wheels into one")
    found = {name: sorted(folder.rglob(file)) for name, file in PEER_FILES.items()}
    for name, paths in found.items():
        if len(paths) > 1:
            raise ConfigError(f"peers in {folder}", f"{name} is there twice, {paths[0]} and {paths[1]}; leave one")
    peers = {name: _wrap(name, paths[0]) for name, paths in found.items() if paths}
    if not peers:
        raise ConfigError(f"peers in {folder}", f"none is there; looked for {', '.join(PEER_FILES.values())}")
    return peers


def slot_loads(windows_TLE: FloatArray, slot_to_expert_LP: IntArray, topology: Topology) -> FloatArray:
    """Tokens of each slot when an expert's tokens are split evenly over its slots.

    Load [[[6, 2]]] in slots [[0, 1, 0]] of one rank: [[[[3, 2, 3]]]].

    Returns:
        float64 [T, L, R, S].

    Raises:
        ValueError: a slot is empty.
    """
    if (slot_to_expert_LP < 0).any():
        raise ValueError("it cannot start from a live placement with empty slots")
    share_TLE = windows_TLE / replica_count(slot_to_expert_LP, windows_TLE.shape[2])
    load_TLP = np.take_along_axis(share_TLE, slot_to_expert_LP[None].astype(np.int64), axis=2)
    return load_TLP.reshape(*load_TLP.shape[:2], topology.num_ranks, topology.slots_per_rank)


def _wrap(name: str, path: Path) -> Policy:
    module = _import_peer(name, path)
    planner, options_type = _PLANNERS[name]
    plan = planner(module)

    def function(
        windows_TLE: FloatArray, slot_to_expert_LP: IntArray, topology: Topology, options: Any, state: bytes
    ) -> tuple[IntArray, bytes]:
        try:
            with _no_warnings(), _one_thread():
                placement, next_state = plan(windows_TLE, slot_to_expert_LP, topology, options, state)
            placement_LP = np.asarray(placement).reshape(slot_to_expert_LP.shape).astype(np.int32)
        except Exception as error:
            raise PolicyError(name, f"(a peer) raised {type(error).__name__}: {error}") from error
        return placement_LP, next_state

    def warm_up() -> None:
        """Plan a small case, for whatever the peer compiles with its first plan."""
        topology = Topology(num_ranks=4, slots_per_rank=5)
        windows_TLE = np.random.default_rng(0).lognormal(size=(2, 2, 16))
        live_LP = np.tile(np.arange(20, dtype=np.int32) % 16, (2, 1))
        function(windows_TLE, live_LP, topology, options_type(), b"")

    typed: PolicyFunction = function
    return Policy(name=name, function=typed, options_type=options_type, summary=SUMMARIES[name], warm_up=warm_up)


def _vllm(module: ModuleType) -> Planner:
    def plan(
        windows_TLE: FloatArray, live_LP: IntArray, topology: Topology, options: PeerOptions, state: bytes
    ) -> tuple[NDArray[Any], bytes]:
        load_LE, live = torch.from_numpy(windows_TLE.sum(axis=0)), torch.from_numpy(live_LP.astype(np.int64))
        groups, nodes = topology.num_expert_groups, topology.num_nodes
        placement = module.DefaultEplbPolicy.rebalance_experts(
            load_LE, topology.num_slots, groups, nodes, topology.num_ranks, live
        )
        return placement.numpy(), state

    return plan


def _sglang(module: ModuleType) -> Planner:
    def plan(
        windows_TLE: FloatArray, live_LP: IntArray, topology: Topology, options: PeerOptions, state: bytes
    ) -> tuple[NDArray[Any], bytes]:
        load_LE, groups, nodes = (
            torch.from_numpy(windows_TLE.sum(axis=0)),
            topology.num_expert_groups,
            topology.num_nodes,
        )
        placement, _, _ = module.rebalance_experts(
            load_LE, topology.num_slots, groups, nodes, topology.num_ranks, enable_hierarchical=groups % nodes == 0
        )
        return placement.numpy(), state

    return plan


def _sglang_vec(module: ModuleType) -> Planner:
    def plan(
        windows_TLE: FloatArray, live_LP: IntArray, topology: Topology, options: PeerOptions, state: bytes
    ) -> tuple[NDArray[Any], bytes]:
        # float32, which is what its divisions of integer counts give
        windows, groups, nodes = torch.from_numpy(windows_TLE).float(), topology.num_expert_groups, topology.num_nodes
        placement, _, _ = module.rebalance_experts(
            windows, topology.num_slots, topology.slots_per_rank, groups, nodes, enable_hierarchical=groups % nodes == 0
        )
        return placement.numpy(), state

    return plan


def _ascend_default(module: ModuleType) -> Planner:
    def plan(
        windows_TLE: FloatArray, live_LP: IntArray, topology: Topology, options: PeerOptions, state: bytes
    ) -> tuple[NDArray[Any], bytes]:
        load_LRS = slot_loads(windows_TLE.sum(axis=0, keepdims=True), live_LP, topology)[0]
        _, _, placement = module.DefaultEplb().rebalance_experts(_tables(live_LP, topology), torch.from_numpy(load_LRS))
        return _rectangular(placement, load_LRS), state

    return plan


def _ascend_swift(module: ModuleType) -> Planner:
    def plan(
        windows_TLE: FloatArray, live_LP: IntArray, topology: Topology, options: SwiftOptions, state: bytes
    ) -> tuple[NDArray[Any], bytes]:
        load_LRS = slot_loads(windows_TLE.sum(axis=0, keepdims=True), live_LP, topology)[0]
        # it asks torch's accelerator for the ranks of a node; nothing else of torch is used while it plans
        ranks_per_node = topology.ranks_per_node
        module.torch = SimpleNamespace(npu=SimpleNamespace(device_count=lambda: ranks_per_node))  # type: ignore[attr-defined]
        _, _, placement = module.SwiftBalanceEplb().rebalance_experts(
            _tables(live_LP, topology), torch.from_numpy(load_LRS), is_node_redundant=options.inside_nodes
        )
        return _rectangular(placement, load_LRS), state

    return plan


def _ascend_flashlb(module: ModuleType) -> Planner:
    """FlashLB remembers loads and balances in its object. Tokens stand for such objects here, so this is not pure: a token
    means nothing in another process. Each call works on a copy, so a token can be used again. All windows of one sequence
    of calls must be as many as in its first.
    """
    kept: dict[bytes, Any] = {}
    numbers = itertools.count(1)

    def plan(
        windows_TLE: FloatArray, live_LP: IntArray, topology: Topology, options: FlashLBOptions, state: bytes
    ) -> tuple[NDArray[Any], bytes]:
        module.get_dynamic_eplb_group = lambda: SimpleNamespace(world_size=topology.num_ranks)  # type: ignore[attr-defined]
        flashlb = copy.deepcopy(kept[state]) if state in kept else module.FlashLB()
        load_TLRS = slot_loads(windows_TLE, live_LP, topology)
        _, layers, planned_LRS = flashlb.rebalance_experts(_tables(live_LP, topology), torch.from_numpy(load_TLRS))
        planned_LP = _rectangular(planned_LRS, load_TLRS[0]).reshape(live_LP.shape)
        placement_LP = live_LP.copy()
        deployed = slice(None) if options.all_layers else layers
        placement_LP[deployed] = planned_LP[deployed]
        token = str(next(numbers)).encode()
        kept[token] = flashlb
        if len(kept) > STATES_KEPT:
            del kept[next(iter(kept))]
        return placement_LP, token

    return plan


_PLANNERS: dict[str, tuple[Callable[[ModuleType], Planner], type[msgspec.Struct]]] = {
    "vllm": (_vllm, PeerOptions),
    "sglang": (_sglang, PeerOptions),
    "sglang-vec": (_sglang_vec, PeerOptions),
    "ascend-default": (_ascend_default, PeerOptions),
    "ascend-swift": (_ascend_swift, SwiftOptions),
    "ascend-flashlb": (_ascend_flashlb, FlashLBOptions),
}


def _tables(live_LP: IntArray, topology: Topology) -> torch.Tensor:
    """The live placement as vllm-ascend has it, int64 [L, R, S]."""
    shape = (len(live_LP), topology.num_ranks, topology.slots_per_rank)
    return torch.from_numpy(live_LP.astype(np.int64)).reshape(shape)


def _rectangular(placement: Any, like_LRS: FloatArray) -> NDArray[Any]:
    """The planned tables as an array; raises ValueError where ranks got more or fewer experts than they have slots."""
    if any(len(rank) != like_LRS.shape[2] for layer in placement for rank in layer):
        raise ValueError(f"it gave a rank more or fewer experts than its {like_LRS.shape[2]} slots")
    return np.array(placement)


def _import_peer(name: str, path: Path) -> ModuleType:
    """The module of a file, which may import its neighbours relatively; nothing of it stays in `sys.modules`."""
    package = ModuleType(f"_peer_{name.replace('-', '_')}")
    package.__path__ = [str(path.parent)]
    modules = {package.__name__: package, **_runtime_stand_ins()}
    with _in_sys_modules(modules), _no_warnings():
        try:
            return importlib.import_module(f"{package.__name__}.{path.stem}")
        except ImportError as error:
            if (error.name or "").partition(".")[0] == "scipy":
                raise ConfigError(f"peer {path}", "imports scipy, which is not installed; pip install scipy") from error
            raise ConfigError(f"peer {path}", f"cannot be imported: {error}") from error


def _runtime_stand_ins() -> dict[str, ModuleType]:
    """The least that the peers import and this machine may not have. What they are asked for while planning, the wrappers
    set for each plan.
    """
    contents: Mapping[str, dict[str, object]] = {
        "numba": {"njit": _njit_without_cache},
        "torch_npu": {},
        "vllm": {"__path__": []},
        "vllm.logger": {"logger": logging.getLogger("peers")},
        "vllm_ascend": {"__path__": []},
        "vllm_ascend.distributed": {"__path__": []},
        "vllm_ascend.distributed.parallel_state": {"get_dynamic_eplb_group": None},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, module in modules.items():
        module.__dict__.update(contents[name])
    return modules


def _njit_without_cache(*args: Any, cache: bool = False, **options: Any) -> Any:
    """The njit of numba; what it caches on disk names the module, which a later process could not import."""
    return numba.njit(*args, **options)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """What a peer is warned of (deprecated calls, divisions by zero) is its authors' concern, and no error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Policies are compared on one core; more of torch's threads would wait for one another on a machine that has work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _in_sys_modules(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """Put modules in `sys.modules` for a while; what stood there returns, and what was imported below them goes."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith("_peer_")]:
            del sys.modules[name]
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(before)

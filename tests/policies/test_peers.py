"""Other engines' policies: how they are found and driven, what ours shares with them, and their defects, which ours lacks.

Loading is tested with files written here. The rest needs the peers' own code, in the folder that EPLB_PEERS names.
"""

import os
import sys
import time
from pathlib import Path
from textwrap import dedent

import msgspec
import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import peers as module
from benchmarks.peers import PEER_FILES, PeerOptions, load_peers, slot_loads
from benchmarks.policy_cases import Case, chosen_cases
from eplb_async.core.errors import ConfigError, PolicyError
from eplb_async.core.placement import initial_placement, replica_count
from eplb_async.core.score import windows_par
from eplb_async.core.spec import MoESpec, Topology
from eplb_async.policies.base import Policy
from eplb_async.policies.default import DefaultOptions, default
from eplb_async.policies.registry import run_loaded, run_policy
from eplb_async.testing import ranks_with_duplicates
from tests.policies import twins

TRACES = Path(os.environ.get("EPLB_TRACES", Path(__file__).resolve().parents[2] / "../shared/traces"))
PEERS = os.environ.get("EPLB_PEERS", "")

needs_peers = pytest.mark.skipif(not PEERS, reason="EPLB_PEERS names no folder of unpacked peers")
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the recorded traces are not here")

SGLANG = """
    import torch

    def rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus, enable_hierarchical):
        row = torch.arange(num_replicas) % weight.shape[1]
        if weight.sum() == 0:
            raise ZeroDivisionError("no load")
        return (row.flip(0) if enable_hierarchical else row).expand(len(weight), -1), None, None
"""
SWIFT = """
    import torch
    import torch_npu
    from .neighbour import EplbPolicy

    class SwiftBalanceEplb(EplbPolicy):
        def rebalance_experts(self, current_expert_table, expert_workload, is_node_redundant=False):
            assert torch.npu.device_count() == 2
            table = current_expert_table.numpy().copy()
            table[:, 0], table[:, 1] = current_expert_table[:, 1], current_expert_table[:, 0]
            return 1, [0], table.tolist()
"""
FLASHLB = """
    from numba import njit
    from vllm.logger import logger
    from vllm_ascend.distributed.parallel_state import get_dynamic_eplb_group
    import numpy

    @njit(cache=True)
    def one():
        return 1

    class FlashLB:
        calls = 0

        def rebalance_experts(self, current_expert_table, expert_workload):
            assert get_dynamic_eplb_group().world_size == 4 and expert_workload.shape[0] == 2
            self.calls += one()
            return True, numpy.array([1]), numpy.roll(numpy.array(current_expert_table), self.calls, axis=1)
"""
SPEC = MoESpec(num_layers=2, num_experts=6, num_redundant=2, num_ranks=4, num_nodes=2)


def write_peer(folder: Path, name: str, code: str) -> Path:
    """A file where a wheel would have it."""
    path = folder / "wheel" / PEER_FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(code), encoding="utf-8")
    (path.parent / "neighbour.py").write_text("class EplbPolicy: ...\n", encoding="utf-8")
    return path


def run(peer: Policy, options: dict[str, object], state: bytes = b"") -> tuple[NDArray[np.int32], bytes]:
    """One plan of two even windows from the initial placement."""
    return run_loaded(peer, np.ones((2, 2, 6)), initial_placement(SPEC), SPEC, options, state)


def test_peers_are_found_and_leave_nothing_in_sys_modules(tmp_path: Path) -> None:
    """Those that are there, at any depth, by name; the stand-ins for their imports last as long as the import."""
    write_peer(tmp_path, "sglang", SGLANG)
    write_peer(tmp_path, "ascend-swift", SWIFT)
    before = set(sys.modules)
    found = load_peers(tmp_path)
    assert list(found) == ["sglang", "ascend-swift"]
    assert {name for name in set(sys.modules) - before if name.startswith(("_peer", "vllm", "torch_npu"))} == set()
    assert all(peer.name == name and "\n" not in peer.summary for name, peer in found.items())


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    """No folder, an empty one, the same peer twice, an import that fails: each says what is the matter."""
    with pytest.raises(ConfigError, match="is not a folder"):
        load_peers(tmp_path / "missing")
    with pytest.raises(ConfigError, match="none is there"):
        load_peers(tmp_path)
    path = write_peer(tmp_path, "ascend-flashlb", "import no_such_module")
    with pytest.raises(ConfigError, match="no_such_module"):
        load_peers(tmp_path)
    path.write_text("raise ModuleNotFoundError('no', name='scipy.stats')", encoding="utf-8")
    with pytest.raises(ConfigError, match="pip install scipy"):
        load_peers(tmp_path)
    write_peer(tmp_path / "again", "ascend-flashlb", "")
    with pytest.raises(ConfigError, match="is there twice"):
        load_peers(tmp_path)


def test_a_peer_plans_like_a_policy(tmp_path: Path) -> None:
    """It is told of nodes and groups as by its engine; where it fails, its own message comes out."""
    write_peer(tmp_path, "sglang", SGLANG)
    peer = load_peers(tmp_path)["sglang"]
    for groups, row in ((1, [0, 1, 2, 3, 4, 5, 0, 1]), (2, [1, 0, 5, 4, 3, 2, 1, 0])):
        spec = msgspec.structs.replace(SPEC, num_expert_groups=groups)
        placement_LP, _ = run_loaded(peer, np.ones((2, 2, 6)), initial_placement(spec), spec, {})
        assert placement_LP.tolist() == [row, row]
    with pytest.raises(PolicyError, match="ZeroDivisionError: no load"):
        peer.function(np.zeros((1, 2, 6)), initial_placement(SPEC), SPEC.topology, PeerOptions(), b"")


def test_an_ascend_policy_gets_tables_of_slots(tmp_path: Path) -> None:
    """[L, R, S], the ranks of a node where it asks for devices; a live placement with an empty slot is refused."""
    write_peer(tmp_path, "ascend-swift", SWIFT)
    peer = load_peers(tmp_path)["ascend-swift"]
    assert run(peer, {})[0].tolist() == [[2, 3, 0, 1, 4, 5, 0, 1]] * 2
    live_LP = initial_placement(SPEC)
    live_LP[0, 7] = -1
    with pytest.raises(PolicyError, match="empty slots"):
        run_loaded(peer, np.ones((1, 2, 6)), live_LP, SPEC, {})


def test_flashlb_deploys_the_layers_it_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 only, unless all are wanted; its object goes on from a token, and a token can be used again.

    What it compiles is not cached on disk, where it would name a module that no other process can import.
    """
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    write_peer(tmp_path, "ascend-flashlb", FLASHLB)
    peer = load_peers(tmp_path)["ascend-flashlb"]
    live, once, twice = [0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5], [4, 5, 0, 1, 0, 1, 2, 3]
    placement, state = run(peer, {})
    assert placement.tolist() == [live, once]
    assert run(peer, {"all_layers": True})[0].tolist() == [once, once]
    for _ in range(2):
        assert run(peer, {}, state)[0].tolist() == [live, twice]
    for _ in range(module.STATES_KEPT):
        run(peer, {})
    assert run(peer, {}, state)[0].tolist() == [live, once]
    assert list(tmp_path.rglob("*.nbi")) == []


def test_slot_loads() -> None:
    """The worked example: an even split over the live replicas."""
    live_LP = np.array([[0, 1, 0]], dtype=np.int32)
    loads = slot_loads(np.array([[[6.0, 2.0]]]), live_LP, Topology(num_ranks=1, slots_per_rank=3))
    assert loads.tolist() == [[[[3.0, 2.0, 3.0]]]]


@pytest.fixture(scope="module")
def peers() -> dict[str, Policy]:
    """The real ones."""
    return load_peers(Path(PEERS))


def equal_to_vllm(vllm: Policy, spec: MoESpec, windows_TLE: NDArray[np.float64], live_LP: NDArray[np.int32]) -> int:
    """Check one plan, strict and not, layer by layer; how many layers had no defect."""
    planned_LP, _ = default(windows_TLE, live_LP, spec.topology, DefaultOptions(), b"")
    theirs_LP, _ = vllm.function(windows_TLE, live_LP, spec.topology, PeerOptions(), b"")
    fits_L = replica_count(theirs_LP, spec.num_experts).max(axis=1) <= spec.max_replicas
    if fits_L.all():
        strict_LP, _ = default(windows_TLE, live_LP, spec.topology, DefaultOptions(strict=True), b"")
        np.testing.assert_array_equal(strict_LP, theirs_LP)
    else:
        with pytest.raises(ValueError, match="dispatch rows hold"):
            default(windows_TLE, live_LP, spec.topology, DefaultOptions(strict=True), b"")
    clean_L = fits_L & ~ranks_with_duplicates(theirs_LP, spec).any(axis=1)
    np.testing.assert_array_equal(planned_LP[clean_L], theirs_LP[clean_L])
    assert not ranks_with_duplicates(planned_LP, spec).any()
    return int(clean_L.sum())


@needs_peers
@pytest.mark.parametrize(
    ("number", "seed"), [(200, 1), pytest.param(10_000, 2, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_default_equals_vllm_on_random_inputs(peers: dict[str, Policy], number: int, seed: int) -> None:
    """Strict: slot for slot, or an error where a dispatch row cannot hold it. Else: in every layer without a defect."""
    clean = sum(equal_to_vllm(peers["vllm"], *given) for given in twins.random_inputs(number, seed))
    assert clean > number // 2


@needs_peers
@needs_traces
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_default_equals_vllm_on_all_cases(peers: dict[str, Policy]) -> None:
    """On every plan of every trace and synthetic shape, from the live placement that vLLM's plans leave."""
    cases = chosen_cases([], TRACES)
    assert len(cases) > 10
    for case in cases:
        live_LP, clean = initial_placement(case.spec), 0
        for interval in range(case.num_intervals):
            clean += equal_to_vllm(peers["vllm"], case.spec, case.windows(interval), live_LP)
            live_LP, _ = peers["vllm"].function(case.windows(interval), live_LP, case.spec.topology, PeerOptions(), b"")
        assert clean > 0


@needs_peers
@needs_traces
@pytest.mark.slow
def test_default_is_ten_times_as_fast_as_vllm(peers: dict[str, Policy]) -> None:
    """In CPU time, side by side, on each trace and synthetic shape (measured: 22 to 35 times)."""
    for case in chosen_cases([], TRACES):
        live_LP, windows_TLE, topology = initial_placement(case.spec), case.windows(0), case.spec.topology
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(5):
            start = time.thread_time()
            default(windows_TLE, live_LP, topology, DefaultOptions(), b"")
            between = time.thread_time()
            peers["vllm"].function(windows_TLE, live_LP, topology, PeerOptions(), b"")
            seconds["ours"].append(between - start)
            seconds["theirs"].append(time.thread_time() - between)
        assert np.median(seconds["theirs"]) > 10 * np.median(seconds["ours"]), case.name


def glm() -> Case:
    """The GLM-5.2 trace in 14 intervals, half a domain each."""
    return chosen_cases(["glm52_7domains@steps"], TRACES, interval=4)[0]


@needs_peers
@needs_traces
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "planned", "following", "changed", "moved"),
    [
        ("vllm", 1.008, 1.172, 2.036, 0.96),
        ("sglang", 1.008, 1.172, 2.036, 0.96),
        ("ascend-default", 1.009, 1.172, 2.036, 0.94),
        ("ascend-swift", 1.116, 1.233, 2.048, 0.215),
        ("ascend-flashlb", 1.039, 1.177, 2.014, 0.70),
    ],
)
def test_wrappers_drive_peers_as_measured_elsewhere(
    peers: dict[str, Policy], name: str, planned: float, following: float, changed: float, moved: float
) -> None:
    """PAR on the interval planned for, on the next of the same domain and of another, and moves, as measured without us."""
    case, peer = glm(), peers[name]
    topology, per_rank = case.spec.topology, case.spec.slots_per_rank
    live_LP, state = initial_placement(case.spec), b""
    pars: dict[str, list[float]] = {"planned": [], "following": [], "changed": []}
    moves = []
    for interval in range(case.num_intervals - 1):
        placement_LP, state = peer.function(case.windows(interval), live_LP, topology, peer.options_type(), state)
        for key, one in (
            ("planned", interval),
            ("changed" if case.changes_after(interval) else "following", interval + 1),
        ):
            load_TLE = case.windows(one).sum(axis=0, keepdims=True)
            pars[key].append(float(windows_par(load_TLE, placement_LP, topology).mean()))
        old, new = (
            replica_count(rows.reshape(-1, per_rank), case.spec.num_experts) for rows in (live_LP, placement_LP)
        )
        moves.append(np.maximum(new - old, 0).sum() / live_LP.size)
        live_LP = placement_LP
    assert np.mean(pars["planned"]) == pytest.approx(planned, abs=0.002)
    assert np.mean(pars["following"]) == pytest.approx(following, abs=0.01)
    assert np.mean(pars["changed"]) == pytest.approx(changed, abs=0.02)
    assert np.mean(moves) == pytest.approx(moved, abs=0.01)


@needs_peers
@needs_traces
def test_duplicates_on_a_rank(peers: dict[str, Policy]) -> None:
    """On real loads vLLM, SGLang and SGLang's vectorised planner put replicas of an expert on one rank; ours never."""
    case = glm()
    live_LP = initial_placement(case.spec)
    for interval in (0, 7):
        windows_TLE = case.windows(interval)
        ours_LP, _ = run_policy("default", windows_TLE, live_LP, case.spec, {})
        assert not ranks_with_duplicates(ours_LP, case.spec).any()
        for name in ("vllm", "sglang", "sglang-vec"):
            placement_LP, _ = peers[name].function(windows_TLE, live_LP, case.spec.topology, PeerOptions(), b"")
            assert ranks_with_duplicates(placement_LP, case.spec).sum() > 0, name


@needs_peers
@needs_traces
def test_ascend_default_fails_on_64_slots_over_4_ranks(peers: dict[str, Policy]) -> None:
    """Real loads of 60 experts in 64 slots on 4 ranks: it finds no rank for a replica and crashes; ours plans."""
    with np.load(TRACES / "qwen15_moe_a27b_7domains.npz") as file:
        counts_TLE = file["counts"].astype(np.float64)
    spec = MoESpec(num_layers=counts_TLE.shape[1], num_experts=60, num_redundant=4, num_ranks=4)
    for window in (1, 3):
        windows_TLE = counts_TLE[window : window + 1]
        placement_LP, _ = run_policy("default", windows_TLE, initial_placement(spec), spec, {})
        assert not ranks_with_duplicates(placement_LP, spec).any()
        with pytest.raises(PolicyError, match="IndexError"):
            run_loaded(peers["ascend-default"], windows_TLE, initial_placement(spec), spec, {})

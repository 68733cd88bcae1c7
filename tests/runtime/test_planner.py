"""Plans are valid step by step, move only what pays, and fit the board."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_async.core.diff import aligned_target
from eplb_async.core.placement import initial_placement
from eplb_async.core.plan import counter, validate_entry
from eplb_async.core.score import windows_par
from eplb_async.core.spec import MoESpec
from eplb_async.runtime.planner import PLAN_OVERHEAD_BYTES, PackedArray, PlanProposal, PlanRequest, choose_entries

__all__: list[str] = []

SPEC = MoESpec(num_layers=4, num_experts=12, num_ranks=4, num_redundant=4, table_length=4)


def request_for(windows_TLE: Any, live_LP: Any, **changes: Any) -> PlanRequest:
    """A request of generation 5 whose layers have versions 7, 8, 9, ..."""
    request = PlanRequest(
        policy="none",
        options={},
        state=b"",
        spec=SPEC,
        staging_rows=2,
        slot_bytes=[100, 200, 300, 400],
        generation=5,
        windows=PackedArray.pack(windows_TLE),
        placement=PackedArray.pack(live_LP),
        versions=[7, 8, 9, 10],
        min_gain=0.0,
        capacity=1 << 20,
    )
    return msgspec.structs.replace(request, **changes)


def random_placement(rng: np.random.Generator) -> Any:
    """Valid, with empty slots now and then."""
    rows = []
    for _ in range(SPEC.num_layers):
        extra = rng.choice([-1, *range(SPEC.num_experts)], SPEC.num_redundant)
        while np.bincount(extra[extra >= 0], minlength=1).max() > 3:
            extra = rng.choice([-1, *range(SPEC.num_experts)], SPEC.num_redundant)
        rows.append(rng.permutation(np.concatenate([np.arange(SPEC.num_experts), extra])))
    return np.array(rows, dtype=np.int32)


def apply(proposal: PlanProposal, live_LP: Any, staging_rows: int) -> Any:
    """The placement after all entries, each checked as ranks check it: its row, its base version, its place in order."""
    rows_LP, versions = live_LP.copy(), [7, 8, 9, 10]
    for position, entry in enumerate(proposal.entries, 1):
        assert entry.base_version == versions[entry.layer]
        validate_entry(entry, rows_LP[entry.layer], SPEC, staging_rows)
        rows_LP[entry.layer] = entry.slot_to_expert_P
        versions[entry.layer] = counter(5, position)
    return rows_LP


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), staging_rows=st.integers(2, 4))
def test_entries_are_valid_and_reach_the_aligned_target(seed: int, staging_rows: int) -> None:
    """Every entry validates against the row before it and names its version; chosen layers end at the aligned target."""
    rng = np.random.default_rng(seed)
    live_LP, target_LP = random_placement(rng), random_placement(rng)
    windows_TLE = rng.pareto(1.0, (2, 4, 12)) * 100
    proposal = choose_entries(request_for(windows_TLE, live_LP, staging_rows=staging_rows), target_LP, b"s")
    reached_LP = apply(proposal, live_LP, staging_rows)
    for layer in range(SPEC.num_layers):
        aligned = aligned_target(live_LP[layer], target_LP[layer], SPEC.topology)
        expected = aligned if layer in proposal.layers else live_LP[layer]
        np.testing.assert_array_equal(reached_LP[layer], expected)
    after_L = windows_par(windows_TLE, reached_LP, SPEC.topology)
    np.testing.assert_allclose(proposal.par_after_L, after_L)
    assert proposal.num_moves == sum(len(entry.moves_M3) for entry in proposal.entries)
    assert proposal.bytes_moved == sum(100 * (1 + e.layer) * len(e.moves_M3) for e in proposal.entries)
    assert proposal.bytes_between_ranks <= proposal.bytes_moved


def one_hot_layers() -> tuple[Any, Any, Any]:
    """Layer 0 gains much, layer 1 little, layer 2 has no load, layer 3 already is at its target."""
    live_LP = initial_placement(SPEC)
    windows_TLE = np.ones((1, 4, 12))
    windows_TLE[0, 0, :4] = 100
    windows_TLE[0, 1, 0] = 1.3
    windows_TLE[0, 2] = 0
    target_LP = live_LP.copy()
    target_LP[:3, [0, 5, 12, 9]] = live_LP[:3, [5, 0, 9, 12]]
    return windows_TLE, live_LP, target_LP


def test_layer_moves_only_if_its_gain_pays() -> None:
    """A layer whose PAR falls by less than min_gain of it stays, and so do those without load or change."""
    windows_TLE, live_LP, target_LP = one_hot_layers()
    proposal = choose_entries(request_for(windows_TLE, live_LP, min_gain=0.1), target_LP, b"")
    assert proposal.layers == [0]
    assert proposal.par_after_L[1:] == proposal.par_before_L[1:]


def test_nothing_pays_says_so_with_numbers() -> None:
    """Without a layer that pays there are no entries, and the reason names the best gain and the margin."""
    windows_TLE, live_LP, target_LP = one_hot_layers()
    proposal = choose_entries(request_for(windows_TLE, live_LP, min_gain=0.9), target_LP, b"")
    assert (proposal.entries, proposal.num_moves) == ([], 0)
    assert "needed are 90.0%" in proposal.why


def test_entries_that_do_not_fit_the_board_are_left_out_by_whole_layers() -> None:
    """With room for one layer the best per byte is kept, whole; the reason counts the rest."""
    rng = np.random.default_rng(3)
    live_LP, target_LP = random_placement(rng), random_placement(rng)
    request = request_for(rng.pareto(1.0, (2, 4, 12)) * 100, live_LP)
    full = choose_entries(request, target_LP, b"")
    assert len(full.layers) > 1
    first = [entry for entry in full.entries if entry.layer == full.layers[0]]
    room = sum(len(entry.slots) + len(entry.moves) + 64 for entry in first)
    cut = choose_entries(msgspec.structs.replace(request, capacity=PLAN_OVERHEAD_BYTES + room), target_LP, b"")
    assert cut.entries == first
    assert "do not fit" in cut.why


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_packed_array_survives_a_message(dtype: Any) -> None:
    """Type, shape and values come back."""
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)[:, ::2]
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode(PackedArray.pack(array)), type=PackedArray)
    np.testing.assert_array_equal(packed.unpack(), array)
    assert packed.unpack().dtype == dtype

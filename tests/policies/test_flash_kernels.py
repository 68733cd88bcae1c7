"""The compiled loops of the `flashlb` policy equal their plain twins, keep their examples, and stay inside their arrays."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.policies import _flash, _flash_search, _flash_swaps, _flash_windows, _flash_work
from eplb_async.policies.flashlb import FlashLBOptions, _rules
from tests.policies import twins_flash


def spec_of(experts: int, slots: int, ranks: int, layers: int = 1, **more: int) -> MoESpec:
    """A model of that shape."""
    return MoESpec(num_layers=layers, num_experts=experts, num_redundant=slots - experts, num_ranks=ranks, **more)


def drifting(spec: MoESpec, num_windows: int, seed: int) -> NDArray[np.float64]:
    """Skewed loads that differ from window to window."""
    random = np.random.default_rng(seed)
    shape = (spec.num_layers, spec.num_experts)
    return random.lognormal(size=shape) * random.lognormal(sigma=0.5, size=(num_windows, *shape)) * 1000


def freeze(*arrays: NDArray[Any]) -> None:
    """Read-only, as the policy hands them over: numba would compile half a minute more for arrays that may be written."""
    for array in arrays:
        array.flags.writeable = False


@pytest.mark.parametrize("seed", range(60))
def test_plan_layers_equals_its_twin(seed: int) -> None:
    """Whole plans agree slot for slot and to the last bit of gains and promises, for all kinds of shapes and settings."""
    random = np.random.default_rng(seed)
    ranks, experts = int(random.integers(1, 7)), int(random.integers(4, 20))
    per_rank = min(experts - 1, -(-experts // ranks) + int(random.integers(0, 3)))
    if per_rank * ranks < experts:
        ranks, per_rank = 3, experts // 2
    spec = spec_of(experts, per_rank * ranks, ranks, 2, table_length=-(-per_rank * ranks // experts) + seed % 4)
    windows_TLE = drifting(spec, int(random.integers(1, 9)), seed)
    if seed % 3 == 0:
        windows_TLE = random.integers(0, 5, size=windows_TLE.shape).astype(np.float64)
    options = FlashLBOptions(
        depth=int(random.integers(1, 6)),
        width=int(random.integers(0, 5)),
        replica_rule=("peak", "relief", "proportional")[seed // 3 % 3],
        stay_within=float(random.choice([0.0, 0.05, 0.3])),
        sampling_noise=seed % 2,
        redeploy_ratio=1.0,
        least_gain=float(random.choice([0.0, 0.02, 0.3])),
    )
    rules = _rules(spec.topology, options)
    live_LP = initial_placement(spec)
    if seed % 2:
        live_LP = random.permuted(live_LP, axis=1)
    promised_L = np.array([1.0, (0.8, -0.8, -0.95)[seed // 2 % 3]])
    work = _flash_work.new_work.py_func(len(windows_TLE), experts, rules)
    freeze(windows_TLE, live_LP)  # not the promises: a plan of all layers has made them anew
    planned_LP, gain_L, astray_L, ratio_L = _flash.plan_layers(windows_TLE, live_LP, promised_L, rules, work)
    rows, gains, astray, ratios = twins_flash.plan_layers_twin(windows_TLE, live_LP, promised_L, rules)
    for planned_P, row in zip(planned_LP.tolist(), rows, strict=True):
        assert row is None or planned_P == row
    assert (gain_L.tolist(), astray_L.tolist(), ratio_L.tolist()) == (gains, astray, ratios)


@pytest.mark.parametrize("seed", range(12))
def test_replan_equals_its_twin(seed: int) -> None:
    """Promises that hold, rows that change, their slots and fingerprints: all of a plan, with and without a limit of layers."""
    random = np.random.default_rng(seed)
    spec = spec_of(12, 16, 4, 5)
    windows_TLE = drifting(spec, 1 + seed % 3, seed)
    live_LP = random.permuted(initial_placement(spec), axis=1)
    promised_L = random.choice([0.5, 0.99, -0.9, 7.0, -7.0, np.nan], size=5)
    planned_L = _flash.fingerprints(live_LP) + (random.random(5) < 0.3)
    rules = _rules(spec.topology, FlashLBOptions(redeploy_below=0.8, stay_within=(0.0, 0.2)[seed % 2]))
    freeze(windows_TLE, live_LP, promised_L, planned_L)
    planned = _flash.replan(windows_TLE, live_LP, promised_L, planned_L, cast(Any, tuple(rules)), seed % 4)
    expected = twins_flash.replan_twin(windows_TLE, live_LP, promised_L, planned_L, rules, seed % 4)
    for ours, twins in zip(planned, expected, strict=True):
        np.testing.assert_array_equal(ours, twins)


def test_fingerprints_equal_their_twin() -> None:
    """Numbers wrap as Python's do modulo 2 ** 64; other rows, other numbers; slots and empty slots count."""
    rows_LP = np.random.default_rng(0).integers(-1, 256, size=(50, 40), dtype=np.int32)
    rows_LP[1] = rows_LP[0]
    rows_LP[1, [3, 7]] = [255, -1]
    prints = _flash.fingerprints(rows_LP).tolist()
    assert prints == [twins_flash.fingerprint_twin(row) for row in rows_LP.tolist()]
    assert len(set(prints)) == 50
    assert _flash.fingerprints(np.array([[0, 1]], dtype=np.int32)).tolist() == [2199023255583]


def test_a_worked_example_of_promises() -> None:
    """The numbers in the docstring of `still_promised` are right."""
    rows, live = np.array([1, 2, 3, 4]), np.array([1, 5, 3, 4])
    assert _flash.still_promised(np.array([0.9, 0.8, 7.0, -0.7]), rows, live).tolist() == [0.9, 1, 1, -0.7]
    rules = _rules(spec_of(4, 4, 4).topology, FlashLBOptions(redeploy_ratio=0.98, redeploy_below=0.7))
    is_due = _flash._is_due.py_func
    assert [is_due(ratio, 0.8, rules) for ratio in (0.783, 0.785)] == [True, False]
    assert [is_due(ratio, -0.5, rules) for ratio in (0.484, 0.486)] == [True, False]


@pytest.mark.parametrize("number", [0, 1, 5, 63, 64, 65, 200, 333])
def test_heaviest_first_equals_a_stable_sort(number: int) -> None:
    """For stretches that are counted and those that are merged; equal weights keep their order."""
    for seed in range(20):
        weight_N = np.random.default_rng(seed).integers(0, 2 + 10 * seed, size=number).astype(np.float64)
        assert _flash_work.heaviest_first(weight_N).tolist() == np.argsort(-weight_N, kind="stable").tolist()


@pytest.mark.parametrize("rule", [_flash_search.PEAK, _flash_search.RELIEF, _flash_search.PROPORTIONAL])
def test_spare_order_equals_its_twin(rule: int) -> None:
    """Looking at the experts that have several replicas, and the first that has one, finds the greatest of all."""
    random = np.random.default_rng(rule)
    for case in range(200):
        risk_E = random.integers(0, 6, size=8).astype(np.float64)
        ranked_E = np.argsort(-risk_E, kind="stable")
        most = int(random.integers(1, 5))
        rules = _rules(spec_of(8, 16, 8).topology, FlashLBOptions())._replace(replica_rule=rule, most_replicas=most)
        stretch, spare = (case % 3, 8 - case % 2), int(random.integers(0, 12))
        work, order_P = _flash_work.new_work.py_func(1, 8, rules), np.zeros(16, dtype=np.int64)
        work.risk_E[:] = risk_E
        given = _flash_search.spare_order.py_func(work, ranked_E, stretch, spare, rules, order_P)
        expected = twins_flash.spare_order_twin(risk_E, ranked_E.tolist(), *stretch, spare, rules)
        assert order_P[:given].tolist() == expected


def work_for(windows: Any, spec: MoESpec, **more: Any) -> tuple[_flash_work.Work, _flash_work.Rules, tuple[int, float]]:
    """Kernels' arrays that have read one layer's windows [T, E], the rules, and what `read_noise` says.

    Kernels that Python cannot call (`_flash_work.INNER`) are run as Python; compiled they are compared with their twins.
    """
    windows_TLE = np.asarray(windows, dtype=np.float64)[:, None]
    rules = _rules(spec.topology, FlashLBOptions(**more))
    work = _flash_work.new_work.py_func(len(windows_TLE), spec.num_experts, rules)
    scale_LT = _flash_windows.read_scales.py_func(windows_TLE, rules.num_ranks)
    read = _flash_windows.read_noise.py_func(scale_LT[0])
    _flash_windows.read_shares.py_func(windows_TLE, 0, scale_LT[0], work)
    _flash_windows.read_statistics.py_func(work, read[0], rules.z_score)
    return work, rules, read


def test_worked_examples_of_shares() -> None:
    """The numbers in the docstrings of `_flash_work` are right."""
    work, _, (used, noise) = work_for([[3, 1], [0, 0], [2, 6]], spec_of(2, 2, 2), z_score=2.0)
    assert used == 2
    assert noise == pytest.approx((1 / np.sqrt(2) + 1 / 2) / 2)
    assert work.share_ET[:, :2].tolist() == [[1.5, 0.5], [0.5, 1.5]]
    assert work.mean_E.tolist() == [1, 1]
    assert work.var_E.tolist() == pytest.approx([0.5, 0.5])
    assert work.off_TE[:2, 0] @ work.off_TE[:2, 1] == pytest.approx(-0.5)
    assert work.risk_E.tolist() == pytest.approx([2.414, 2.414], abs=1e-3)
    load_RT, counts = np.zeros((2, 2)), np.array([2, 1])
    shares = np.array([[1.5, 0.5], [0.5, 1.5]])
    assert _flash_windows.read_scales.py_func(np.array([[[3.0, 1]], [[0, 0]], [[2, 6]]]), 2).tolist() == [
        [0.5, np.inf, 0.25]
    ]
    _flash_work.put_on_ranks(shares, 2, np.array([[0, 1], [0, -1]], dtype=np.int32), counts, work.part_N, load_RT)
    assert load_RT.tolist() == [[1.25, 1.75], [0.75, 0.25]]
    row_RS, one_RT = np.array([[0, 1], [0, -1]], dtype=np.int32), np.zeros((2, 1))
    _flash_work.put_window_on_ranks.py_func(np.array([6.0, 2]), 0.25, row_RS, counts, work.part_N, one_RT)
    assert one_RT.tolist() == [[1.25], [0.75]]
    assert _flash_work.mean_peak(load_RT, 2, np.zeros(2)) == 1.5
    assert _flash_work.heaviest_first(np.array([30.0, 40.0, 20.0, 30.0])).tolist() == [1, 0, 3, 2]


def test_worked_examples_of_the_search() -> None:
    """The numbers in the docstrings of `_flash_search` and `_flash` are right."""
    work, rules, _ = work_for([[4, 3, 2]], spec_of(3, 4, 2))
    work.risk_E[:] = [90, 40, 20]
    spare_order, places = _flash_search.spare_order.py_func, np.zeros(3, dtype=np.int64)
    assert spare_order(work, np.arange(3), (0, 3), 3, rules._replace(most_replicas=3), places) == 3
    assert places.tolist() == [0, 0, 1]
    work.mean_E[:] = [4, 3, 2]
    work.share_ET[:, 0] = [4, 3, 2]
    counts = np.array([2, 1, 1])
    deal = _flash_search.deal.py_func
    assert deal(work, 1, np.arange(3), counts, _flash_search.NO_HOMES, np.inf, rules) == (5, False)
    assert work.row_RS.tolist() == [[0, 2], [0, 1]]
    assert deal(work, 1, np.arange(3), counts, _flash_search.NO_HOMES, 4.5, rules) == (np.inf, False)
    rank_R = np.array([2, 0, 1])
    assert _flash_search.reorder(rank_R, 3, np.array([4.0, 5.0, 3.0]), 2) == 3
    assert rank_R.tolist() == [2, 0, 1]
    assert _flash_search.reorder(rank_R, 3, np.array([4.0, 5.0, 5.0]), 2) == 3
    assert rank_R.tolist() == [0, 2, 1]
    counts, homes, at = np.zeros(2, np.int64), np.zeros(4, np.int64), np.zeros(3, np.int64)
    row_RS, last_E = np.array([[0, 1], [0, -1]], dtype=np.int32), np.zeros(2, np.int64)
    assert not _flash_work.count_replicas(row_RS, counts, last_E)
    assert counts.tolist() == [2, 1]
    counts[:] = 9
    _flash_work.count_slots.py_func(row_RS, counts)
    _flash.find_homes(row_RS, counts, homes, at)
    assert (counts.tolist(), homes[:3].tolist(), at.tolist()) == ([2, 1], [0, 1, 0], [0, 2, 3])


def test_worked_examples_of_the_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers in the docstrings of `_flash_swaps` are right."""
    top_3T = np.zeros((3, 2))
    loads = np.array([[3.0, 1.0], [2.0, 5.0], [1.0, 4.0]])
    assert _flash_swaps.find_peaks(loads, loads.mean(axis=1), 2, np.zeros(3, dtype=np.int64), top_3T) == 1
    assert top_3T.tolist() == [[3, 5], [2, 4], [1, 1]]
    work, rules, _ = work_for([[5, 4, 2, 1]], spec_of(4, 4, 2))
    work.row_RS[:] = [[0, 1], [2, 3]]
    counts = np.ones(4, dtype=np.int64)
    _flash_work.put_on_ranks(work.share_ET, 1, work.row_RS, counts, work.part_N, work.load_RT)
    work.mean_R[:] = work.load_RT[:, 0]
    busiest = _flash_swaps.find_peaks(work.load_RT, work.mean_R, 1, np.zeros(2, dtype=np.int64), work.top_3T)
    find_swap = _flash_swaps.find_swap.py_func
    monkeypatch.setattr(_flash_swaps, "find_swap", find_swap)
    read_slots = _flash_swaps._read_slots.py_func
    monkeypatch.setattr(_flash_swaps, "_read_slots", read_slots)
    read_slots(work, counts)
    gain, mine, other, theirs = find_swap(work, 1, counts, busiest, 0.2)
    assert (busiest, mine, other, theirs) == (0, 0, 1, 0)
    assert gain * 6 == pytest.approx(3)
    assert _flash_swaps.swap_experts.py_func(work, 1, counts, 9 / 6, rules) == pytest.approx(1.0)
    assert work.row_RS.tolist() == [[2, 1], [0, 3]]


def test_swaps_of_a_single_window_keep_ranks_even() -> None:
    """An expert goes for one with as many replicas, though one with two replicas is the better match."""
    work, _, _ = work_for([[6, 4, 3, 2, 1.8, 1.5, 1.5]], spec_of(7, 9, 3))
    work.row_RS[:] = [[0, 1, 2], [3, 4, 5], [0, 3, 6]]
    counts = np.array([2, 1, 1, 2, 1, 1, 1])
    _flash_work.put_on_ranks(work.share_ET, 1, work.row_RS, counts, work.part_N, work.load_RT)
    work.mean_R[:] = work.load_RT[:, 0]
    _flash_swaps._read_slots.py_func(work, counts)
    busiest = _flash_swaps.find_peaks(work.load_RT, work.mean_R, 1, np.zeros(3, dtype=np.int64), work.top_3T)
    found = [_flash_swaps.find_swap.py_func(work, 1, counts, busiest, slope)[1:] for slope in (0.0, 0.2)]
    assert (busiest, found) == (0, [(1, 1, 0), (1, 1, 2)])


# shapes and loads on which dealing runs out of ranks that lack the expert, as FlashLB's released code does unawares
NO_RANK_FREE = """
import numpy as np
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.policies import _flash_search
from eplb_async.policies.flashlb import FlashLBOptions, flashlb
from eplb_async.testing import ranks_with_duplicates
met, deal = 0, _flash_search.deal
for seed in range(40):
    random = np.random.default_rng(seed)
    ranks, experts = int(random.integers(2, 6)), int(random.integers(3, 7))
    slots = ranks * (experts - 1)
    spec = MoESpec(num_layers=2, num_experts=experts, num_redundant=slots - experts, num_ranks=ranks)
    windows = random.lognormal(sigma=3.0, size=(1 + seed % 3, 2, experts)) * 1000
    live = initial_placement(spec)
    for _ in range(2):
        live, state = flashlb(windows, live, spec.topology, FlashLBOptions(least_gain=0.0), b"")
        assert not ranks_with_duplicates(live, spec).any()
        assert (live >= 0).all()
"""


def run_without_hidden_indices(**environment: str) -> None:
    """Plan the inputs of NO_RANK_FREE in a fresh interpreter."""
    root = Path(__file__).resolve().parents[2]
    variables = {**os.environ, "PYTHONPATH": str(root), **environment}
    variables.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", NO_RANK_FREE], env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_index_is_out_of_bounds_when_no_rank_is_free() -> None:
    """Where every rank with room holds the expert already, plans have no replicas together, and Python sees no bad index."""
    run_without_hidden_indices(NUMBA_DISABLE_JIT="1")


@pytest.mark.slow
def test_no_compiled_index_is_out_of_bounds() -> None:
    """The same, compiled, with numba's own check of bounds."""
    run_without_hidden_indices(NUMBA_BOUNDSCHECK="1")


def test_dealing_can_run_out_of_ranks() -> None:
    """The case exists: the last expert's replicas find only ranks that hold it, which `deal` reports."""
    load_E = [10, 10, 1, 1, 1, 1, 0.3]
    work, rules, _ = work_for([load_E], spec_of(7, 9, 3))
    work.mean_E[:] = load_E
    counts = np.array([1, 1, 1, 1, 1, 1, 3])
    _, doubled = _flash_search.deal.py_func(work, 1, np.arange(7), counts, _flash_search.NO_HOMES, np.inf, rules)
    assert doubled


def test_the_search_tries_far_counts_while_ranks_are_far_from_even() -> None:
    """Three experts have nearly all load of 8 ranks. The rule gives them all 8 spare slots, 11 replicas that meet; with 5 each has a rank to itself."""
    spec = spec_of(32, 40, 8)
    load_E = [395.0, 221.0, 151.0, 19.0, 6.0, *[1.0] * 3, *[0.1] * 24]
    rules = _rules(spec.topology, FlashLBOptions(redeploy_below=1.0, sampling_noise=0.0))
    work = _flash_work.new_work.py_func(1, 32, rules)
    windows_TLE, live_LP = np.array([[load_E]]), initial_placement(spec)
    freeze(windows_TLE, live_LP)
    planned_LP, *_ = _flash.plan_layers(windows_TLE, live_LP, np.ones(1), rules, work)
    assert [(planned_LP == expert).sum() for expert in range(3)] == [4, 2, 2]


def test_a_lower_promise_makes_a_layer_due_later() -> None:
    """A layer that could only be balanced to 2.0 is not due because it has 2.0; without the promise it is."""
    spec = spec_of(4, 4, 4)
    windows = np.array([[[50.0, 30.0, 20.0, 0.0]], [[50.0, 20.0, 30.0, 0.0]]]) * 100
    rules = _rules(spec.topology, FlashLBOptions(redeploy_below=0.0, least_gain=0.0))
    for promised, due in ((0.5, False), (1.0, True)):
        # risks are read of layers that are due alone
        work = _flash_work.new_work.py_func(2, 4, rules)
        _, gain_L, *_ = _flash.plan_layers(windows, initial_placement(spec), np.array([promised]), rules, work)
        assert (work.risk_E.max() > 0.0, gain_L[0]) == (due, 0.0)


def test_a_layer_planned_in_vain_waits_until_it_is_worse() -> None:
    """One expert is half of the load of four ranks: no plan helps. It is tried again once it is worse, and on one window always."""
    spec = spec_of(4, 4, 4)
    windows = np.array([[[50.0, 30.0, 20.0, 0.0]], [[50.0, 20.0, 30.0, 0.0]]]) * 100
    live_LP, unknown = initial_placement(spec), (np.zeros(1), np.zeros(1, dtype=np.int64))
    rules = tuple(_rules(spec.topology, FlashLBOptions(redeploy_below=1.0, sampling_noise=0.0)))
    placement_LP, promised_L, print_L = _flash.replan(windows, live_LP, *unknown, cast(Any, rules), 0)
    np.testing.assert_array_equal(placement_LP, live_LP)
    assert promised_L.tolist() == [-0.5]
    assert _flash.replan(windows[:1], live_LP, *unknown, cast(Any, rules), 0)[1].tolist() == [1.0]
    # 51 in 101 is less than RETRY worse, 60 in 110 is more; then it has been tried again, as the new promise says
    for more, promised in ((100.0, -0.5), (1000.0, -110 / 240)):
        later = windows + np.array([more, 0.0, 0.0, 0.0])
        _, later_L, _ = _flash.replan(later, live_LP, promised_L, print_L, cast(Any, rules), 0)
        assert later_L.tolist() == pytest.approx([promised])


def test_a_layer_stays_if_the_search_finds_too_little() -> None:
    """All of `least_gain` has to come from the search alone: else nothing is dealt, and no row is planned."""
    spec = spec_of(6, 6, 3)
    windows, live_LP = (
        np.array([[[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]]) * 100,
        np.array([[0, 4, 1, 5, 2, 3]], dtype=np.int32),
    )
    # 8 tokens on the busiest rank where 7 are possible: an eighth less
    for least_gain, planned in ((0.0, True), (0.12, True), (0.13, False)):
        rules = _rules(spec.topology, FlashLBOptions(sampling_noise=0.0, redeploy_below=1.0, least_gain=least_gain))
        work = _flash_work.new_work.py_func(1, 6, rules)
        planned_LP, *_ = _flash.plan_layers(windows, live_LP, np.ones(1), rules, work)
        assert planned_LP.any() == planned

"""The `frontier` policy: its promises, its options, and its distance to the exact optimum."""

from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eplb_async.core.errors import ConfigError
from eplb_async.core.placement import initial_placement, replica_count
from eplb_async.core.score import par, rank_load, windows_par
from eplb_async.core.spec import MoESpec
from eplb_async.policies.frontier import FrontierOptions, _disagreement, _noise_par, _normalised, find_frontier, within
from eplb_async.policies.registry import run_policy
from eplb_async.testing import check_policy
from tests.policies import twins

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]

FREE: dict[str, Any] = {"price": 0.0, "noise": 0.0, "target": 1.0}
"""Options with which every gain is worth its moves."""

# experts, slots, ranks -> mean of (peak of `frontier` from the initial placement by its search alone / least peak of any
# placement without an expert twice on a rank), over all integer loads in a grid. Measured, not derived.
SEARCH_RATIO = {
    (3, 4, 2): 1.02,
    (3, 6, 3): 1.03,
    (4, 6, 2): 1.03,
    (4, 6, 3): 1.06,
    (5, 6, 2): 1.03,
    (5, 6, 3): 1.03,
}


def spec_of(experts: int, slots: int, ranks: int, layers: int = 1, **more: int) -> MoESpec:
    """A model of that shape."""
    return MoESpec(num_layers=layers, num_experts=experts, num_redundant=slots - experts, num_ranks=ranks, **more)


def plan(windows: Any, spec: MoESpec, live: IntArray | None = None, **options: Any) -> IntArray:
    """A placement by `frontier`, with the defaults but for the given options; [E] and [L, E] are one window."""
    windows_TLE = np.asarray(windows, dtype=np.float64)
    if windows_TLE.ndim < 3:
        windows_TLE = np.broadcast_to(windows_TLE, (1, spec.num_layers, spec.num_experts))
    return run_policy("frontier", windows_TLE, initial_placement(spec) if live is None else live, spec, options)[0]


def moved(placement_LP: IntArray, live_LP: IntArray, spec: MoESpec) -> NDArray[np.int64]:
    """Slots per layer whose expert is not on that rank in the live placement, [L]; counted the slow way."""
    counts = []
    for row, live in zip(placement_LP.tolist(), live_LP.tolist(), strict=True):
        rank_of = [slot - slot % spec.slots_per_rank for slot in range(spec.num_slots)]
        on_rank = [live[first : first + spec.slots_per_rank] for first in rank_of]
        counts.append(sum(expert not in held for expert, held in zip(row, on_rank, strict=True)))
    return np.array(counts)


def drifting(spec: MoESpec, num_windows: int, seed: int, spread: float = 0.3) -> FloatArray:
    """Skewed loads that differ from window to window, with the same number of tokens in each."""
    random = np.random.default_rng(seed)
    shape = (spec.num_layers, spec.num_experts)
    windows_TLE = random.lognormal(size=shape) * random.lognormal(sigma=spread, size=(num_windows, *shape))
    return np.asarray(windows_TLE / windows_TLE.sum(axis=2, keepdims=True) * 1e6)


@pytest.mark.parametrize(
    "options", [{}, FREE, {"inside_nodes": True}, {"start": "scratch"}, {"start": "live", "most_moved": 0.1}]
)
def test_keeps_the_contract(options: dict[str, Any]) -> None:
    """The contract suite passes with the defaults, with free moves, in nodes, from scratch and with a budget."""
    assert check_policy("frontier", options) > 200


@pytest.mark.parametrize(("experts", "slots", "ranks"), SEARCH_RATIO)
def test_distance_to_the_exact_optimum(experts: int, slots: int, ranks: int) -> None:
    """On every integer load of a grid so small a layer is planned optimally where plans from scratch are allowed.

    It is then never worse than `default`; the search alone comes as close to the optimum as recorded.
    """
    grid = combinations_with_replacement(range(8, -1, -1) if experts < 5 else range(6, -1, -1), experts)
    load_LE = np.array([load for load in grid if any(load)], dtype=np.float64)
    spec = spec_of(experts, slots, ranks, len(load_LE))
    placements = np.sort(twins.all_placements(experts, spec.topology).reshape(-1, ranks, slots // ranks), axis=2)
    placements = placements[(np.diff(placements, axis=2) > 0).all(axis=(1, 2))]
    different = np.unique(placements.reshape(-1, slots), axis=0)
    least_L = np.array([twins.least_peak(load_E, different, spec.topology) for load_E in load_LE])

    def ratio_of(policy: str, **options: Any) -> FloatArray:
        rows, _ = run_policy(policy, load_LE[None], initial_placement(spec), spec, options)
        return np.asarray(rank_load(load_LE, rows, spec.topology).max(axis=1) / least_L)

    auto_L, search_L = ratio_of("frontier", **FREE), ratio_of("frontier", **FREE, start="live")
    assert min(auto_L.min(), search_L.min()) > 1 - 1e-9
    assert auto_L.max() < 1 + 1e-9
    assert (auto_L <= ratio_of("default") + 1e-9).all()
    assert search_L.mean() <= SEARCH_RATIO[experts, slots, ranks]


@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_default(seed: int) -> None:
    """Where moves are free, the busiest rank of no layer has more load than in the plan of `default`."""
    spec = spec_of(32, 48, 8, layers=12)
    load_TLE = drifting(spec, 1, seed)
    ours = windows_par(load_TLE, plan(load_TLE, spec, **FREE, start="scratch"), spec.topology)
    default, _ = run_policy("default", load_TLE, initial_placement(spec), spec, {})
    theirs = windows_par(load_TLE, default, spec.topology)
    assert (ours <= theirs + 1e-9).all()
    assert ours.mean() < 1.01
    repaired = windows_par(load_TLE, plan(load_TLE, spec, **FREE), spec.topology)
    assert (repaired <= theirs + 1e-9).all()


@pytest.mark.parametrize("start", ["auto", "live", "scratch"])
def test_published_example(start: str) -> None:
    """Loads 600, 560, 120, ... on 8 ranks of 2 slots (vllm-ascend's FlashLB example): the optimum, 196.67."""
    load_E = np.array([600.0, 560.0, 120.0, 120.0, 20.0, 10.0, 10.0, 10.0])
    spec = spec_of(8, 16, 8)
    assert rank_load(load_E[None], plan(load_E, spec, start=start), spec.topology).max() == pytest.approx(590 / 3)


@pytest.mark.parametrize(("ranks", "options"), [(8, FREE), (8, {}), (16, {})])
def test_two_very_hot_experts(ranks: int, options: dict[str, Any]) -> None:
    """Two hot experts and cold ones: greedy replication copies the hot ones too often (PAR 1.14, 1.44), the search does not."""
    load_E = np.full(2 * ranks - 4, 1.0)
    load_E[:2] = 1000.0
    spec = spec_of(len(load_E), 3 * ranks, ranks)
    greedy, _ = run_policy("default", load_E[None, None], initial_placement(spec), spec, {})
    assert par(rank_load(load_E[None], greedy, spec.topology))[0] > 1.14
    assert par(rank_load(load_E[None], plan(load_E, spec, **options), spec.topology))[0] < 1.02


def test_calm_layers_are_left_alone() -> None:
    """A layer whose PAR is at most the target keeps its slots exactly; one above it is repaired."""
    spec = spec_of(16, 16, 4, layers=2)
    load_LE = np.full((2, 16), 100.0)
    load_LE[0, :2], load_LE[1, :4] = 115.0, 130.0
    planned, live = plan(load_LE, spec, target=1.1, noise=0.0, price=0.0), initial_placement(spec)
    np.testing.assert_array_equal(planned[0], live[0])
    assert par(rank_load(load_LE, planned, spec.topology))[1] <= 1.1
    assert moved(planned, live, spec)[1] > 0
    assert (moved(plan(load_LE, spec, target=1.0, noise=0.0, price=0.0), live, spec) > 0).all()


def test_sampling_noise_is_not_acted_on() -> None:
    """Counts that differ from even only because they are counts: hardly a layer moves, without `noise` nearly all do."""
    spec = spec_of(64, 64, 8, layers=40)
    live = initial_placement(spec)
    load_LE = np.random.default_rng(0).poisson(50.0, size=(40, 64)).astype(np.float64)

    def changed(**options: Any) -> int:
        return int((moved(plan(load_LE, spec, price=0.0, target=1.01, **options), live, spec) > 0).sum())

    assert changed(noise=2.0) == 0
    assert changed() < 20
    assert changed(noise=0.0) > 35


def test_noise_of_a_layer() -> None:
    """The example of `_noise_par`: 16,384 tokens on each of 32 ranks, 2.07 / 128; nothing for less than a token per rank."""
    assert _noise_par(np.full((1, 32), 16384.0), 32)[0] == pytest.approx(2.07 / 128, rel=0.01)
    assert _noise_par(np.full((1, 32), 0.5), 32)[0] == 0.0
    assert _noise_par(np.full((1, 32), 100.0), 1)[0] == 0.0


def test_normalised_windows() -> None:
    """The example of `_normalised`; the even window, a window without load, a layer without load, and merging."""
    options = FrontierOptions(most_windows=4, even_windows=1)
    assert _normalised(np.array([[[6.0, 2.0]]]), 2, options).tolist() == [[[1.5], [0.5]]]
    two = np.array([[[6.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert _normalised(two, 2, options).tolist() == [[[1.5, 1.5, 1.0], [0.5, 0.5, 1.0]], [[0.0] * 3, [0.0] * 3]]
    assert _normalised(two, 2, FrontierOptions(even_windows=0)).shape == (2, 2, 2)
    many = 100 + np.random.default_rng(0).random((12, 3, 5))
    merged = many.reshape(4, 3, 3, 5).sum(axis=1)
    np.testing.assert_allclose(_normalised(many, 2, options), _normalised(merged, 2, options))
    assert _normalised(many[:10], 2, options).shape == (3, 5, 5)


def test_windows_that_differ_much_are_trusted_less() -> None:
    """The example of `_disagreement`, none where there is no load, and twice the even windows."""
    differing = np.array([[[1.5, 0.5]], [[0.5, 1.5]]])
    assert _disagreement(differing) == pytest.approx(0.25 * np.sqrt(2))
    assert _disagreement(differing[:1].repeat(2, axis=0)) == 0
    assert _disagreement(np.zeros((2, 1, 2))) == 0
    assert _normalised(differing, 2, FrontierOptions(even_windows=1)).tolist() == [[[1.5, 0.5, 1, 1], [0.5, 1.5, 1, 1]]]


def test_windows_beyond_the_most_are_summed() -> None:
    """12 windows with most_windows 4 plan as 4 sums of three do, apart from how much is expected to vary."""
    spec = spec_of(32, 40, 8, layers=4)
    windows_TLE = drifting(spec, 12, 1)
    merged_TLE = windows_TLE.reshape(4, 3, 4, 32).sum(axis=1)
    fine, coarse = (
        windows_par(windows_TLE, plan(windows, spec, price=0.0, most_windows=4), spec.topology).mean()
        for windows in (windows_TLE, merged_TLE)
    )
    assert fine == pytest.approx(coarse, rel=0.02)


def test_even_windows_hold_back() -> None:
    """Of windows that differ from even ones only by sampling noise, less is acted on, the more even windows take part."""
    spec = spec_of(32, 40, 8, layers=8)
    windows_TLE = np.random.default_rng(2).poisson(60.0, size=(4, 8, 32))
    none, some, many = (
        int(moved(plan(windows_TLE, spec, even_windows=n), initial_placement(spec), spec).sum()) for n in (0, 8, 64)
    )
    assert none > some > many


def test_several_windows_count_one_by_one() -> None:
    """Experts 0 and 1 are hot in turn, 2 and 3 together: sums say all are alike, windows keep 2 and 3 apart."""
    spec = spec_of(4, 4, 2)
    windows_TLE = np.array([[[8.0, 0.1, 8.1, 0.2]], [[0.1, 8.0, 0.2, 8.1]]])
    live = np.array([[0, 2, 1, 3]], dtype=np.int32)
    planned = plan(windows_TLE, spec, live, price=0.0)
    assert windows_par(windows_TLE, planned, spec.topology)[0] < 1.03
    assert windows_par(windows_TLE, live, spec.topology)[0] > 1.9


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("price", [0.0, 0.1])
def test_budget_is_kept(share: float, price: float) -> None:
    """From a complete live placement no more than most_moved of all slots are filled anew, over all layers."""
    spec = spec_of(32, 40, 8, layers=10)
    live = initial_placement(spec)
    windows_TLE = drifting(spec, 2, 3)
    planned = plan(windows_TLE, spec, live, most_moved=share, price=price)
    assert moved(planned, live, spec).sum() <= share * live.size
    if share == 0.0:
        np.testing.assert_array_equal(planned, live)


@pytest.mark.parametrize(
    ("option", "told", "least"),
    [(None, 0.0, 0.1), (None, 0.02, 0.02), (None, 2.0, 2.0), (0.5, 2.0, 2.0), (0.5, 0.02, 0.5)],
)
def test_the_planner_says_what_moves_cost(option: float | None, told: float, least: float) -> None:
    """Without the option the price is the planner's, less than our own too; with it at least the option's; nobody's is 0.1."""
    assert within(FrontierOptions(price=option), 1.0, told, 1).least_price == least
    # fewer windows, less of the price: even windows make gains look as much smaller
    assert within(FrontierOptions(), 1.0, 2.0, 2).least_price == 1.0


def test_price_trades_moves_for_balance() -> None:
    """A higher price moves less and balances less."""
    spec = spec_of(32, 40, 8, layers=10)
    live, windows_TLE = initial_placement(spec), drifting(spec, 1, 4)
    plans = [plan(windows_TLE, spec, price=price) for price in (0.0, 0.1, 1.0, 100.0)]
    moves = [int(moved(planned, live, spec).sum()) for planned in plans]
    pars = [float(windows_par(windows_TLE, planned, spec.topology).mean()) for planned in plans]
    assert moves == sorted(moves, reverse=True)
    assert pars == sorted(pars)
    assert moves[-1] == 0 < moves[1] < moves[0]


def test_start_chooses_where_the_search_begins() -> None:
    """With live, complete layers are searched from there only; with scratch, none; auto adds scratch where much is left."""
    spec = spec_of(32, 40, 8, layers=6)
    windows_TLE, live = drifting(spec, 1, 5), initial_placement(spec)
    # a layer that repairs cannot help: three experts have all the load
    windows_TLE[:, 0], windows_TLE[:, 0, :3] = 1.0, 1e6

    def searched(start: Any, rows: IntArray) -> tuple[list[int], list[int]]:
        found = find_frontier(windows_TLE, rows, spec.topology, FrontierOptions(start=start))
        return found.repair.layers.tolist(), found.fresh.layers.tolist()

    assert searched("live", live) == ([0, 1, 2, 3, 4, 5], [])
    assert searched("scratch", live) == ([], [0, 1, 2, 3, 4, 5])
    repaired, fresh = searched("auto", live)
    assert repaired == [0, 1, 2, 3, 4, 5]
    assert set(fresh) <= {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("start", ["auto", "live", "scratch"])
def test_groups_stay_on_one_node(start: str) -> None:
    """Inside nodes all replicas of all experts of a group are on one node, and nodes share groups evenly.

    Also where the live placement breaks that, and where a plan from scratch has groups on other nodes than the live one.
    """
    spec = spec_of(32, 48, 8, layers=5, num_nodes=4, num_expert_groups=8)
    random = np.random.default_rng(0)
    live = random.permuted(initial_placement(spec), axis=1)
    for seed in range(3):
        live = plan(drifting(spec, 2, seed), spec, live, inside_nodes=True, start=start, price=float(seed % 2))
        groups = live.reshape(5, 4, 12) // 4
        assert all(len(set(node)) == 2 for layer in groups.tolist() for node in layer)


def test_nodes_do_not_matter_unless_asked() -> None:
    """Without inside_nodes, nodes and groups change nothing."""
    load_TLE = drifting(spec_of(32, 48, 8, layers=5), 2, 6)
    expected = plan(load_TLE, spec_of(32, 48, 8, layers=5))
    np.testing.assert_array_equal(
        plan(load_TLE, spec_of(32, 48, 8, layers=5, num_nodes=4, num_expert_groups=8)), expected
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target", 0.9),
        ("target", float("nan")),
        ("price", -0.1),
        ("most_moved", 1.1),
        ("most_moved", -0.1),
        ("noise", -1.0),
        ("even_windows", 65),
        ("most_windows", 0),
        ("start", "somewhere"),
        ("inside_nodes", "yes"),
    ],
)
def test_bad_settings_are_refused(field: str, value: Any) -> None:
    """The error names the field."""
    with pytest.raises(ConfigError, match=field):
        plan(np.ones(4), spec_of(4, 4, 2), **{field: value})


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**30])
def test_scale_does_not_matter(factor: float) -> None:
    """Loads times a constant give the same plan where noise is not asked for."""
    spec = spec_of(32, 40, 8, layers=6)
    windows_TLE = drifting(spec, 3, 7)
    expected = plan(windows_TLE, spec, noise=0.0)
    np.testing.assert_array_equal(plan(windows_TLE * factor, spec, noise=0.0), expected)


def test_layers_are_planned_one_by_one() -> None:
    """Layers in another order give the same rows in that order, unless a budget ties them together."""
    spec = spec_of(32, 40, 8, layers=6)
    windows_TLE = drifting(spec, 2, 8)
    live = np.random.default_rng(1).permuted(initial_placement(spec), axis=1)
    order = np.array([3, 0, 5, 1, 4, 2])
    expected = plan(windows_TLE, spec, live)
    np.testing.assert_array_equal(plan(windows_TLE[:, order], spec, live[order]), expected[order])


def test_without_load_nothing_moves() -> None:
    """A layer that had no load keeps its row, and a window without load counts as the mean of the others."""
    spec = spec_of(32, 40, 8, layers=3)
    windows_TLE, live = np.repeat(drifting(spec, 1, 9), 4, axis=0), initial_placement(spec)
    windows_TLE[:, 1] = 0.0
    expected = plan(windows_TLE, spec, **FREE)
    np.testing.assert_array_equal(expected[1], live[1])
    assert moved(expected, live, spec)[0] > 0
    windows_TLE[2, 0] = windows_TLE[3, 0] = 0.0
    np.testing.assert_array_equal(plan(windows_TLE, spec, **FREE), expected)


def test_empty_slots_are_filled() -> None:
    """Empty slots of the live placement get experts, whatever the price; there is nothing there to keep."""
    spec = spec_of(16, 24, 4, layers=3)
    live = initial_placement(spec)
    live[:, 16:] = -1
    planned = plan(drifting(spec, 1, 10), spec, live, price=1e3)
    assert (planned >= 0).all()
    assert replica_count(planned, 16).sum() == planned.size
    np.testing.assert_array_equal(planned[live >= 0], live[live >= 0])


def test_stays_where_it_has_arrived() -> None:
    """Planned again for the same load, placements that the policy made hardly move: under a price it is seldom worth it.

    Over many loads, because now and then a layer finds a better place from its new start, and then moves a tenth of its slots.
    """
    spec = spec_of(64, 72, 8, layers=8)
    again = 0
    for seed in range(20):
        windows_TLE = drifting(spec, 2, seed)
        first = plan(windows_TLE, spec)
        again += int(moved(plan(windows_TLE, spec, first), first, spec).sum())
    assert again <= 0.01 * 20 * spec.num_layers * spec.num_slots

"""What `frontier` found: moves against PAR, and the placements that can be had from it."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eplb_async.core.placement import initial_placement
from eplb_async.core.score import windows_par
from eplb_async.core.spec import MoESpec
from eplb_async.policies._frontier_layers import moved_slots, rows_at
from eplb_async.policies.frontier import FrontierOptions, find_frontier
from eplb_async.policies.frontier_curve import Frontier, Journals

SPEC = MoESpec(num_layers=5, num_experts=32, num_redundant=16, num_ranks=8)
PRICES = [0.0, 0.01, 0.1, 0.3, 1.0, 10.0]


def search(seed: int, num_windows: int = 1, **options: object) -> tuple[Frontier, NDArray[np.float64]]:
    """What is found for random loads from the initial placement, and the loads."""
    random = np.random.default_rng(seed)
    windows_TLE = random.lognormal(size=(5, 32)) * random.lognormal(sigma=0.4, size=(num_windows, 5, 32))
    windows_TLE *= 1e6 / windows_TLE.sum(axis=2, keepdims=True)
    settings_ = FrontierOptions(even_windows=0, **options)  # type: ignore[arg-type]
    return find_frontier(windows_TLE, initial_placement(SPEC), SPEC.topology, settings_), windows_TLE


def test_points_are_worth_having() -> None:
    """From the live placement, with no moves, on: more moves and less PAR at each point, however few the windows."""
    for seed, num_windows in ((0, 1), (1, 3)):
        found, windows_TLE = search(seed, num_windows)
        live_L = windows_par(windows_TLE, initial_placement(SPEC), SPEC.topology)
        for layer in range(5):
            points = found.points(layer)
            assert points[0][0] == 0
            assert points[0][1] == pytest.approx(live_L[layer])
            assert len(points) > 1
            for (moved, value), (more, less) in pairwise(points):
                assert moved < more
                assert value > less


def test_points_can_be_had() -> None:
    """Each point of each journal is the PAR and the moves of the placement that its steps lead to."""
    found, windows_TLE = search(2, 2, start="auto", price=0.02)
    assert min(len(found.fresh.layers), len(found.repair.layers)) > 0
    live_LP = initial_placement(SPEC)
    for journals in (found.repair, found.fresh):
        for step in range(int(journals.steps_L.max(initial=0)) + 1):
            chosen = np.minimum(step, journals.steps_L)
            rows = rows_at(journals.start_LP, journals.journal_LJ5, chosen)
            par_N = windows_par(windows_TLE[:, journals.layers], rows, SPEC.topology)
            moved_N = moved_slots(rows, live_LP[journals.layers], 32, 8)
            for row, last in enumerate(chosen):
                assert journals.points(row)[last][0] == moved_N[row]
                assert journals.points(row)[last][1] == pytest.approx(par_N[row])


@pytest.mark.parametrize("start", ["auto", "live", "scratch"])
def test_placement_is_the_best_point_for_its_price(start: str) -> None:
    """No point of a layer has a smaller PAR + price * share than the placement for that price, and it is one of them."""
    found, windows_TLE = search(3, 2, start=start)
    for price in PRICES:
        rows = found.placement(price)
        par_L = windows_par(windows_TLE, rows, SPEC.topology)
        moved_L = moved_slots(rows, initial_placement(SPEC), 32, 8)
        assert found.moved(price) == moved_L.sum()
        for layer in range(5):
            scores = [value + price * moved / SPEC.num_slots for moved, value in found.points(layer)]
            assert par_L[layer] + price * moved_L[layer] / SPEC.num_slots == pytest.approx(min(scores))


def test_experts_that_stay_keep_their_slot() -> None:
    """A slot changes only if its expert leaves the rank, so slots that differ are as many as moves."""
    found, _ = search(4)
    for price in PRICES:
        assert (found.placement(price) != initial_placement(SPEC)).sum() == found.moved(price)


@given(st.integers(0, 1000), st.integers(0, 120), st.sampled_from([0.0, 0.1, 1.0]))
@settings(max_examples=30, deadline=None)
def test_price_within_keeps_the_budget(seed: int, most_moved: int, least: float) -> None:
    """Moves fall as the price rises; the price found is at least the least, keeps the budget, and is the lowest that does."""
    found, _ = search(seed % 7)
    moves = [found.moved(price) for price in PRICES]
    assert moves == sorted(moves, reverse=True)
    price = found.price_within(most_moved, least)
    assert price >= least
    assert found.moved(price) <= most_moved
    assert price == least or found.moved(max(least, price * (1 - 1e-6) - 1e-9)) > most_moved


def test_worked_example() -> None:
    """PAR 1.5, then 1.3 after 2 moves and 1.25 after 4, and 1.2 after 6 by a plan from scratch; prices pick one of them."""
    live_LP = np.array([[0, 1, 2, 3]], dtype=np.int32)
    steps = np.array([[[0, 3, 3, 0, 2], [1, 2, 2, 1, 4]]], dtype=np.int32)
    repair = Journals(
        layers=np.array([0]),
        start_LP=live_LP,
        moved_L=np.array([0]),
        journal_LJ5=steps,
        par_LJ=np.array([[1.5, 1.3, 1.25]]),
        steps_L=np.array([2]),
    )
    nothing = Journals(
        layers=np.array([], dtype=np.int64),
        start_LP=live_LP[:0],
        moved_L=np.array([], dtype=np.int64),
        journal_LJ5=steps[:0],
        par_LJ=np.ones((0, 3)),
        steps_L=np.array([], dtype=np.int64),
    )
    found = Frontier(live_LP=live_LP, slots_per_rank=2, repair=repair, fresh=nothing)
    assert found.points(0) == [(0, 1.5), (2, 1.3), (4, 1.25)]
    # per slot 0.1 is worth a step, 0.025 another: times 4 slots
    assert [found.moved(price) for price in (0.09, 0.11, 0.39, 0.41)] == [4, 2, 2, 0]
    assert found.placement(0.2).tolist() == [[3, 1, 2, 0]]
    assert found.price_within(3, 0.0) == pytest.approx(0.1)
    assert found.price_within(1, 0.0) == pytest.approx(0.4)
    assert found.price_within(1, 2.0) == 2.0

"""The compiled search of `frontier` equals its plain twin, keeps its state exactly, and writes down only what is true."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eplb_async.core.placement import replica_count
from eplb_async.core.score import windows_par
from eplb_async.core.spec import Topology
from eplb_async.policies import _frontier_ceilings, _frontier_layers, _frontier_state, _frontier_steps
from tests.policies import twins_frontier

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]


@dataclass
class Layers:
    """Random layers to search, with loads that differ in all digits: no step is as good as another but for rounding."""

    load_TLE: FloatArray
    start_LP: IntArray
    live_LP: IntArray
    node_LE: NDArray[np.int64]
    topology: Topology
    most: int

    @property
    def node_R(self) -> NDArray[np.int64]:
        """Node of each rank."""
        return np.arange(self.topology.num_ranks) // self.topology.ranks_per_node

    def search(  # size: what a search depends on
        self,
        price: float = 0.0,
        spread: float = 1.0,
        patience: int = 6,
        bar: float = 1.0,
        waterline: float = 1.0,
        most_steps: int = 30,
    ) -> tuple[IntArray, FloatArray, NDArray[np.int64], NDArray[np.int64]]:
        """`search_layers` of them."""
        load_LET = np.ascontiguousarray(self.load_TLE.transpose(1, 2, 0))
        bars_L2 = np.tile([bar, waterline], (len(self.live_LP), 1))
        limits, prices = (self.most, most_steps, patience), (price, spread)
        found = _frontier_layers.search_layers(
            load_LET, self.start_LP, self.live_LP, self.node_LE, self.node_R, limits, bars_L2, prices
        )
        return found[0], found[1], found[2], found[3]

    def plain(self, waterline: float, spread: float) -> twins_frontier.Plain:
        """The plain twin of the first of them."""
        return twins_frontier.Plain(
            self.load_TLE[:, 0].T,
            self.start_LP[0].copy(),
            self.live_LP[0],
            self.node_LE[0],
            self.node_R,
            self.most,
            waterline,
            spread,
        )

    def state(self, layer: int, waterline: float = 1.0, spread: float = 1.0) -> _frontier_state.LayerState:
        """The state of one of them at its start; its row is a copy."""
        return state_of(
            self.load_TLE[:, layer].T,
            self.start_LP[layer].copy(),
            self.live_LP[layer],
            (self.node_LE[layer], self.node_R, self.most),
            (waterline, spread),
        )


def state_of(
    load_ET: FloatArray,
    row_P: IntArray,
    live_P: IntArray,
    nodes: tuple[NDArray[np.int64], NDArray[np.int64], int],
    settings_: tuple[float, float],
) -> _frontier_state.LayerState:
    """`layer_state`; nodes: of experts and ranks, and most replicas; settings: waterline and spread."""
    load_ET = np.ascontiguousarray(load_ET)
    state: _frontier_state.LayerState = _frontier_state.layer_state(load_ET, row_P, live_P, *nodes, *settings_)
    return state


def random_rows(random: np.random.Generator, shape: tuple[int, int, int], node_LE: NDArray[np.int64]) -> IntArray:
    """Complete rows without duplicates on a rank, experts on ranks of their node; shape: L, R, S."""
    layers, ranks, width = shape
    nodes = int(node_LE.max()) + 1
    rows = np.empty(shape, dtype=np.int32)
    for layer in range(layers):
        for node in range(nodes):
            own = random.permutation(np.flatnonzero(node_LE[layer] == node))
            spare = np.concatenate([random.permutation(own) for _ in range(ranks // nodes)])
            held: list[list[int]] = [[] for _ in range(ranks // nodes)]
            # one of each first; then whatever comes, on the first rank with room that has not got it
            for expert in [*own.tolist(), *spare.tolist()]:
                room = [rank for rank in held if len(rank) < width and expert not in rank]
                if room:
                    min(room, key=len).append(expert)
            rows[layer, node * ranks // nodes : (node + 1) * ranks // nodes] = held
    return rows.reshape(layers, ranks * width)


def random_layers(seed: int, windows: int = 1, nodes: int = 1, num_layers: int = 2) -> Layers:
    """Layers of a few shapes; in half of them the live placement is another than the start, with empty slots."""
    random = np.random.default_rng(seed)
    per_node, width = int(random.integers(2, 12 // nodes)), int(random.choice([2, 3, 4, 4, 5]))
    own = int(random.integers(width + per_node * width // 3, per_node * width + 1)) if width < 5 else per_node * 4
    ranks, experts = nodes * per_node, nodes * own
    node_LE = random.permuted(np.tile(np.arange(experts) % nodes, (num_layers, 1)), axis=1)
    start_LP = random_rows(random, (num_layers, ranks, width), node_LE)
    live_LP = start_LP.copy()
    if seed % 2:
        live_LP = random_rows(random, (num_layers, ranks, width), node_LE)
        live_LP[random.random(live_LP.shape) < 0.1] = -1
    shape = (num_layers, experts)
    load_TLE = random.lognormal(sigma=1.2, size=shape) * random.lognormal(sigma=0.5, size=(windows, *shape))
    load_TLE *= ranks / load_TLE.sum(axis=2, keepdims=True)
    topology = Topology(num_ranks=ranks, slots_per_rank=width, num_nodes=nodes)
    return Layers(load_TLE, start_LP, live_LP, node_LE, topology, per_node)


def step_candidates(state: _frontier_state.LayerState) -> list[tuple[int, int, int]]:
    """Every step that keeps a state valid: slot, its new expert, second slot or -1."""
    width, (num_experts, most) = len(state.row_P) // len(state.node_R), state.host_EK.shape
    found = []
    for slot, held in enumerate(state.row_P.tolist()):
        rank = slot // width
        others = [expert for expert in range(num_experts) if not state.on_RE[rank, expert]]
        if state.count_E[held] > 1:
            found += [(slot, expert, -1) for expert in others if state.count_E[expert] < most]
        for second, other in enumerate(state.row_P.tolist()):
            if not state.on_RE[rank, other] and not state.on_RE[second // width, held]:
                found.append((slot, other, second))
    return found


def test_worked_examples_of_the_state() -> None:
    """The numbers in the docstrings of `above`, `layer_state`, `mean_peak` and `take_step` are right."""
    load_RT, load_ET = np.array([[1.5]]), np.array([[2.0], [4.0]])
    assert _frontier_state.above(load_RT, load_ET, 1.25, 0, 0, -0.5, 1, 0.25) == pytest.approx(0.19)
    nodes = (np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64), 2)
    row = np.array([0, 1, 0, 1], dtype=np.int32)
    state = state_of(np.array([[1.5], [0.5]]), row, row, nodes, (1.0, 0.0))
    assert state.load_RT.tolist() == [[1.0], [1.0]]
    assert _frontier_state.mean_peak(np.array([[1.5, 1.0], [0.5, 1.0]])) == 1.25
    nodes = (np.zeros(4, dtype=np.int64), np.zeros(2, dtype=np.int64), 2)
    row = np.array([0, 1, 2, 3], dtype=np.int32)
    state = state_of(np.ones((4, 1)), row, row, nodes, (1.0, 0.0))
    _frontier_state.take_step(state, 0, 3, 3)
    assert state.row_P.tolist() == [3, 1, 2, 0]


def test_worked_example_of_the_relief() -> None:
    """The numbers in the docstring of `refresh_relief` are right."""
    nodes = (np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64), 2)
    row = np.array([0, 1], dtype=np.int32)
    state = state_of(np.array([[1.5], [0.5]]), row, row, nodes, (1.0, 0.0))
    _frontier_state.refresh_relief(state)
    assert state.relief_E == pytest.approx([0.501875, 0.0])


def test_worked_examples_of_the_ceilings() -> None:
    """The numbers in the docstrings of `leaving_slot`, `others_than` and `highest_of` are right."""
    nodes = (np.zeros(3, dtype=np.int64), np.zeros(2, dtype=np.int64), 2)
    row = np.array([0, 1, 2, 1], dtype=np.int32)
    state = state_of(np.array([[1.6], [0.2], [0.2]]), row, row, nodes, (1.0, 0.0))
    leaving = _frontier_ceilings.leaving_slot(state, 3, 1, 0.2015)
    assert (leaving.held, leaving.stays, leaving.gives, leaving.weight) == (1, 0.0, -0.5, 1.0)
    assert leaving.base == pytest.approx(-0.1966)
    others_E = np.zeros(3)
    assert _frontier_ceilings.others_than(np.array([0], dtype=np.int32), np.array([0.5, 0.2, 0.3]), others_E) == 0.3
    assert others_E.tolist() == [-np.inf, 0.2, 0.3]
    assert _frontier_ceilings.highest_of(np.array([-3.0, 0.5, -np.inf])) == 0.5
    assert _frontier_ceilings.highest_of(np.array([-3.0, -np.inf])) == 0.0


def test_worked_example_of_ranks_in_common() -> None:
    """The numbers in the docstring of `in_common` are right."""
    nodes = (np.zeros(5, dtype=np.int64), np.zeros(2, dtype=np.int64), 2)
    row = np.array([0, 1, 2, 1, 3, 4], dtype=np.int32)
    state = state_of(np.array([[0.6], [0.4], [0.8], [0.1], [0.1]]), row, row, nodes, (1.0, 0.0))
    leaving = _frontier_ceilings.leaving_slot(state, 3, 1, 0.0)
    assert _frontier_steps.in_common(state, leaving, 0) == pytest.approx(0.1212)
    assert _frontier_steps.in_common(state, leaving, 3) == 0.0


@given(st.integers(0, 10_000), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_no_expert_brings_more_than_its_ceiling(seed: int, windows: int) -> None:
    """With one window a ceiling is what the expert brings, where it and the one that goes have no other rank in common."""
    layers, random = random_layers(seed, windows, num_layers=1), np.random.default_rng(seed)
    waterline, spread = float(random.choice([1.0, 1.3])), float(random.choice([0.0, 2.0]))
    state, plain = layers.state(0, waterline, spread), layers.plain(waterline, spread)
    _frontier_state.refresh_relief(state)
    for slot in np.flatnonzero(state.count_E[state.row_P] > 1).tolist():
        rank, held = slot // plain.width, int(state.row_P[slot])
        _frontier_ceilings.others_than(state.row_P[plain.slots(rank)], state.relief_E, state.others_E)
        leaving = _frontier_ceilings.leaving_slot(state, slot, rank, twins_frontier.harm_of(plain, slot))
        highest = _frontier_ceilings.work_out_ceilings(state, leaving)
        assert highest == max(0.0, state.ceiling_E.max())
        comers = twins_frontier.comers_of(plain, slot)
        for expert, (_, rate, _) in comers.items():
            assert state.ceiling_E[expert] >= rate - 1e-9
            if windows == 1 and not (plain.hosts(expert) & plain.hosts(held)).any():
                assert state.ceiling_E[expert] == pytest.approx(rate, abs=1e-9)
        others = [expert for expert in range(len(state.count_E)) if expert not in comers]
        assert (state.ceiling_E[others] == -np.inf).all()


def test_worked_examples_of_the_layers() -> None:
    """The numbers in the docstrings of `complete_rows`, `cheapest`, `rows_at` and `moved_slots` are right."""
    live, nowhere = np.array([[0, 1, 1, -1]], dtype=np.int32), np.zeros((1, 2), dtype=np.int64)
    rows, done = _frontier_layers.complete_rows(live, np.array([[6.0, 2.0]]), nowhere, np.zeros(2, dtype=np.int64), 2)
    assert (rows.tolist(), done.tolist()) == ([[0, 1, 1, 0]], [True])
    journal = np.full((1, 2, 5), -1, dtype=np.int32)
    journal[0, :, 4] = 2, 4
    pars, steps, moved = np.array([[1.5, 1.3, 1.25]]), np.array([2]), np.array([0])
    chosen, score, filled = _frontier_layers.cheapest(journal, pars, steps, moved, 0.05)
    assert (chosen.tolist(), filled.tolist()) == ([1], [2])
    assert score == pytest.approx([1.4])
    start, step = np.array([[0, 1, 2, 3]], dtype=np.int32), np.array([[[0, 3, 3, 0, 2]]], dtype=np.int32)
    after = _frontier_layers.rows_at(start, step, np.array([1]))
    assert after.tolist() == [[3, 1, 2, 0]]
    assert _frontier_layers.moved_slots(np.array([[3, 0, 1, 2]], dtype=np.int32), start, 4, 2).tolist() == [2]


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_state_follows_every_step(seed: int, windows: int, nodes: int) -> None:
    """After any steps the state is what `layer_state` makes of the row, but for rounding and the order of hosts."""
    layers, random = random_layers(seed, windows, nodes, num_layers=1), np.random.default_rng(seed)
    state = layers.state(0, waterline=1.1)
    for _ in range(12):
        candidates = step_candidates(state)
        if not candidates:
            break
        slot, expert, second = candidates[random.integers(len(candidates))]
        _frontier_state.take_step(state, slot, expert, second)
        layers.start_LP[0] = state.row_P
        fresh = layers.state(0, waterline=1.1)
        np.testing.assert_allclose(state.load_RT, fresh.load_RT, atol=1e-9)
        np.testing.assert_allclose(state.above_R, fresh.above_R, atol=1e-9)
        for each in (state, fresh):
            _frontier_state.refresh_relief(each)
        np.testing.assert_array_equal(state.over_R, fresh.over_R)
        np.testing.assert_allclose(state.relief_E, fresh.relief_E, atol=1e-9)
        np.testing.assert_allclose(state.splits_E, fresh.splits_E, atol=1e-9)
        np.testing.assert_allclose(state.share_E, fresh.share_E, atol=1e-9)
        np.testing.assert_array_equal(state.count_E, fresh.count_E)
        np.testing.assert_array_equal(state.on_RE, fresh.on_RE)
        np.testing.assert_array_equal(np.sort(state.host_EK, axis=1), np.sort(fresh.host_EK, axis=1))
        used = np.arange(layers.most) < state.count_E[:, None]
        assert (state.host_EK[used] >= 0).all()


@pytest.mark.parametrize(("windows", "nodes"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_search_equals_its_twin(windows: int, nodes: int) -> None:
    """The compiled search takes the steps of the plain one, from any start, for any price, spread and waterline.

    It is compared up to the first step for which another is exactly as good, where rounding decides.
    """
    compared = steps_in_all = 0
    for seed in range(8):
        layers, random = random_layers(seed, windows, nodes, num_layers=1), np.random.default_rng(seed)
        price, spread = float(random.choice([0.0, 0.003])), float(random.choice([0.0, 1.0, 3.0]))
        bar, waterline = float(random.choice([1.0, 1.5])), float(random.choice([1.0, 1.05]))
        journal, pars, steps, moved = layers.search(price, spread, patience=3, bar=bar, waterline=waterline)
        plain = layers.plain(waterline, spread)
        assert plain.moved(plain.row_P) == moved[0]
        expected = list(twins_frontier.journal_twin(plain, price, (30, 3), bar))
        found = journal[0, : steps[0]].tolist()
        same = next((i for i, (one, two) in enumerate(zip(found, expected, strict=False)) if one != two[0]), None)
        if same is None:
            assert len(found) == len(expected)
            same = len(found)
        else:
            layers.start_LP = _frontier_layers.rows_at(layers.start_LP, journal, np.array([same]))
            assert equally_good(layers.plain(waterline, spread), found[same], expected[same][0])
        np.testing.assert_allclose(pars[0, 1 : same + 1], [value for _, value in expected[:same]])
        assert (journal[0, steps[0] :] == -1).all()
        compared, steps_in_all = compared + same, steps_in_all + len(found)
    assert compared > max(30, 0.6 * steps_in_all)


def equally_good(plain: twins_frontier.Plain, *steps: list[int]) -> bool:
    """Whether two ranks hold the same experts, or the steps lead to the same rank loads but for the order of ranks."""
    held = np.sort(plain.row_P.reshape(-1, plain.width), axis=1)
    after = [np.sort(plain.above(plain.after(slot, second, expert))) for slot, expert, second, *_ in steps]
    return len(np.unique(held, axis=0)) < len(held) or np.allclose(after[0], after[1])


@pytest.mark.parametrize("nodes", [1, 2])
def test_journals_are_true(nodes: int) -> None:
    """At each point of a journal the placement is valid, and PAR and moves are those that `core.score` and a count give."""
    for seed in range(8):
        layers = random_layers(seed, windows=1 + seed % 3, nodes=nodes, num_layers=3)
        journal, pars, steps, moved = layers.search()
        topology, experts = layers.topology, layers.load_TLE.shape[2]
        for step in range(int(steps.max()) + 1):
            chosen = np.minimum(step, steps)
            rows = _frontier_layers.rows_at(layers.start_LP, journal, chosen)
            np.testing.assert_allclose(
                pars[np.arange(3), chosen], windows_par(layers.load_TLE, rows, topology), rtol=1e-9
            )
            count = replica_count(rows, experts)
            assert count.min() >= 1
            assert count.max() <= layers.most
            by_rank = rows.reshape(3, topology.num_ranks, -1)
            assert all(len(set(held)) == len(held) for layer in by_rank.tolist() for held in layer)
            slot_node = np.repeat(layers.node_R, topology.slots_per_rank)
            np.testing.assert_array_equal(
                np.take_along_axis(layers.node_LE, rows, axis=1), np.broadcast_to(slot_node, rows.shape)
            )
            live = layers.live_LP.reshape(by_rank.shape)
            new = sum(
                expert not in live[layer, rank]
                for layer, rank in np.ndindex(3, topology.num_ranks)
                for expert in by_rank[layer, rank]
            )
            told = [journal[row, last - 1, 4] if last else moved[row] for row, last in enumerate(chosen)]
            assert sum(told) == new


def test_completing_equals_its_twin() -> None:
    """Empty slots and second replicas on a rank are filled as by the plain loop, and it is told where that failed."""
    outcomes = set()
    for seed in range(120):
        nodes, random = 1 + seed % 2, np.random.default_rng(seed)
        layers = random_layers(2 * seed, nodes=nodes, num_layers=1)
        live = layers.live_LP.copy()
        for slot in random.permutation(live.shape[1])[: live.shape[1] // 2]:
            if (live[0] == live[0, slot]).sum() > 1:
                live[0, slot] = -1
        if seed % 3 == 0:
            # a second replica beside the first one, where a slot is free
            for slot in np.flatnonzero(live[0] < 0):
                beside = live[0, slot - slot % layers.topology.slots_per_rank]
                live[0, slot] = beside if random.random() < 0.5 else -1
        if seed % 5 == 0:
            layers.node_LE[0, :2] = layers.node_LE[0, 1::-1]
        load_E, most = layers.load_TLE[0, 0], int(random.integers(1, layers.most + 1))
        rows, done = _frontier_layers.complete_rows(live, load_E[None], layers.node_LE, layers.node_R, most)
        expected = twins_frontier.complete_row_twin(live[0], load_E, layers.node_LE[0], layers.node_R, most)
        assert done[0] == (expected is not None)
        if expected is not None:
            assert rows[0].tolist() == expected
        outcomes.add(bool(done[0]))
    assert outcomes == {True, False}


def test_cheapest_is_the_first_best_point() -> None:
    """`cheapest` finds the least PAR + price * moves of all points, and of equals the one with fewest steps."""
    layers = random_layers(3, windows=2, num_layers=4)
    journal, pars, steps, moved = layers.search()
    for price in (0.0, 0.001, 0.01, 0.1, 10.0):
        chosen, score, filled = _frontier_layers.cheapest(journal, pars, steps, moved, price)
        for row in range(4):
            points = [(moved[row], pars[row, 0])]
            points += [(journal[row, step, 4], pars[row, step + 1]) for step in range(steps[row])]
            scores = [value + price * count for count, value in points]
            assert (chosen[row], filled[row]) == (np.argmin(scores), points[int(np.argmin(scores))][0])
            assert score[row] == min(scores)


def test_steps_do_not_outgrow_experts() -> None:
    """Eight times the experts and ranks take no more steps per expert. The loops of a step are over slots, experts and windows."""
    per_expert = []
    for factor in (1, 8):
        random = np.random.default_rng(factor)
        ranks, shape, node_LE = 8 * factor, (8, 64 * factor), np.zeros((8, 64 * factor), dtype=np.int64)
        start_LP = random_rows(random, (8, ranks, 9), node_LE)
        load_TLE = random.lognormal(size=(1, *shape))
        load_TLE *= ranks / load_TLE.sum(axis=2, keepdims=True)
        layers = Layers(load_TLE, start_LP, start_LP, node_LE, Topology(num_ranks=ranks, slots_per_rank=9), ranks)
        _, pars, steps, _ = layers.search(bar=1.05, waterline=1.05, most_steps=2000)
        assert pars[np.arange(8), steps].mean() < 1.06
        per_expert.append(steps.mean() / shape[1])
    assert per_expert[1] < 1.5 * per_expert[0]

"""PAR and balancedness against plain loops over slots."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_async.core.score import balancedness, par, rank_load, windows_par
from eplb_async.core.spec import Topology
from tests.core.placements import Case, cases


def naive_rank_load(load_E: list[float], row_P: list[int], topology: Topology) -> list[float]:
    """Every slot gets its share of its expert's tokens."""
    ranks = [0.0] * topology.num_ranks
    for slot, expert in enumerate(row_P):
        if expert >= 0:
            ranks[slot // topology.slots_per_rank] += load_E[expert] / row_P.count(expert)
    return ranks


def naive_par(ranks: list[float]) -> float:
    """Max / mean, 1 without load."""
    return max(ranks) / (sum(ranks) / len(ranks)) if sum(ranks) else 1.0


def draw_windows(data: st.DataObject, case: Case, windows: int) -> list[list[list[float]]]:
    """Loads [T][L][E] with zeros among them."""
    size = windows * len(case.rows) * case.spec.num_experts
    values = data.draw(st.lists(st.integers(0, 1000), min_size=size, max_size=size))
    loads: list[list[list[float]]] = np.array(values).reshape(windows, len(case.rows), -1).tolist()
    return loads


@given(data=st.data(), case=cases(layers=2))
def test_scores_equal_plain_loops(data: st.DataObject, case: Case) -> None:
    """rank_load, par, balancedness and windows_par for any load of any valid placement, windows weighted by tokens."""
    topology, layers = case.spec.topology, range(len(case.rows))
    loads = draw_windows(data, case, windows=3)
    ranks = [[naive_rank_load(load[layer], case.rows[layer].tolist(), topology) for layer in layers] for load in loads]
    load_TLE, rows_LP = np.array(loads), np.stack(case.rows)
    found = rank_load(load_TLE, rows_LP, topology)
    np.testing.assert_allclose(found, ranks)
    np.testing.assert_allclose(rank_load(load_TLE[0], rows_LP, topology), ranks[0])
    np.testing.assert_allclose(par(found), [[naive_par(row) for row in window] for window in ranks])
    for layer in layers:
        tokens = [sum(window[layer]) for window in ranks]
        weighted = sum(naive_par(window[layer]) * weight for window, weight in zip(ranks, tokens, strict=True))
        expected = weighted / sum(tokens) if sum(tokens) else 1.0
        assert windows_par(load_TLE, rows_LP, topology)[layer] == pytest.approx(expected)
    peak = sum(max(row) for row in ranks[0])
    mean = sum(sum(row) / len(row) for row in ranks[0])
    assert balancedness(found[0]) == pytest.approx(mean / peak if peak else 1.0)


def test_worked_examples() -> None:
    """The docstrings' numbers: expert 0 puts 3 on each rank, so the ranks have 5 and 3 and the PAR is 1.25."""
    topology = Topology(num_ranks=2, slots_per_rank=2)
    load_LR = rank_load(np.array([[6, 2]]), np.array([[0, 1, 0, -1]], dtype=np.int32), topology)
    assert load_LR.tolist() == [[5, 3]]
    assert par(load_LR).tolist() == [1.25]
    assert balancedness(load_LR) == pytest.approx(4 / 5)


def test_no_load_is_perfect_balance() -> None:
    """Without tokens PAR and balancedness are 1, not nan."""
    zero_LR = np.zeros((2, 4))
    assert par(zero_LR).tolist() == [1.0, 1.0]
    assert balancedness(zero_LR) == 1.0

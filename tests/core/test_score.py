"""PAR and balancedness against plain loops over slots."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_async.core.placement import expert_to_slots
from eplb_async.core.score import balancedness, even_share, par, rank_load, table_share, windows_par
from eplb_async.core.spec import Topology
from tests.core.placements import Case, cases


def naive_rank_load(
    load_E: list[float], row_P: list[int], topology: Topology, table: list[list[int]] | None = None
) -> list[float]:
    """Every slot gets its share of its expert's tokens: each entry of the expert's row, or each slot, as much."""
    ranks = [0.0] * topology.num_ranks
    for expert, load in enumerate(load_E):
        row = table[expert] if table else [slot for slot, held in enumerate(row_P) if held == expert]
        for slot in row:
            ranks[slot // topology.slots_per_rank] += load / len(row)
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


@given(data=st.data(), case=cases(layers=1))
def test_shares_are_those_of_the_table(data: st.DataObject, case: Case) -> None:
    """Ranks get what a table with repeats sends them; an even table, and no shares at all, are the even split."""
    spec, row_P = case.spec, case.rows[0]
    topology, num_slots = spec.topology, spec.num_slots
    even_LEK, count_LE = expert_to_slots(row_P[None], spec.num_experts, spec.max_replicas)
    np.testing.assert_allclose(
        table_share(even_LEK[0], count_LE[0], num_slots), even_share(row_P[None], spec.num_experts)[0]
    )
    slots = [np.flatnonzero(row_P == expert).tolist() for expert in range(spec.num_experts)]
    table = [sorted(row * 2 + data.draw(st.lists(st.sampled_from(row), max_size=3))) for row in slots]
    width = max(len(row) for row in table)
    table_EK = np.array([row + [-1] * (width - len(row)) for row in table], dtype=np.int32)
    share_P = table_share(table_EK, np.array([len(row) for row in table], dtype=np.int32), num_slots)
    windows = draw_windows(data, case, windows=2)
    expected = [naive_rank_load(load[0], row_P.tolist(), topology, table) for load in windows]
    found = rank_load(np.array(windows, dtype=np.int64), row_P[None], topology, share_P[None])
    np.testing.assert_allclose(found[:, 0], expected)
    tokens = [sum(load[0]) for load in windows]
    weighted = sum(naive_par(ranks) * weight for ranks, weight in zip(expected, tokens, strict=True))
    mean = weighted / sum(tokens) if sum(tokens) else 1.0
    assert windows_par(np.array(windows), row_P[None], topology, share_P[None])[0] == pytest.approx(mean)


def test_worked_examples() -> None:
    """The docstrings' numbers: expert 0 puts 3 on each rank, so the ranks have 5 and 3 and the PAR is 1.25."""
    topology = Topology(num_ranks=2, slots_per_rank=2)
    load_LR = rank_load(np.array([[6, 2]]), np.array([[0, 1, 0, -1]], dtype=np.int32), topology)
    assert load_LR.tolist() == [[5, 3]]
    row_LP = np.array([[0, 1, 0, -1]], dtype=np.int32)
    assert even_share(row_LP, 2).tolist() == [[0.5, 1, 0.5, 0]]
    table_EK = np.array([[0, 2, 2, 2], [1, -1, -1, -1]], dtype=np.int32)
    share_P = table_share(table_EK, np.array([4, 1], dtype=np.int32), 4)
    assert share_P.tolist() == [0.25, 1, 0.75, 0]
    assert rank_load(np.array([[6, 2]]), row_LP, topology, share_P[None]).tolist() == [[3.5, 4.5]]
    assert par(load_LR).tolist() == [1.25]
    assert balancedness(load_LR) == pytest.approx(4 / 5)


def test_no_load_is_perfect_balance() -> None:
    """Without tokens PAR and balancedness are 1, not nan."""
    zero_LR = np.zeros((2, 4))
    assert par(zero_LR).tolist() == [1.0, 1.0]
    assert balancedness(zero_LR) == 1.0

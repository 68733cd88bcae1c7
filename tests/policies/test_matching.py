"""The compiled loops that fit bins to the live placement equal their plain twins, and never break a bin up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eplb_async.policies import _matching
from tests.policies import twins


def rows(*values: list[int]) -> NDArray[np.int32]:
    """A placement from its rows."""
    return np.array(values, dtype=np.int32)


def sparse(score: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The pairs that score, row by row, as `assign` takes them."""
    row_M, column_M = score.nonzero()
    return np.searchsorted(row_M, np.arange(len(score) + 1)), column_M, score[row_M, column_M]


def dense(first_N: NDArray[np.int64], column_M: NDArray[np.int64], score_M: NDArray[np.int64]) -> NDArray[np.int64]:
    """The matrix of these pairs."""
    score = np.zeros((len(first_N) - 1, len(first_N) - 1), dtype=np.int64)
    score[np.repeat(np.arange(len(score)), np.diff(first_N)), column_M] = score_M
    return score


def draw_bins(
    seed: int, num_layers: int = 4, ranks: int = 6, per_rank: int = 4
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Two random placements of 16 experts; the second (live) has empty slots."""
    random = np.random.default_rng(seed)
    planned, live = random.integers(0, 16, size=(2, num_layers, ranks * per_rank), dtype=np.int32)
    live[random.random(live.shape) < 0.2] = -1
    return planned, live


@pytest.mark.parametrize("seed", range(5))
def test_keep_slots_equals_its_twin(seed: int) -> None:
    """With repeated experts and empty live slots too."""
    planned, live = draw_bins(seed)
    np.testing.assert_array_equal(_matching.keep_slots(planned, live, 4), twins.keep_slots_twin(planned, live, 4))


def test_worked_examples() -> None:
    """The numbers in the docstrings are right."""
    assert _matching.keep_slots(rows([3, 1, 2]), rows([1, 0, 3]), 3).tolist() == [[1, 2, 3]]
    pairs = _matching.shared_experts(rows([0, 0, 1, 2])[0], rows([0, 1, 0, 0])[0], 3, 2)
    assert [array.tolist() for array in pairs] == [[0, 2, 3], [0, 1, 0], [1, 2, 1]]
    assert dense(*pairs).tolist() == [[1, 2], [1, 0]]
    assert _matching.assign(*pairs).tolist() == [1, 0]
    assert _matching.match_ranks(rows([0, 1, 2, 3]), rows([3, 2, 0, 5]), 6, 2, 1).tolist() == [[2, 3, 0, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_shared_experts_equals_its_twin(seed: int) -> None:
    """Multiset intersections, empty slots shared with nobody."""
    planned, live = draw_bins(seed)
    shared = _matching.shared_experts(planned[0], live[0], 16, 4)
    np.testing.assert_array_equal(dense(*shared), twins.shared_experts_twin(planned[0], live[0], 4))
    assert (shared[2] > 0).all()


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_assign_is_optimal(data: st.DataObject) -> None:
    """It returns a permutation whose score no other of the n! has beaten."""
    size = data.draw(st.integers(1, 6))
    score = np.array(data.draw(st.lists(st.integers(0, 9), min_size=size**2, max_size=size**2)), dtype=np.int64)
    score = score.reshape(size, size)
    columns = _matching.assign(*sparse(score))
    assert sorted(columns.tolist()) == list(range(size))
    assert score[np.arange(size), columns].sum() == twins.best_assignment_score(score)
    assert score[np.arange(size), twins.assign_twin(score)].sum() == twins.best_assignment_score(score)


@pytest.mark.parametrize(("ranks", "per_rank"), [(40, 2), (64, 5), (96, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_assign_is_optimal_on_many_ranks(ranks: int, per_rank: int, seed: int) -> None:
    """The dense Hungarian method, one row after the other, finds no greater sum; few experts have many replicas."""
    random = np.random.default_rng(seed)
    experts = ranks * per_rank // 2
    share_E = 1.0 / np.arange(1, experts + 1)
    planned, live = random.choice(experts, size=(2, ranks * per_rank), p=share_E / share_E.sum()).astype(np.int32)
    score = twins.shared_experts_twin(planned, live, per_rank)
    columns = _matching.assign(*_matching.shared_experts(planned, live, experts, per_rank))
    assert sorted(columns.tolist()) == list(range(ranks))
    assert score[np.arange(ranks), columns].sum() == score[np.arange(ranks), twins.assign_twin(score)].sum()


@pytest.mark.parametrize("seed", range(3))
def test_match_ranks_keeps_most_experts(seed: int) -> None:
    """On one node: bins are only reordered, and as many experts stay as any order of bins allows."""
    planned, live = draw_bins(seed, ranks=5)
    matched = _matching.match_ranks(planned, live, 16, 4, 1)
    for layer in range(len(planned)):
        score = twins.shared_experts_twin(planned[layer], live[layer], 4)
        stays = twins.shared_experts_twin(matched[layer], live[layer], 4).trace()
        assert stays == twins.best_assignment_score(score)
        assert sorted(matched[layer].reshape(5, 4).tolist()) == sorted(planned[layer].reshape(5, 4).tolist())


def test_match_ranks_keeps_nodes_together() -> None:
    """The bins of one planned node all land on one node, the one that shares most experts with it."""
    planned = rows([0, 1, 2, 3, 4, 5, 6, 7])
    live = rows([6, 7, 4, 5, 2, 0, 3, 1])
    # node [0..3] goes to the second node: [0, 1] and [2, 3] share one expert with each live rank there
    assert _matching.match_ranks(planned, live, 8, 2, 2).tolist() == [[6, 7, 4, 5, 0, 1, 2, 3]]


def test_a_plan_like_the_live_placement_moves_nothing() -> None:
    """Bins in any order that the ranks hold already: matching and keeping give the live placement back."""
    live = np.random.default_rng(0).permutation(24).astype(np.int32)[None]
    shuffled = np.random.default_rng(1).permutation(live.reshape(6, 4)).reshape(1, 24)
    matched = _matching.match_ranks(np.ascontiguousarray(shuffled[:, ::1]), live, 24, 4, 1)
    np.testing.assert_array_equal(_matching.keep_slots(matched, live, 4), live)

"""A layer taken apart as the dispatch loops see it, and random windows, for the tests of both."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from eplb_async.core.score import rank_load
from eplb_async.core.spec import Topology
from eplb_async.policies import _dispatch
from tests.core.placements import Case

__all__ = ["Parts", "draw_windows", "take_apart"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class Parts:
    """A layer taken apart, as the loops see it: split experts with their places, the rest fixed."""

    load_XT: FloatArray
    first_X: NDArray[np.int64]
    rank_Q: NDArray[np.int64]
    low_Q: FloatArray
    share_Q: FloatArray
    load_RT: FloatArray
    places: list[list[int]]

    @property
    def arguments(self) -> tuple[FloatArray, NDArray[np.int64], NDArray[np.int64], FloatArray, FloatArray, FloatArray]:
        """Copies, in the order of the loops' arguments."""
        changed = self.share_Q.copy(), self.load_RT.copy()
        return self.load_XT, self.first_X, self.rank_Q, self.low_Q, *changed

    def by_expert(self, values_Q: FloatArray) -> list[FloatArray]:
        """A copy of values of places, per expert."""
        return [values_Q[a:b].copy() for a, b in pairwise(self.first_X.tolist())]

    @property
    def fixed_and_free(self) -> tuple[FloatArray, FloatArray]:
        """Tokens that stay on each rank whatever the shares [R, T], and those of each split expert that need not [X, T]."""
        fixed_RT, free_XT = self.load_RT.copy(), self.load_XT.copy()
        for index in range(len(self.places)):
            for place in range(self.first_X[index], self.first_X[index + 1]):
                fixed_RT[self.rank_Q[place]] += (self.low_Q[place] - self.share_Q[place]) * self.load_XT[index]
            free_XT[index] *= 1 - self.low_Q[self.first_X[index] : self.first_X[index + 1]].sum()
        return fixed_RT, free_XT


def take_apart(windows_TE: FloatArray, row_P: IntArray, topology: Topology) -> Parts:
    """The parts of a layer with even shares."""
    length, num_experts = topology.max_replicas, windows_TE.shape[1]
    expert_X, first_X, rank_Q, copies_Q = _dispatch.split_experts(row_P, num_experts, topology.num_ranks, length)
    count_E = np.bincount(row_P[row_P >= 0], minlength=num_experts)
    owner_Q = np.repeat(expert_X, np.diff(first_X))
    return Parts(
        load_XT=np.ascontiguousarray(windows_TE[:, expert_X].T),
        first_X=first_X,
        rank_Q=rank_Q,
        low_Q=copies_Q / length,
        share_Q=copies_Q / count_E[owner_Q],
        load_RT=np.ascontiguousarray(rank_load(windows_TE[:, None], row_P[None], topology)[:, 0].T),
        places=[rank_Q[a:b].tolist() for a, b in pairwise(first_X.tolist())],
    )


def draw_windows(data: st.DataObject, case: Case, most: int) -> FloatArray:
    """Loads [T, L, E] of 1 to `most` windows, some experts and windows without any."""
    shape = (data.draw(st.integers(1, most)), len(case.rows), case.spec.num_experts)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    loads = np.floor(random.pareto(1.0, shape) * 20)
    return np.asarray(loads * (random.random(shape) > 0.1) * (random.random((shape[0], 1, 1)) > 0.1))

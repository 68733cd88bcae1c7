"""Hypothesis strategies for specs and valid placements: replicas, empty slots, none of either, few ranks and many."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from eplb_async.core.spec import MoESpec

__all__ = ["Case", "cases"]


class Case(NamedTuple):
    """A spec and rows of valid placements of it, int32 [P] each."""

    spec: MoESpec
    rows: list[NDArray[np.int32]]


@st.composite
def cases(draw: st.DrawFn, layers: int = 2, most_ranks: int = 4, most_slots: int = 5) -> Case:
    """A spec and `layers` rows; experts reach exactly K replicas now and then."""
    nodes = draw(st.integers(1, 2))
    ranks = nodes * draw(st.integers(1, most_ranks // nodes))
    num_slots = ranks * draw(st.integers(1, most_slots))
    experts = draw(st.integers(1, num_slots))
    least = -(-num_slots // experts)
    spec = MoESpec(
        num_layers=layers,
        num_experts=experts,
        num_redundant=num_slots - experts,
        num_ranks=ranks,
        num_nodes=nodes,
        table_length=draw(st.sampled_from([0, least, least + 1])),
    )
    return Case(spec, [draw(_rows(spec)) for _ in range(layers)])


@st.composite
def _rows(draw: st.DrawFn, spec: MoESpec) -> NDArray[np.int32]:
    order = draw(st.permutations(range(spec.num_slots)))
    row_P = np.full(spec.num_slots, -1, dtype=np.int32)
    row_P[order[: spec.num_experts]] = np.arange(spec.num_experts)
    for slot in order[spec.num_experts :]:
        expert = draw(st.integers(-1, spec.num_experts - 1))
        if expert < 0 or np.count_nonzero(row_P == expert) < spec.max_replicas:
            row_P[slot] = expert
    return row_P

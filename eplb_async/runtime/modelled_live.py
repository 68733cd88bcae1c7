"""A live placement that no rank has: of a replay, and of shadow mode."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.placement import IntArray
from eplb_async.core.plan import Plan, counter
from eplb_async.core.score import even_share
from eplb_async.core.spec import MoESpec
from eplb_async.runtime.live_dispatch import LiveDispatch

__all__ = ["ModelledLive"]


class ModelledLive:
    """What all ranks would have.

    Attributes:
        rows_LP, version_L, dispatch: see decisions.LiveView.
        part_LER: the part of each expert's tokens that each rank gets, float64.
    """

    def __init__(self, spec: MoESpec, rows_LP: IntArray) -> None:
        """From a placement whose tables are even."""
        self._spec = spec
        self.rows_LP = rows_LP
        self.version_L = np.zeros(spec.num_layers, dtype=np.int64)
        self.dispatch = LiveDispatch(spec, self.rows_LP, self.version_L, None)
        self.part_LER: NDArray[np.float64] = np.zeros((spec.num_layers, spec.num_experts, spec.num_ranks))
        self._fill(range(spec.num_layers))

    def commit(self, plan: Plan, position: int) -> None:
        """The entry at that position is committed."""
        entry = plan.entries[position - 1]
        self.rows_LP, self.version_L = self.rows_LP.copy(), self.version_L.copy()
        self.rows_LP[entry.layer] = entry.slot_to_expert_P
        self.version_L[entry.layer] = counter(plan.generation, position)
        self.dispatch.advance(self.rows_LP, self.version_L, plan)
        self._fill([entry.layer])

    def _fill(self, layers: Sequence[int]) -> None:
        rank_P = np.arange(self._spec.num_slots) // self._spec.slots_per_rank
        for layer in layers:
            row_P, share_LP = self.rows_LP[layer], self.dispatch.share_LP
            share_P = even_share(row_P[None], self._spec.num_experts)[0] if share_LP is None else share_LP[layer]
            part_ER = self.part_LER[layer]
            part_ER[:] = 0.0
            held_P = row_P >= 0
            np.add.at(part_ER, (row_P[held_P], rank_P[held_P]), share_P[held_P])

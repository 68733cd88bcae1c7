"""How the live slots share their experts' tokens, as far as a daemon can know it.

The live placement says which row of a layer is committed and under which version, not with which dispatch table. A table
is in the plan entry that brought the row, and the version names that entry:

    version 0                     the initial row: split evenly
    of a plan that we published   the entry's table; without one, evenly
    of the plan on the board      the same, for a daemon that comes later: the newest plan stays there
    any other                     unknown: counted as even, and set anew by the next plan of this daemon

So after a restart the PAR of layers of older plans is that of an even split, whatever the ranks do, until the next plan
brings each of them a table that is known. That plan moves nothing for it. It is made where tables are to be expected:
the settings ask for weighted dispatch, or the plan on the board had tables.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.placement import IntArray
from eplb_async.core.plan import Plan, PlanEntry, generation_of, position_of
from eplb_async.core.score import even_share, table_share
from eplb_async.core.spec import MoESpec

__all__ = ["LiveDispatch"]

FloatArray = NDArray[np.float64]


class LiveDispatch:
    """The live shares of one incarnation. Used by one task only.

    Attributes:
        share_LP: float64 [L, P]; None while all known layers are split evenly. Another array after each change.
        unknown: layers whose table cannot be told, ascending; they are counted as even.
    """

    def __init__(self, spec: MoESpec, rows_LP: IntArray, version_L: NDArray[np.int64], on_board: Plan | None) -> None:
        """Adopt a running state.

        Args:
            spec: the model.
            rows_LP, version_L: the live placement.
            on_board: the plan on the board, of this incarnation, if there is one.
        """
        self._spec = spec
        self._version_L = [0] * spec.num_layers
        self._share_of_layer: list[FloatArray | None] = [None] * spec.num_layers
        self._tables_expected = on_board is not None and any(entry.table for entry in on_board.entries)
        self.share_LP: FloatArray | None = None
        self.unknown: list[int] = []
        self.advance(rows_LP, version_L, on_board)

    def advance(self, rows_LP: IntArray, version_L: NDArray[np.int64], plan: Plan | None) -> None:
        """Learn what was committed.

        Args:
            rows_LP, version_L: a new snapshot of the live placement.
            plan: that the ranks may have applied since the last one, if it is known.
        """
        versions = version_L.tolist()
        changed = [layer for layer, version in enumerate(versions) if version != self._version_L[layer]]
        if not changed:
            return
        unknown = set(self.unknown)
        for layer in changed:
            entry = _entry_of(plan, layer, versions[layer])
            self._share_of_layer[layer] = None if entry is None else self._share_of_entry(entry)
            unknown.discard(layer)
            if entry is None:
                unknown.add(layer)
        self._version_L, self.unknown = versions, sorted(unknown)
        self.share_LP = None
        if any(share_P is not None for share_P in self._share_of_layer):
            self.share_LP = _filled(even_share(rows_LP, self._spec.num_experts), self._share_of_layer)

    def to_renew(self, weighted: bool) -> list[int]:
        """Layers whose dispatch the next plan has to set, whatever that gains.

        Args:
            weighted: the settings ask for weighted dispatch.
        """
        return list(self.unknown) if weighted or self._tables_expected else []

    def _share_of_entry(self, entry: PlanEntry) -> FloatArray | None:
        if not entry.table:
            return None
        table_EK = np.frombuffer(entry.table, dtype="<i4").reshape(self._spec.num_experts, self._spec.max_replicas)
        return table_share(table_EK, np.frombuffer(entry.count, dtype="<i4"), self._spec.num_slots)


def _entry_of(plan: Plan | None, layer: int, version: int) -> PlanEntry | None:
    """The entry that brought a layer's row; None if it is of another plan."""
    position = position_of(version)
    if plan is None or generation_of(version) != plan.generation or not 1 <= position <= len(plan.entries):
        return None
    entry = plan.entries[position - 1]
    return entry if entry.layer == layer else None


def _filled(share_LP: FloatArray, rows: Sequence[FloatArray | None]) -> FloatArray:
    for layer, share_P in enumerate(rows):
        if share_P is not None:
            share_LP[layer] = share_P
    return share_LP

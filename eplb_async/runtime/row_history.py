"""Which expert was in which slot when a record was counted: rows per layer with the version from which they held.

A record of load names the packed `decided` counter of its step. For a layer its row is the newest one whose version is
not newer than that, provided that no row between them is unknown. `certain` is the counter up to which all is known:
the least `committed` of all ranks, read before the live placement was. A record of a later step waits.

    version:   0        (1,2)      (1,5)     certain = (2,0)
    row:       initial  second     third
    a record of (1,3) was counted under `second`; one of (2,1) has to wait.

Rows come from the plan that the ranks apply, whose entries are certain as soon as they are committed, and from the live
placement, which also says how far a dropped plan came. When rows changed without a plan that we know (another daemon's),
rows between two looks at the live placement are unknown, and records of that time are not folded.
"""

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.placement import IntArray
from eplb_async.core.plan import Plan, counter, generation_of, position_of

__all__ = ["RowHistory"]

ROWS_KEPT = 8
"""Per layer; a record older than that many commits of its layer is not folded."""
CACHED = 8


class RowHistory:
    """Rows of all layers, for records of the recent past. Not thread-safe."""

    def __init__(self, rows_LP: IntArray, version_L: NDArray[np.int64], certain: int) -> None:
        """Start from a snapshot of the live placement, taken after `certain` was read from the ranks' words."""
        self.certain = certain
        self._rows: list[list[tuple[int, IntArray | None]]] = [
            [(int(version), row_P)] for version, row_P in zip(version_L, rows_LP, strict=True)
        ]
        self._cache: dict[int, tuple[IntArray, NDArray[np.bool_]]] = {}

    def advance(self, certain: int, rows_LP: IntArray, version_L: NDArray[np.int64], plan: Plan | None) -> None:
        """Learn what was committed.

        Args:
            certain: least `committed` of all ranks, read before the snapshot.
            rows_LP, version_L: a snapshot of the live placement.
            plan: the plan that the ranks may be applying or have ended since the last call, if this daemon published it.
        """
        if plan is not None:
            # how far the ranks came is in the live versions; a plan's commits have one order
            reached = max(
                (position_of(v) for v in version_L.tolist() if generation_of(v) == plan.generation), default=0
            )
            for position, entry in enumerate(plan.entries[:reached], 1):
                self._append(entry.layer, counter(plan.generation, position), entry.slot_to_expert_P)
        for layer, version in enumerate(version_L.tolist()):
            if version > self._rows[layer][-1][0]:
                # somebody else's commits: what was live between the last look and this row is unknown
                self._append(layer, self.certain + 1, None)
                self._append(layer, version, rows_LP[layer])
        self.certain = max(self.certain, certain)

    def placement_at(self, version: int) -> tuple[IntArray, NDArray[np.bool_]] | None:
        """Rows int32 [L, P] under which a record of that version was counted, and for which layers they are known [L].

        Returns:
            None if that cannot be told yet; rows of unknown layers are -1.
        """
        if version > self.certain:
            return None
        if version not in self._cache:
            if len(self._cache) >= CACHED:
                self._cache.clear()
            found = [self._row_at(layer, version) for layer in range(len(self._rows))]
            width = len(next(row for rows in self._rows for _, row in rows if row is not None))
            empty = np.full(width, -1, dtype=np.int32)
            rows_LP = np.stack([empty if row_P is None else row_P for row_P in found])
            self._cache[version] = rows_LP, np.array([row_P is not None for row_P in found])
        return self._cache[version]

    def _row_at(self, layer: int, version: int) -> IntArray | None:
        for since, row_P in reversed(self._rows[layer]):
            if since <= version:
                return row_P
        return None

    def _append(self, layer: int, version: int, row_P: IntArray | None) -> None:
        rows = self._rows[layer]
        if version > rows[-1][0]:
            rows.append((version, row_P))
            del rows[:-ROWS_KEPT]
            self._cache.clear()

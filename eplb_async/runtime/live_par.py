"""PAR of the collected windows under the live placement and dispatch, each window looked at once per placement."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.placement import IntArray
from eplb_async.core.score import windows_par
from eplb_async.core.spec import Topology

__all__ = ["LivePar", "mean_with_load"]

CACHED = 64

Window = tuple[int, NDArray[np.int64]]


class LivePar:
    """Remembers the PAR of windows; the same numbers as `windows_par`, at the cost of the new ones only."""

    def __init__(self, topology: Topology, num_layers: int) -> None:
        self._topology, self._num_layers = topology, num_layers
        self._rows_LP: IntArray | None = None
        self._share_LP: NDArray[np.float64] | None = None
        self._known: dict[int, tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]] = {}

    def of(
        self, windows: Sequence[Window], rows_LP: IntArray, share_LP: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """PAR per layer, float64 [L]; NaN for a layer without load.

        Args:
            windows: (index, load [L, E]); an array is not changed once it was given.
            rows_LP: the placement; another array is another placement.
            share_LP: how its slots share their experts' tokens, None for evenly; another array are other shares.
        """
        if rows_LP is not self._rows_LP or share_LP is not self._share_LP:
            self._rows_LP, self._share_LP = rows_LP, share_LP
            self._known.clear()
        weighted_L, total_L = np.zeros(self._num_layers), np.zeros(self._num_layers)
        for index, load_LE in windows:
            par_L, weight_L = self._one(index, load_LE, rows_LP, share_LP)
            weighted_L += par_L * weight_L
            total_L += weight_L
        return np.where(total_L > 0, weighted_L / np.where(total_L > 0, total_L, 1.0), np.nan)

    def _one(
        self, index: int, load_LE: NDArray[np.int64], rows_LP: IntArray, share_LP: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        known = self._known.get(index)
        if known is None or known[0] is not load_LE:
            if len(self._known) >= CACHED:
                del self._known[min(self._known)]
            par_L = windows_par(load_LE[None], rows_LP, self._topology, share_LP)
            known = load_LE, par_L, load_LE.sum(axis=1).astype(np.float64)
            self._known[index] = known
        return known[1], known[2]


def mean_with_load(par_L: NDArray[np.float64]) -> float:
    """Mean over the layers that have load; 1 without any."""
    loaded = par_L[~np.isnan(par_L)]
    return float(loaded.mean()) if len(loaded) else 1.0

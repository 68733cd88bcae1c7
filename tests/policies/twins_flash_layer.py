"""A plain twin of how the `flashlb` kernels read and score one layer: shares, statistics, covariances, loads of ranks."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._flash_work import Rules

__all__ = ["LayerTwin", "single_total", "total"]

FloatArray = NDArray[np.float64]


def total(values: Iterable[float]) -> float:
    """A sum in order, without the corrections of `sum` and `np.sum`."""
    result = 0.0
    for value in values:
        result += float(value)
    return result


def single_total(values: Iterable[np.float32]) -> np.float32:
    """`total`, in single precision."""
    result = np.float32(0)
    for value in values:
        result += value
    return result


class LayerTwin:
    """`read_shares` and `read_statistics`: one layer's windows as shares, [E, T], with their statistics."""

    def __init__(self, windows_TE: FloatArray, rules: Rules) -> None:
        rows, noise = [], []
        for row_E in windows_TE:
            load = total(row_E[0::2]) + total(row_E[1::2])
            if load > 0 and rules.num_ranks / load < np.inf:
                scale = rules.num_ranks / load
                rows.append(row_E * scale)
                noise.append(np.sqrt(scale) if scale <= 1 else 0.0)
        self.rules = rules
        self.used = len(rows)
        if not rows:
            return
        self.share_ET = np.array(rows).T
        self.noise = total(noise) / self.used
        self.mean_E = np.array([total(share_T) / self.used for share_T in self.share_ET])
        scale = 1 / np.sqrt(self.used - 1) if self.used > 1 else 0.0
        off_ET = (self.share_ET - self.mean_E[:, None]) * scale
        self.var_E = np.array([total(off_T * off_T) for off_T in off_ET])
        self.risk_E = self.mean_E + rules.z_score * np.sqrt(self.var_E)
        self.off_ET = off_ET.astype(np.float32)

    def covariance(self, matrix: bool, placed: list[tuple[int, float]], expert: int) -> float:
        """Of an expert with a rank's load: experts and their parts. The two ways differ in the last bit."""
        if matrix:
            return float(single_total(self._product(other, expert) * np.float32(part) for other, part in placed))
        spread_T = [
            single_total(self.off_ET[other, t] * np.float32(part) for other, part in placed) for t in range(self.used)
        ]
        return total(spread * off for spread, off in zip(spread_T, self.off_ET[expert], strict=True))

    def _product(self, one: int, other: int) -> np.float32:
        products = self.off_ET[one] * self.off_ET[other]
        whole = self.used // 4 * 4
        fours = ((a + b) + (c + d) for a, b, c, d in products[:whole].reshape(-1, 4))
        return single_total([*fours, *products[whole:]])

    def loads(self, bins: list[list[int]], count_E: NDArray[np.int64]) -> FloatArray:
        """`put_on_ranks`: [R, T]."""
        return np.array(
            [
                [total(self.share_ET[e, t] * (1 / count_E[e]) for e in experts if e >= 0) for t in range(self.used)]
                for experts in bins
            ]
        )

    def score(self, load_RT: FloatArray) -> float:
        """`mean_peak`."""
        return total(load_RT.max(axis=0)) / self.used

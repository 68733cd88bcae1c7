"""Plain twins of the loops that fit dispatch shares, and the exact least peak of small cases."""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._dispatch_descent import NORM_SWEEPS, STALLED, START_SWEEPS

__all__ = [
    "Split",
    "even_out_twin",
    "flatten_peaks_twin",
    "least_peak",
    "peak_bound_twin",
    "split_experts_twin",
    "tables_twin",
    "water_fill_twin",
]

FloatArray = NDArray[np.float64]
Split = tuple[list[int], list[list[tuple[int, int]]]]
"""Split experts, and the places of each: (rank, slots there)."""


def split_experts_twin(row_P: list[int], num_experts: int, num_ranks: int, table_length: int) -> Split:
    """`_dispatch.split_experts`."""
    width = len(row_P) // num_ranks
    experts, places = [], []
    for expert in range(num_experts):
        ranks = [slot // width for slot, held in enumerate(row_P) if held == expert]
        if len(set(ranks)) > 1 and len(ranks) < table_length:
            experts.append(expert)
            places.append([(rank, ranks.count(rank)) for rank in sorted(set(ranks))])
    return experts, places


def water_fill_twin(curvature_J: FloatArray, slope_J: FloatArray, low_J: FloatArray) -> FloatArray:
    """`_dispatch_descent.water_fill`: the level by bisection."""
    least = float((slope_J + curvature_J * low_J).min())
    most = float((slope_J + curvature_J).max())
    for _ in range(200):
        level = (least + most) / 2
        if np.maximum(low_J, (level - slope_J) / curvature_J).sum() > 1:
            most = level
        else:
            least = level
    return np.maximum(low_J, (least - slope_J) / curvature_J)


def even_out_twin(
    load_XT: FloatArray, places: list[list[int]], low: list[FloatArray], share: list[FloatArray], load_RT: FloatArray
) -> None:
    """`_dispatch_descent.even_out`: `places` are the ranks of each expert; `share` and `load_RT` are changed."""
    for _ in range(3000 if load_RT.shape[1] == 1 else START_SWEEPS):
        largest = 0.0
        for index, ranks in enumerate(places):
            square = float((load_XT[index] ** 2).sum())
            if square == 0:
                continue
            others_JT = load_RT[ranks] - share[index][:, None] * load_XT[index]
            found_J = water_fill_twin(np.full(len(ranks), square), others_JT @ load_XT[index], low[index])
            largest = max(largest, float(np.abs(found_J - share[index]).max()))
            load_RT[ranks] = others_JT + found_J[:, None] * load_XT[index]
            share[index][:] = found_J
        if largest < 1e-13:
            return


def flatten_peaks_twin(
    load_XT: FloatArray, places: list[list[int]], low: list[FloatArray], share: list[FloatArray], load_RT: FloatArray
) -> None:
    """`_dispatch_descent.flatten_peaks`: damped Newton steps on the 8-norm; the shares of least mean peak are kept."""
    mean_T = load_RT.mean(axis=0)
    best, best_peak, stalled = [part.copy() for part in share], np.inf, 0
    for _ in range(NORM_SWEEPS):
        peak = float(load_RT.max(axis=0).mean())
        stalled = 0 if peak < best_peak * (1 - 1e-4) else stalled + 1
        if peak < best_peak:
            best, best_peak = [part.copy() for part in share], peak
        if stalled > STALLED:
            break
        norm_T = (load_RT**8).sum(axis=0) ** 0.125
        norm_T[norm_T == 0] = 1
        for index, ranks in enumerate(places):
            height_JT = load_RT[ranks] / norm_T
            slope_J = (load_XT[index] * height_JT**7).sum(axis=1)
            bent_JT = np.maximum(height_JT, mean_T / norm_T) ** 6
            curvature_J = (7 * load_XT[index] ** 2 * bent_JT / norm_T).sum(axis=1)
            if curvature_J.max() == 0:
                continue
            curvature_J = np.maximum(curvature_J, 1e-3 * curvature_J.max())
            found_J = water_fill_twin(curvature_J, slope_J - curvature_J * share[index], low[index])
            load_RT[ranks] += (found_J - share[index])[:, None] * load_XT[index]
            share[index][:] = found_J
    for index, ranks in enumerate(places):
        load_RT[ranks] += (best[index] - share[index])[:, None] * load_XT[index]
        share[index][:] = best[index]


def least_peak(fixed_R: FloatArray, free_X: FloatArray, places: list[list[int]]) -> float:
    """The least peak of one window, by linear programming duality: the greatest mean load that a set of ranks must have.

    Args:
        fixed_R: tokens that are computed on each rank whatever the shares.
        free_X, places: tokens of each expert that may go to any of its ranks.
    """
    ranks = range(len(fixed_R))
    sets = (chosen for size in range(1, len(fixed_R) + 1) for chosen in combinations(ranks, size))
    return max(_kept(chosen, fixed_R, free_X, places) / len(chosen) for chosen in sets)


def peak_bound_twin(fixed_RT: FloatArray, free_XT: FloatArray, places: list[list[int]], load_RT: FloatArray) -> float:
    """`_dispatch_descent.peak_bound`: the same as least_peak, over the sets of the busiest ranks only; mean over windows."""
    bounds = []
    for window in range(load_RT.shape[1]):
        order = np.argsort(-load_RT[:, window], kind="stable").tolist()
        sets = [tuple(order[: size + 1]) for size in range(len(order))]
        kept = [_kept(chosen, fixed_RT[:, window], free_XT[:, window], places) / len(chosen) for chosen in sets]
        bounds.append(max(kept))
    return float(np.mean(bounds))


def tables_twin(row_P: list[int], entries_P: list[int], num_experts: int) -> list[list[int]]:
    """`_dispatch.tables`, rows without padding."""
    return [
        [slot for slot, held in enumerate(row_P) if held == expert for _ in range(entries_P[slot])]
        for expert in range(num_experts)
    ]


def _kept(chosen: tuple[int, ...], fixed_R: FloatArray, free_X: FloatArray, places: list[list[int]]) -> float:
    """Tokens that cannot leave a set of ranks."""
    inside = sum(float(free) for free, ranks in zip(free_X, places, strict=True) if set(ranks) <= set(chosen))
    return float(fixed_R[list(chosen)].sum()) + inside

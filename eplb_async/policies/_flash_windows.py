"""How the `flashlb` kernels read windows: as shares, with their means, variances and covariances.

    read_scales       all layers: what makes shares of tokens
    read_noise        one layer: how many windows have load, and what chance may do
    read_shares       one layer: its shares
    read_statistics   one layer that is due: risks

Imports numba (see `_kernels` for what that implies). The plain twin of all is `LayerTwin` in tests/policies/twins_flash_layer.py.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._flash_work import INNER, Work
from eplb_async.policies._kernels import CACHE

__all__ = ["read_noise", "read_scales", "read_shares", "read_statistics"]

FloatArray = NDArray[np.float64]


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def read_scales(windows_TLE: FloatArray, num_ranks: int) -> FloatArray:
    """What makes shares of the tokens of each window and layer, whose mean rank load is then 1; infinite for one without load.

    Windows [[3, 1], [0, 0], [2, 6]] of one layer on 2 ranks: 0.5, infinity, 0.25.

    All layers of a window in turn, as they lie in memory: layer by layer each row would have to be waited for.

    Returns:
        float64 [L, T]; infinite, too, where there is so little load that the reciprocal overflows.
    """
    num_windows, num_layers, num_experts = windows_TLE.shape
    scale_LT = np.empty((num_layers, num_windows))
    row_NE = windows_TLE.reshape((num_windows * num_layers, num_experts))
    last = row_NE.shape[0] - 1
    for first in range(0, last + 1, 4):
        # two sums for each of four rows at once: one sum would wait for each addition in turn. The last row stands in for those beyond it
        second, third, fourth = min(first + 1, last), min(first + 2, last), min(first + 3, last)
        first_even, second_even, third_even, fourth_even = 0.0, 0.0, 0.0, 0.0
        first_odd, second_odd, third_odd, fourth_odd = 0.0, 0.0, 0.0, 0.0
        for expert in range(0, num_experts - 1, 2):
            first_even += row_NE[first, expert]
            second_even += row_NE[second, expert]
            third_even += row_NE[third, expert]
            fourth_even += row_NE[fourth, expert]
            first_odd += row_NE[first, expert + 1]
            second_odd += row_NE[second, expert + 1]
            third_odd += row_NE[third, expert + 1]
            fourth_odd += row_NE[fourth, expert + 1]
        if num_experts % 2 == 1:
            first_even += row_NE[first, num_experts - 1]
            second_even += row_NE[second, num_experts - 1]
            third_even += row_NE[third, num_experts - 1]
            fourth_even += row_NE[fourth, num_experts - 1]
        for row, total in (
            (first, first_even + first_odd),
            (second, second_even + second_odd),
            (third, third_even + third_odd),
            (fourth, fourth_even + fourth_odd),
        ):
            scale_LT[row % num_layers, row // num_layers] = num_ranks / total if total > 0.0 else np.inf
    return scale_LT


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def read_noise(scale_T: FloatArray) -> tuple[int, float]:
    """Of a layer whose windows `read_scales` has read, on 2 ranks: [0.5, infinity, 0.25]: 2 windows have load; noise 0.604.

    The mean rank loads are 2 and 4 tokens, so that is (1 / sqrt(2) + 1 / 2) / 2.

    Returns:
        How many windows have load; and the standard deviation that a rank's share has by chance alone, if tokens choose experts
        independently: 1 / sqrt(tokens of a rank), averaged over the windows.
    """
    used, noise = 0, 0.0
    for scale in scale_T:
        if scale < np.inf:
            # less than a token for each rank is no count of tokens
            noise += np.sqrt(scale) if scale <= 1.0 else 0.0
            used += 1
    return used, noise / max(used, 1)


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def read_shares(windows_TLE: FloatArray, layer: int, scale_T: FloatArray, work: Work) -> None:
    """Scale the windows of a layer that have load to a mean of 1 per rank; writes `share_ET`, the same to `share_TE`, and `mean_E`.

    Windows [[3, 1], [0, 0], [2, 6]] on 2 ranks: shares [[1.5, 0.5], [0.5, 1.5]] (by expert), means [1, 1].
    """
    num_windows, _, num_experts = windows_TLE.shape
    share_ET, mean_E, share_TE = work.share_ET, work.mean_E, work.share_TE
    mean_E[:] = 0.0
    used = 0
    for window in range(num_windows):
        scale = scale_T[window]
        if scale < np.inf:
            for expert in range(num_experts):
                share = windows_TLE[window, layer, expert] * scale
                share_TE[used, expert] = share
                mean_E[expert] += share
            used += 1
    if used > 1:
        for expert in range(num_experts):
            mean_E[expert] /= used
    # turned by fours, not as they are read: a store for each number of a row, far from the last one, is slow beside the sums
    for window in range(0, used - 3, 4):
        for expert in range(num_experts):
            one, two = share_TE[window, expert], share_TE[window + 1, expert]
            three, four = share_TE[window + 2, expert], share_TE[window + 3, expert]
            share_ET[expert, window], share_ET[expert, window + 1] = one, two
            share_ET[expert, window + 2], share_ET[expert, window + 3] = three, four
    for window in range(used // 4 * 4, used):
        for expert in range(num_experts):
            share_ET[expert, window] = share_TE[window, expert]


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def read_statistics(work: Work, num_windows: int, z_score: float) -> None:
    """Variances, deviations, covariances (if there is a matrix) and risks, from means and shares.

    Shares [1.5, 0.5] and [0.5, 1.5] of two experts, z = 2: variances 0.5, covariance -0.5, risks 1 + 2 sqrt(0.5) = 2.414.
    """
    mean_E, var_E, share_TE, off_TE = work.mean_E, work.var_E, work.share_TE, work.off_TE
    covariance_EE, risk_E = work.covariance_EE, work.risk_E
    num_experts = mean_E.shape[0]
    var_E[:] = 0.0
    if num_windows > 1:
        scale = 1.0 / np.sqrt(num_windows - 1.0)
        for window in range(num_windows):
            for expert in range(num_experts):
                off = (share_TE[window, expert] - mean_E[expert]) * scale
                off_TE[window, expert] = off
                var_E[expert] += off * off
    for expert in range(num_experts):
        risk_E[expert] = mean_E[expert] + z_score * np.sqrt(var_E[expert])
    if num_windows > 1 and covariance_EE.shape[0] > 0:
        covariance_EE[:] = 0.0
        # four windows in one pass over the matrix: it is the passes that take time
        for window in range(0, num_windows - 3, 4):
            for one in range(num_experts):
                first, second = off_TE[window, one], off_TE[window + 1, one]
                third, fourth = off_TE[window + 2, one], off_TE[window + 3, one]
                for other in range(num_experts):
                    covariance_EE[one, other] += (
                        first * off_TE[window, other] + second * off_TE[window + 1, other]
                    ) + (third * off_TE[window + 2, other] + fourth * off_TE[window + 3, other])
        for window in range(num_windows // 4 * 4, num_windows):
            for one in range(num_experts):
                for other in range(num_experts):
                    covariance_EE[one, other] += off_TE[window, one] * off_TE[window, other]

"""The descents that fit dispatch shares, compiled by numba: from any shares to those of least peak. See _dispatch.py.

    one window       sweeps of `even_out`: each split expert in turn spreads its tokens so that the sum of the squared rank
                     loads is least. That sum is strictly convex in the rank loads and the shares of different experts are
                     free of each other, so the sweeps go to its one minimum, and rank loads that are feasible and have the
                     least sum of squares also have the least peak. `peak_bound` proves how far the peak is from it.
    several windows  the same for the sum over windows, then sweeps of `flatten_peaks`: the sum over windows of the 8-norm of
                     the rank loads instead of the sum of the peaks. The 8-norm looks at all busy ranks and not at the
                     busiest alone: shares fitted to the peaks themselves (the 32-norm) did worse on the windows after.

Suffixes: X split experts, Q places (ranks that hold slots of a split expert) of all of them, J places of one.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._kernels import CACHE

__all__ = ["GAP", "even_out", "flatten_peaks", "mean_peak", "peak_bound", "water_fill"]

LongArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

MOST_SWEEPS = 1000
"""For one window. A chain of n experts that share ranks needs about n squared sweeps to even out end to end."""
START_SWEEPS = 6
"""For several windows, where the squares are only a start."""
LOOK_EVERY = 8
"""Sweeps between two looks at the gap of one window."""
GAP = 1e-6
"""A peak this close to its lower bound, as a share, is exact."""
STILL = 1e-12
"""Sweeps that move less than this share of the mean rank load change nothing any more."""
NORM_SWEEPS = 12
STALLED, PROGRESS = 2, 1e-4
"""`flatten_peaks` ends after more sweeps than this without a peak that is lower by this share."""


@numba.njit(error_model="numpy", cache=CACHE)
def water_fill(
    curvature_J: FloatArray, slope_J: FloatArray, low_Q: FloatArray, first: int, last: int, share_J: FloatArray
) -> None:
    """The shares, with sum 1 and none below its `low`, that minimise the sum of curvature * share^2 / 2 + slope * share.

    Where the level is lambda, a share is (lambda - slope) / curvature. Curvature [1, 1], slopes [0, 0.4]: [0.7, 0.3]. With
    slopes [0, 2] and low [0.25, 0.25] the second would be -0.5: it stays at 0.25, and the first gets the rest: [0.75, 0.25].

    A share that is raised to its `low` lowers the level for the others, so it would not rise above it again later: what
    was raised stays there, and this ends after as many rounds as there are places.

    Args:
        curvature_J: positive.
        slope_J: of any sign.
        low_Q, first, last: least share of each place, with a sum below 1, in low_Q[first:last].
        share_J: gets the result. This array, and the other two, may be longer than there are places.
    """
    num_places = last - first
    raised = True
    for place in range(num_places):
        share_J[place] = -1.0
    while raised:
        left, width = 1.0, 0.0
        for place in range(num_places):
            if share_J[place] == low_Q[first + place]:
                left -= low_Q[first + place]
            else:
                left += slope_J[place] / curvature_J[place]
                width += 1.0 / curvature_J[place]
        raised = False
        for place in range(num_places):
            if share_J[place] != low_Q[first + place]:
                share_J[place] = (left / width - slope_J[place]) / curvature_J[place]
                if share_J[place] < low_Q[first + place]:
                    share_J[place] = low_Q[first + place]
                    raised = True


@numba.njit(error_model="numpy", cache=CACHE)
def even_out(
    load_XT: FloatArray,
    first_X: LongArray,
    rank_Q: LongArray,
    low_Q: FloatArray,
    share_Q: FloatArray,
    load_RT: FloatArray,
) -> None:
    """Lower the sum over windows and ranks of squared loads, an expert at a time, until it does not get lower.

    Expert 0 of load 8 at ranks 0 and 1, where others put 4 and 0, low 0.25: the first sweep gives it shares [0.25, 0.75],
    and the ranks 6 and 6.

    Args:
        load_XT: tokens of the split experts.
        first_X, rank_Q: their places, see split_experts.
        low_Q: least share at each place.
        share_Q: where to start; changed.
        load_RT: tokens of the ranks with these shares; changed.
    """
    num_ranks, num_windows = load_RT.shape
    most = MOST_SWEEPS if num_windows == 1 else START_SWEEPS
    curvature_J, slope_J = np.empty(num_ranks, dtype=np.float64), np.empty(num_ranks, dtype=np.float64)
    found_J = np.empty(num_ranks, dtype=np.float64)
    for sweep in range(1, most + 1):
        largest = 0.0
        for index in range(load_XT.shape[0]):
            first, last = first_X[index], first_X[index + 1]
            square = 0.0
            for window in range(num_windows):
                square += load_XT[index, window] * load_XT[index, window]
            if square == 0.0:
                continue
            for place in range(first, last):
                slope = 0.0
                for window in range(num_windows):
                    slope += load_XT[index, window] * load_RT[rank_Q[place], window]
                curvature_J[place - first] = square
                slope_J[place - first] = slope - square * share_Q[place]
            water_fill(curvature_J, slope_J, low_Q, first, last, found_J)
            for place in range(first, last):
                change = found_J[place - first] - share_Q[place]
                largest = max(largest, change * change * square)
                share_Q[place] = found_J[place - first]
                for window in range(num_windows):
                    load_RT[rank_Q[place], window] += change * load_XT[index, window]
        if largest <= STILL * STILL:
            return
        if num_windows == 1 and sweep % LOOK_EVERY == 0:
            bound = peak_bound(load_XT, first_X, rank_Q, low_Q, share_Q, load_RT)
            if mean_peak(load_RT) <= bound * (1.0 + GAP):
                return


@numba.njit(error_model="numpy", cache=CACHE)
def flatten_peaks(  # size: most of it is one loop and its state
    load_XT: FloatArray,
    first_X: LongArray,
    rank_Q: LongArray,
    low_Q: FloatArray,
    share_Q: FloatArray,
    load_RT: FloatArray,
) -> None:
    """Lower the sum over windows of the 8-norm of the rank loads; `share_Q` gets the shares of least mean peak on the way.

    Per expert a Newton step: the norm's gradient, and the diagonal of its Hessian, which is taken as if no rank had less
    than the mean load, so that steps onto idle ranks do not overshoot.

    Expert 0 with loads 8 and 4 in two windows at ranks 0 and 1, where others put 4 and 0, and 0 and 4: from even shares
    (peaks 8 and 6) it ends at [0.304, 0.696] (peaks 6.43 and 6.78): the mean peak falls from 7 to 6.61. At [0.25, 0.75] it
    would be 6.5, but the 8-norm also counts that rank 0 is idle in the second window.

    Args:
        as for even_out.
    """
    num_ranks, num_windows = load_RT.shape
    curvature_J, slope_J = np.empty(num_ranks, dtype=np.float64), np.empty(num_ranks, dtype=np.float64)
    found_J = np.empty(num_ranks, dtype=np.float64)
    norm_T, mean_T = np.ones(num_windows, dtype=np.float64), np.zeros(num_windows, dtype=np.float64)
    for rank in range(num_ranks):
        for window in range(num_windows):
            mean_T[window] += load_RT[rank, window] / num_ranks
    best_Q, best_peak, stalled = np.empty(share_Q.shape[0], dtype=np.float64), np.inf, 0
    for _ in range(NORM_SWEEPS):
        peak = _norms(load_RT, norm_T)
        stalled = 0 if peak < best_peak * (1.0 - PROGRESS) else stalled + 1
        if peak < best_peak:
            best_peak = peak
            for place in range(share_Q.shape[0]):
                best_Q[place] = share_Q[place]
        if stalled > STALLED:
            break
        for index in range(load_XT.shape[0]):
            first, last = first_X[index], first_X[index + 1]
            steepest = 0.0
            for place in range(first, last):
                slope, curvature = 0.0, 0.0
                for window in range(num_windows):
                    load, norm = load_XT[index, window], norm_T[window]
                    height = load_RT[rank_Q[place], window] / norm
                    square = height * height
                    slope += load * height * square * square * square
                    height = max(height, mean_T[window] / norm)
                    square = height * height
                    curvature += 7.0 * load * load * square * square * square / norm
                curvature_J[place - first] = curvature
                slope_J[place - first] = slope
                steepest = max(steepest, curvature)
            if steepest == 0.0:
                continue
            for place in range(first, last):
                # of places where hardly anything is at stake: keeps the shares finite
                curvature_J[place - first] = max(curvature_J[place - first], 1e-3 * steepest)
                slope_J[place - first] -= curvature_J[place - first] * share_Q[place]
            water_fill(curvature_J, slope_J, low_Q, first, last, found_J)
            for place in range(first, last):
                change = found_J[place - first] - share_Q[place]
                share_Q[place] = found_J[place - first]
                for window in range(num_windows):
                    load_RT[rank_Q[place], window] += change * load_XT[index, window]
    for index in range(load_XT.shape[0]):
        for place in range(first_X[index], first_X[index + 1]):
            for window in range(num_windows):
                load_RT[rank_Q[place], window] += (best_Q[place] - share_Q[place]) * load_XT[index, window]
            share_Q[place] = best_Q[place]


@numba.njit(error_model="numpy", cache=CACHE)
def peak_bound(
    load_XT: FloatArray,
    first_X: LongArray,
    rank_Q: LongArray,
    low_Q: FloatArray,
    share_Q: FloatArray,
    load_RT: FloatArray,
) -> float:
    """What the busiest rank computes at least, mean over windows, whatever the shares.

    The tokens that cannot leave a set of ranks are computed there, so its busiest rank has at least their mean. All sets
    made of the busiest ranks are tried. Ranks [6, 6, 1], expert 0 of load 8 at ranks 0 and 1 with shares [0.25, 0.75] and
    low 0.25: {0} keeps 4 + 2, {0, 1} keeps 4 + 8: 6 either way, so the peak of 6 cannot be lowered.

    Args:
        as for even_out; the bound holds for any `share_Q`, but is good only near the least peak.
    """
    num_ranks, num_windows = load_RT.shape
    total = 0.0
    kept_R, place_R = np.empty(num_ranks, dtype=np.float64), np.empty(num_ranks, dtype=np.int64)
    order_R = np.empty(num_ranks, dtype=np.int64)
    for rank in range(num_ranks):
        order_R[rank] = rank
    for window in range(num_windows):
        # insertion sort: ranks by falling load; nearly sorted from window to window
        for end in range(1, num_ranks):
            rank, place = order_R[end], end
            while place > 0 and load_RT[order_R[place - 1], window] < load_RT[rank, window]:
                order_R[place] = order_R[place - 1]
                place -= 1
            order_R[place] = rank
        for place in range(num_ranks):
            place_R[order_R[place]] = place
            kept_R[place] = load_RT[order_R[place], window]
        for index in range(load_XT.shape[0]):
            outermost, free = 0, 0.0
            for place in range(first_X[index], first_X[index + 1]):
                moves = load_XT[index, window] * (share_Q[place] - low_Q[place])
                kept_R[place_R[rank_Q[place]]] -= moves
                outermost = max(outermost, place_R[rank_Q[place]])
                free += moves
            kept_R[outermost] += free
        inside, best = 0.0, 0.0
        for place in range(num_ranks):
            inside += kept_R[place]
            best = max(best, inside / (place + 1))
        total += best
    return float(total / num_windows)


@numba.njit(error_model="numpy", cache=CACHE)
def mean_peak(load_RT: FloatArray) -> float:
    """Mean over windows of the busiest rank's load."""
    total = 0.0
    for window in range(load_RT.shape[1]):
        peak = load_RT[0, window]
        for rank in range(1, load_RT.shape[0]):
            peak = max(peak, load_RT[rank, window])
        total += peak
    return float(total / load_RT.shape[1])


@numba.njit(error_model="numpy", cache=CACHE)
def _norms(load_RT: FloatArray, norm_T: FloatArray) -> float:
    """Write the 8-norm of each window's rank loads (1 without load); the mean peak."""
    total = 0.0
    for window in range(load_RT.shape[1]):
        peak = 0.0
        for rank in range(load_RT.shape[0]):
            peak = max(peak, load_RT[rank, window])
        total += peak
        norm_T[window] = 1.0
        if peak > 0.0:
            powers = 0.0
            for rank in range(load_RT.shape[0]):
                height = load_RT[rank, window] / peak
                square = height * height
                powers += square * square * square * square
            norm_T[window] = peak * np.sqrt(np.sqrt(np.sqrt(powers)))
    return float(total / load_RT.shape[1])

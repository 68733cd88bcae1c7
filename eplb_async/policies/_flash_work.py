"""What the `flashlb` kernels work on: the settings, one layer's windows and statistics (`_flash_windows` reads them), and a placement in the making.

All loads are shares: every window is scaled to a mean of 1 per rank, so that the load of a rank in a window reads as a
ratio to the mean, and the greatest of them is the window's PAR. A step with few tokens counts as much as one with many.

Imports numba (see `_kernels` for what that implies). Every function has a plain twin in tests/policies/twins_flash.py or twins_flash_layer.py.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._kernels import CACHE

__all__ = [
    "INNER",
    "Rules",
    "Work",
    "count_replicas",
    "count_slots",
    "heaviest_first",
    "mean_peak",
    "new_work",
    "put_on_ranks",
    "put_window_on_ranks",
]

INNER: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Options of kernels that only kernels call: without the ways in from Python and C they compile in two thirds of the time."""

COUNTED = 64
"""Items that are sorted by counting; longer stretches are merged of those."""


IntArray = NDArray[np.int32]
IndexArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
SingleArray = NDArray[np.float32]


class Rules(NamedTuple):
    """The settings of a plan, as the kernels take them; `flashlb.FlashLBOptions` says more."""

    num_ranks: int
    slots_per_rank: int
    most_replicas: int
    """Of one expert: at most K, and at most R."""
    depth: int
    width: int
    z_score: float
    replica_rule: int
    """0 peak, 1 relief, 2 proportional."""
    stay_within: float
    most_swaps: int
    good_enough: float
    """A mean PAR at which swapping ends."""
    ratio: float
    """A layer is due if its mean / peak is below this part of what was promised ..."""
    below: float
    """... or below this value."""
    allowance: float
    """What chance may add to the PAR, in standard deviations of a rank's load."""
    least_gain: float
    """A planned layer stays unless its mean PAR falls by more than this part."""


class Work(NamedTuple):
    """Arrays that one layer after the other uses; only `new_work` makes them."""

    # of the windows
    share_ET: FloatArray
    mean_E: FloatArray
    var_E: FloatArray
    share_TE: FloatArray
    """The shares again, in rows as windows are: statistics go along the rows, placements look up an expert's windows."""
    off_TE: SingleArray
    """Deviations from the mean, scaled: the covariance of two experts is the dot product of their columns. Single precision, as are covariances:
    an estimate from so few windows is not good for seven digits, and twice as many fit into a vector."""
    covariance_EE: SingleArray
    """All of these; [0, 0] where the columns are cheaper. Dealing needs the covariance of each expert with each
    rank's load: R dot products of T, or, with the matrix, E additions that keep all covariances of one rank up to date."""
    risk_E: FloatArray
    """Mean + z standard deviations."""
    # of the live placement
    count_E: IndexArray
    home_P: IndexArray
    """Ranks of the first expert's replicas, then of the second's, ..."""
    home_at_E: IndexArray
    """Where in `home_P` those of expert e begin and, at e + 1, end."""
    # of the search
    rule_P: IndexArray
    """Places that get spare slots, in the order of `spare_order`: of the group ..."""
    rest_P: IndexArray
    """... and of the groups after it."""
    trial_E: IndexArray
    order_E: IndexArray
    best_E: IndexArray
    unit_E: FloatArray
    """Risk of one replica."""
    # of the placement that is being made
    row_RS: IntArray
    filled_R: IndexArray
    mean_R: FloatArray
    var_R: FloatArray
    open_R: FloatArray
    """The mean again; infinite where no slot is left."""
    last_R: IndexArray
    """The expert that the rank got last."""
    spread_RX: SingleArray
    """How each rank's load deviates from its mean, [R, T]; or, with the matrix, its covariance with every expert, [R, E]."""
    load_RT: FloatArray
    peak_T: FloatArray
    # of its busiest ranks
    top_3T: FloatArray
    """The three greatest loads of each window."""
    rest_T: FloatArray
    """The greatest load of all ranks but the two between which a swap is sought."""
    windows_T: IndexArray
    """Windows, those first in which the rank that is to be lowered is the busiest."""
    held_RE: IntArray
    """How often a rank holds an expert."""
    unit_RS: FloatArray
    """Mean load of the replica in each slot."""
    even_R: FloatArray
    """What each rank would have if all experts had one token."""
    settled_R: IndexArray
    """Ranks that no swap lowers."""
    rank_R: IndexArray
    """Ranks by ascending mean load; while dealing, those with room first."""
    part_N: FloatArray
    """1 / n for up to P replicas: the part of an expert's load that one of n has; 0 for none."""


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def new_work(num_windows: int, num_experts: int, rules: Rules) -> Work:
    """Arrays for layers of up to T windows."""
    ranks, per_rank = rules.num_ranks, rules.slots_per_rank
    wide = num_experts if num_windows * ranks > 4 * num_experts else 0
    across = wide if wide > 0 else num_windows
    of_experts, of_ranks = np.zeros((4, num_experts)), np.zeros((4, ranks))
    searched, ordered = np.zeros((3, num_experts), dtype=np.int64), np.zeros((2, ranks * per_rank), dtype=np.int64)
    part_N = np.zeros(ranks * per_rank + 1)
    for count in range(1, part_N.shape[0]):
        part_N[count] = 1.0 / count
    return Work(
        np.zeros((num_experts, num_windows)),
        of_experts[0],
        of_experts[1],
        np.zeros((num_windows, num_experts)),
        np.zeros((num_windows, num_experts), dtype=np.float32),
        np.zeros((wide, wide), dtype=np.float32),
        of_experts[2],
        np.zeros(num_experts, dtype=np.int64),
        np.zeros(ranks * per_rank, dtype=np.int64),
        np.zeros(num_experts + 1, dtype=np.int64),
        ordered[0],
        ordered[1],
        searched[0],
        searched[1],
        searched[2],
        of_experts[3],
        np.zeros((ranks, per_rank), dtype=np.int32),
        np.zeros(ranks, dtype=np.int64),
        of_ranks[0],
        of_ranks[1],
        of_ranks[2],
        np.zeros(ranks, dtype=np.int64),
        np.zeros((ranks, across), dtype=np.float32),
        np.zeros((ranks, num_windows)),
        np.zeros(num_windows),
        np.zeros((3, num_windows)),
        np.zeros(num_windows),
        np.zeros(num_windows, dtype=np.int64),
        np.zeros((ranks, num_experts), dtype=np.int32),
        np.zeros((ranks, per_rank)),
        of_ranks[3],
        np.zeros(ranks, dtype=np.int64),
        np.zeros(ranks, dtype=np.int64),
        part_N,
    )


@numba.njit(error_model="numpy", cache=CACHE)
def count_replicas(row_RS: IntArray, count_E: IndexArray, last_E: IndexArray) -> bool:
    """Count the slots of each expert; whether some rank holds one twice. `last_E` is scratch.

    Ranks [0, 1] and [0, -1]: counts [2, 1], and no.
    """
    count_E[:] = 0
    last_E[:] = -1
    doubled = False
    for rank in range(row_RS.shape[0]):
        for slot in range(row_RS.shape[1]):
            expert = row_RS[rank, slot]
            if expert >= 0:
                count_E[expert] += 1
                doubled |= last_E[expert] == rank
                last_E[expert] = rank
    return doubled


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def count_slots(row_RS: IntArray, count_E: IndexArray) -> None:
    """Count the slots of each expert, of a row that is known to have none twice on a rank. [0, 1] and [0, -1]: [2, 1]."""
    count_E[:] = 0
    for rank in range(row_RS.shape[0]):
        for slot in range(row_RS.shape[1]):
            expert = row_RS[rank, slot]
            if expert >= 0:
                count_E[expert] += 1


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def put_window_on_ranks(
    load_E: FloatArray, scale: float, row_RS: IntArray, count_E: IndexArray, part_N: FloatArray, load_RT: FloatArray
) -> None:
    """`put_on_ranks`, of a single window of tokens and before its shares have been read: most of what a layer that stays takes.

    Tokens [6, 2], scale 0.25, slots [[0, 1], [0, -1]] and counts [2, 1]: [1.25, 0.75].
    """
    for rank in range(row_RS.shape[0]):
        load = 0.0
        for slot in range(row_RS.shape[1]):
            expert = row_RS[rank, slot]
            if expert >= 0:
                load += load_E[expert] * scale * part_N[count_E[expert]]
        load_RT[rank, 0] = load


@numba.njit(error_model="numpy", cache=CACHE)
def put_on_ranks(
    share_ET: FloatArray,
    num_windows: int,
    row_RS: IntArray,
    count_E: IndexArray,
    part_N: FloatArray,
    load_RT: FloatArray,
) -> None:
    """The load of each rank in each window, written to `load_RT`; empty slots (-1) add nothing. `part_N` is 1 / n for each count n.

    Shares [[1.5, 0.5], [0.5, 1.5]], slots [[0, 1], [0, -1]] and counts [2, 1]: [[1.25, 1.75], [0.75, 0.25]].
    """
    if num_windows == 1:
        for rank in range(row_RS.shape[0]):
            load = 0.0
            for slot in range(row_RS.shape[1]):
                expert = row_RS[rank, slot]
                if expert >= 0:
                    load += share_ET[expert, 0] * part_N[count_E[expert]]
            load_RT[rank, 0] = load
        return
    for rank in range(row_RS.shape[0]):
        for window in range(num_windows):
            load_RT[rank, window] = 0.0
        for slot in range(row_RS.shape[1]):
            expert = row_RS[rank, slot]
            if expert >= 0:
                part = part_N[count_E[expert]]
                for window in range(num_windows):
                    load_RT[rank, window] += share_ET[expert, window] * part


@numba.njit(error_model="numpy", cache=CACHE)
def mean_peak(load_RT: FloatArray, num_windows: int, peak_T: FloatArray) -> float:
    """The mean over windows of the busiest rank's load, which is the mean PAR; writes the peaks to `peak_T`.

    [[1.25, 1.75], [0.75, 0.25]]: (1.25 + 1.75) / 2 = 1.5.
    """
    if num_windows == 1:
        peak = load_RT[0, 0]
        for rank in range(1, load_RT.shape[0]):
            peak = max(peak, load_RT[rank, 0])
        peak_T[0] = peak
        return float(peak)
    for window in range(num_windows):
        peak_T[window] = load_RT[0, window]
    for rank in range(1, load_RT.shape[0]):
        for window in range(num_windows):
            peak_T[window] = max(peak_T[window], load_RT[rank, window])
    total = 0.0
    for window in range(num_windows):
        total += peak_T[window]
    return total / num_windows


@numba.njit(error_model="numpy", cache=CACHE)
def heaviest_first(weight_N: FloatArray) -> IndexArray:
    """Items by descending weight, equal ones in their order.

    [30, 40, 20, 30]: [1, 0, 3, 2].

    Merge sort of stretches of COUNTED items. In those, an item's place is the number of items that go before it: that compares
    all pairs, but without a branch that a processor would have to guess. (np.argsort takes nearly a second longer to compile.)
    """
    num_items = weight_N.shape[0]
    order, merged = np.zeros(num_items, dtype=np.int64), np.zeros(num_items, dtype=np.int64)
    for start in range(0, num_items, COUNTED):
        end = min(start + COUNTED, num_items)
        for item in range(start, end):
            before, weight = np.int64(0), weight_N[item]
            for other in range(start, item):
                first = int(weight_N[other] >= weight)
                before += first
                merged[other] += 1 - first
            merged[item] = before
        for item in range(start, end):
            order[start + merged[item]] = item
    width = COUNTED
    while width < num_items:
        for start in range(0, num_items, 2 * width):
            middle, end = min(start + width, num_items), min(start + 2 * width, num_items)
            left, right = start, middle
            for place in range(start, end):
                if left < middle and (right >= end or weight_N[order[left]] >= weight_N[order[right]]):
                    merged[place] = order[left]
                    left += 1
                else:
                    merged[place] = order[right]
                    right += 1
        order, merged = merged, order
        width *= 2
    return order

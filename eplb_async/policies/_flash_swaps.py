"""Swaps that follow the tree search of the `flashlb` policy: two experts change ranks where that lowers the mean PAR.

The measure is the one that the search uses, the mean over the recorded windows of the busiest rank's load. Replica counts
stay. Imports numba (see `_kernels` for what that implies). Every function has a plain twin in tests/policies/twins_flash.py.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._flash_work import INNER, Rules, Work
from eplb_async.policies._kernels import CACHE

__all__ = ["ENOUGH", "EVENNESS", "NO_GAIN", "TRIES", "find_peaks", "find_swap", "swap_experts"]

IntArray = NDArray[np.int32]
IndexArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

ENOUGH = 0.8
"""The search for a swap ends once it gains as much of what lowering this one rank can gain."""

NO_GAIN = 1e-9
"""A gain of the mean PAR below this is none: it may come from rounding."""

EVENNESS = 0.3
"""With a single window, a swap is worth less than it gains by this part of what it would make the busier of its two ranks busier if all
experts were equally hot."""

TRIES = 1
"""Ranks that no swap lowers before the swapping ends."""


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def swap_experts(work: Work, num_windows: int, count_E: IndexArray, score: float, rules: Rules) -> float:
    """Lower the rank that is the busiest of most windows by swaps with others, best first, as long as that helps.

    One window, rank loads 5 + 4 and 2 + 1 (experts 0, 1 | 2, 3): swapping 0 with 2 gives 6 and 6, and no swap improves that.

    Only swaps that lower the mean load of the rank, and leave the other below it, are tried: what helps in a few recorded
    windows alone will not help in the next ones. A single window says nothing about how loads vary. There, swaps that keep the
    two ranks even count more (EVENNESS). Where hot experts, which have several replicas, are others in the next window, ranks
    without such replicas are the busiest.

    Args:
        work: shares and means are read, the placement with its loads and means changed.
        num_windows: those with load.
        count_E: replicas of each expert.
        score: the mean PAR of the placement.
        rules: most swaps, and what is good enough.

    Returns:
        The mean PAR after the swaps.
    """
    row_RS, load_RT, mean_R = work.row_RS, work.load_RT, work.mean_R
    held_RE, unit_RS, even_R, settled_R = work.held_RE, work.unit_RS, work.even_R, work.settled_R
    _read_slots(work, count_E)
    settled_R[:] = 0
    slope = EVENNESS * row_RS.shape[0] / count_E.shape[0] if num_windows == 1 else 0.0
    swaps, failed = 0, 0
    while swaps < rules.most_swaps and failed < TRIES and score > rules.good_enough:
        busiest = find_peaks(load_RT, mean_R, num_windows, settled_R, work.top_3T)
        if busiest < 0:
            break
        gain, mine, other, theirs = find_swap(work, num_windows, count_E, busiest, slope)
        if other < 0:
            settled_R[busiest] = 1
            failed += 1
            continue
        expert, swapped = row_RS[busiest, mine], row_RS[other, theirs]
        part, swapped_part = 1.0 / count_E[expert], 1.0 / count_E[swapped]
        for window in range(num_windows):
            less = work.share_ET[expert, window] * part - work.share_ET[swapped, window] * swapped_part
            load_RT[busiest, window] -= less
            load_RT[other, window] += less
        less = work.mean_E[expert] * part - work.mean_E[swapped] * swapped_part
        mean_R[busiest] -= less
        mean_R[other] += less
        even_R[busiest] -= part - swapped_part
        even_R[other] += part - swapped_part
        row_RS[busiest, mine], row_RS[other, theirs] = swapped, expert
        unit_RS[busiest, mine], unit_RS[other, theirs] = unit_RS[other, theirs], unit_RS[busiest, mine]
        held_RE[busiest, expert] -= 1
        held_RE[other, expert] += 1
        held_RE[other, swapped] -= 1
        held_RE[busiest, swapped] += 1
        settled_R[:] = 0
        score -= gain / num_windows
        swaps += 1
    return score


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def _read_slots(work: Work, count_E: IndexArray) -> None:
    """What the swaps look up, of the placement: `held_RE`, `unit_RS` and `even_R`."""
    row_RS, held_RE, unit_RS, even_R = work.row_RS, work.held_RE, work.unit_RS, work.even_R
    held_RE[:] = 0
    even_R[:] = 0.0
    for rank in range(row_RS.shape[0]):
        for slot in range(row_RS.shape[1]):
            expert = row_RS[rank, slot]
            held_RE[rank, expert] += 1
            unit_RS[rank, slot] = work.mean_E[expert] / count_E[expert]
            even_R[rank] += 1.0 / count_E[expert]


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def find_swap(  # size: the innermost loops stand here: a call with the arrays that they read takes longer than they do
    work: Work, num_windows: int, count_E: IndexArray, busiest: int, slope: float
) -> tuple[float, int, int, int]:
    """The swap of an expert of the busiest rank with one of another rank that lowers the sum of the peaks most.

    Rank loads 9 and 3 of one window, an expert of 5 for one of 2: the peak falls by 9 - max(9 - 3, 3 + 3) = 3.

    For each expert and rank, one swap is tried: with the expert there that leaves the means of the two most alike. Ranks
    below the average are tried, by ascending mean, and the search ends once a swap is worth ENOUGH of what lowering the busiest rank can
    gain. Of each swap the windows whose peak the busiest rank is are looked at first: in the others it hardly ever gains (the other
    rank's load grows on average), so a swap that has not gained more there than the best one is worth is given up.

    A slope of 0.2: an expert of two replicas for one of a single replica gives the busiest rank half an expert's load more, if all are equally
    hot. Where it is the busier of the two then, too, this swap is worth 0.1 less than it gains.

    Args:
        work: the placement with its peaks (`find_peaks`), `unit_RS`, `even_R` and `held_RE`; `windows_T`, `rest_T` and `rank_R` are scratch.
        num_windows: those with load.
        count_E: replicas of each expert.
        busiest: the rank.
        slope: how much less than it gains a swap is worth for each expert's load, all being equally hot, by which it makes the
            busier of the two ranks busier; in the choice of the expert there, how much less alike that makes the means.

    Returns:
        Of the swap that is worth most: the gain, summed over windows; the slot of the busiest rank, the other rank (-1 if no
        swap gains), and its slot.
    """
    row_RS, load_RT, mean_R, unit_RS, share_ET = work.row_RS, work.load_RT, work.mean_R, work.unit_RS, work.share_ET
    top_3T, rest_T, windows_T, held_RE, rank_R = work.top_3T, work.rest_T, work.windows_T, work.held_RE, work.rank_R
    even_R = work.even_R
    per_rank = row_RS.shape[1]
    num_first, most = _order_windows(load_RT, top_3T, num_windows, busiest, windows_T)
    _sort_ranks(mean_R, rank_R)
    least = NO_GAIN * num_windows
    worth, gain, mine, other, theirs = -np.inf, 0.0, 0, -1, 0
    for rank in rank_R:
        if mean_R[rank] >= min(mean_R[busiest], 1.0) or worth >= ENOUGH * most:
            break
        for window in range(num_windows):
            # the peak of all ranks but these two
            first, second, third = top_3T[0, window], top_3T[1, window], top_3T[2, window]
            one, two = load_RT[busiest, window], load_RT[rank, window]
            below = third if min(one, two) == second else second
            rest_T[window] = below if max(one, two) == first else first
        half = (mean_R[busiest] - mean_R[rank]) / 2.0
        even, other_even = even_R[busiest], even_R[rank]
        for slot in range(per_rank):
            expert = row_RS[busiest, slot]
            if held_RE[rank, expert]:
                continue
            part = 1.0 / count_E[expert]
            near, off = -1, half
            for place in range(per_rank):
                away = abs(unit_RS[busiest, slot] - unit_RS[rank, place] - half)
                swapped = row_RS[rank, place]
                if away < off and not held_RE[busiest, swapped]:
                    if slope > 0.0:
                        less = part - 1.0 / count_E[swapped]
                        rise = max(even - less, other_even + less) - max(even, other_even)
                        away += slope * max(rise, 0.0)
                    if away < off:
                        near, off = place, away
            if near < 0:
                continue
            swapped = row_RS[rank, near]
            swapped_part = 1.0 / count_E[swapped]
            less = part - swapped_part
            harm = slope * (max(even - less, other_even + less) - max(even, other_even))
            gained = 0.0
            for index in range(num_windows):
                if index == num_first and gained <= max(worth, least):
                    break
                window = windows_T[index]
                less = share_ET[expert, window] * part - share_ET[swapped, window] * swapped_part
                peak = max(load_RT[busiest, window] - less, load_RT[rank, window] + less)
                gained += top_3T[0, window] - max(peak, rest_T[window])
            if gained > least and gained - harm > worth:
                worth, gain, mine, other, theirs = gained - harm, gained, slot, rank, near
    return gain, mine, other, theirs


@numba.njit(error_model="numpy", cache=CACHE)
def find_peaks(
    load_RT: FloatArray, mean_R: FloatArray, num_windows: int, settled_R: IndexArray, top_3T: FloatArray
) -> int:
    """Find the three greatest loads of every window, and the rank that is the greatest most often.

    Loads [[3, 1], [2, 5], [1, 4]] of three ranks: tops [[3, 5], [2, 4], [1, 1]]; ranks 0 and 1 are the peak once each, and
    rank 1 has the greater mean.

    Returns:
        The rank, -1 if all that are ever the greatest are settled. Ties: the greater mean, then the first.
    """
    for window in range(num_windows):
        top_3T[0, window] = top_3T[1, window] = top_3T[2, window] = -1.0
    for rank in range(load_RT.shape[0]):
        for window in range(num_windows):
            load, first, second = load_RT[rank, window], top_3T[0, window], top_3T[1, window]
            top_3T[2, window] = max(top_3T[2, window], min(second, load))
            top_3T[1, window] = max(second, min(first, load))
            top_3T[0, window] = max(first, load)
    best, most = -1, 0
    for rank in range(load_RT.shape[0]):
        number = 0
        for window in range(num_windows):
            number += load_RT[rank, window] == top_3T[0, window]
        if settled_R[rank] or number == 0:
            continue
        if number > most or (number == most and mean_R[rank] > mean_R[best]):
            best, most = rank, number
    return best


@numba.njit(error_model="numpy", cache=CACHE)
def _order_windows(
    load_RT: FloatArray, top_3T: FloatArray, num_windows: int, busiest: int, windows_T: IndexArray
) -> tuple[int, float]:
    """Put the windows whose peak the rank is first; how many, and what lowering this rank alone can gain in them."""
    number, most = 0, 0.0
    for window in range(num_windows):
        if load_RT[busiest, window] == top_3T[0, window]:
            windows_T[number] = window
            most += top_3T[0, window] - max(top_3T[1, window], 0.0)
            number += 1
    place = number
    for window in range(num_windows):
        if load_RT[busiest, window] != top_3T[0, window]:
            windows_T[place] = window
            place += 1
    return number, most


@numba.njit(error_model="numpy", cache=CACHE)
def _sort_ranks(mean_R: FloatArray, rank_R: IndexArray) -> None:
    for rank in range(mean_R.shape[0]):
        to = rank
        while to > 0 and mean_R[rank_R[to - 1]] > mean_R[rank]:
            rank_R[to] = rank_R[to - 1]
            to -= 1
        rank_R[to] = rank

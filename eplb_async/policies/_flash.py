"""The `flashlb` policy's plan, layer by layer: is it due, which replica counts, which placement.

    replan        a whole plan, from what the state says to what the next one is to say
    plan_layers   what the layers that are due would get, and what that gains

A plan of a few small layers takes less time than a dozen calls of numpy: so the whole of it is one call into compiled code.
Imports numba (see `_kernels` for what that implies). Twins are in tests/policies/twins_flash.py.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._borrowed import borrowed, keep
from eplb_async.policies._flash_search import NO_HOMES, deal, search
from eplb_async.policies._flash_swaps import swap_experts
from eplb_async.policies._flash_windows import read_noise, read_scales, read_shares, read_statistics
from eplb_async.policies._flash_work import (
    INNER,
    Rules,
    Work,
    count_replicas,
    count_slots,
    heaviest_first,
    mean_peak,
    new_work,
    put_on_ranks,
    put_window_on_ranks,
)
from eplb_async.policies._kernels import CACHE, separate
from eplb_async.policies._matching import keep_slots, match_ranks

__all__ = [
    "HOPELESS",
    "RETRY",
    "WORSE_THAN_FOUND",
    "find_homes",
    "fingerprints",
    "plan_layers",
    "replan",
    "still_promised",
]

IntArray = NDArray[np.int32]
IndexArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

WORSE_THAN_FOUND = 1.02
"""A placement that keeps experts at home may have as much more PAR than the best that the search simulated."""

HOPELESS = 1.1
"""And if it has as much more before its swaps, they are not tried."""

RETRY = 0.97
"""A layer that was planned in vain on several windows is not due again until its mean / peak is below this part of what it was then. With
one window, what was found says no more about the next than the load itself does: there it is tried again."""

BASE = 2**40 + 15
"""Of `fingerprints`."""


@numba.njit(error_model="numpy", cache=CACHE)
def replan(
    windows_TLE: FloatArray,
    live_LP: IntArray,
    promised_L: FloatArray,
    planned_L: IndexArray,
    settings: tuple[int, int, int, int, int, float, int, float, int, float, float, float, float, float],
    most_layers: int,
) -> tuple[IntArray, FloatArray, IndexArray]:
    """Plan the layers that are due, and put what was planned on the ranks and slots that hold most of it.

    Args:
        windows_TLE: tokens per expert.
        live_LP: the live placement; -1 is an empty slot.
        promised_L: what the state says was promised; negative: mean / peak when the layer was planned in vain.
        planned_L: the fingerprints of the rows for which it was.
        settings: `Rules`, or a tuple of the same; a rank has fewer slots than there are experts.
        most_layers: change only so many, those with the greatest gain; 0: no limit.

    Returns:
        int32 [L, P], the placement; and what the next state is to say.
    """
    rules, num_experts = Rules(*settings), windows_TLE.shape[2]
    placement_LP, print_L = live_LP.copy(), fingerprints(live_LP)
    holds_L = still_promised(promised_L, planned_L, print_L)
    owner = new_work(windows_TLE.shape[0], num_experts, rules)
    work: Work = borrowed(owner)
    planned_LP, gain_L, astray_L, ratio_L = plan_layers(windows_TLE, live_LP, holds_L, rules, work)
    keep(owner)
    for layer in range(live_LP.shape[0]):
        if gain_L[layer] == 0.0:
            holds_L[layer] = ratio_L[layer]
    for changed, layer in enumerate(heaviest_first(gain_L)):
        if gain_L[layer] <= 0.0 or changed == most_layers > 0:
            break
        row_1P = planned_LP[layer : layer + 1]
        if astray_L[layer]:
            row_1P = match_ranks(row_1P, live_LP[layer : layer + 1], num_experts, rules.slots_per_rank, 1)
        row_1P = keep_slots(row_1P, live_LP[layer : layer + 1], rules.slots_per_rank)
        for slot in range(live_LP.shape[1]):
            placement_LP[layer, slot] = row_1P[0, slot]
        holds_L[layer], print_L[layer] = ratio_L[layer], fingerprints(row_1P)[0]
    return placement_LP, holds_L, print_L


@numba.njit(error_model="numpy", cache=CACHE)
def fingerprints(row_LP: IntArray) -> IndexArray:
    """A number for each row that tells it from others: its slots as digits to the base 2 ** 40 + 15, modulo 2 ** 64.

    Row [0, 1] (digits 1 and 2, the first counting least): 1 + 2 * 1099511627791 = 2199023255583. An empty slot is the digit 0.

    Returns:
        int64 [L].
    """
    num_layers, num_slots = row_LP.shape
    power_P = np.ones(num_slots, dtype=np.uint64)
    for slot in range(1, num_slots):
        power_P[slot] = power_P[slot - 1] * np.uint64(BASE)
    print_L = np.zeros(num_layers, dtype=np.int64)
    for layer in range(num_layers):
        # a sum of products instead of Horner's scheme, in which each product waits for the one before
        number = np.uint64(0)
        for slot in range(num_slots):
            number += np.uint64(np.uint32(row_LP[layer, slot] + np.int32(1))) * power_P[slot]
        print_L[layer] = np.int64(number)
    return print_L


@numba.njit(error_model="numpy", cache=CACHE)
def still_promised(promised_L: FloatArray, planned_L: IndexArray, print_L: IndexArray) -> FloatArray:
    """What was promised for each layer; 1 for a row that is not the one it was promised for, and for what is no promise.

    Promised [0.9, 0.8, 7, -0.7] for rows [1, 2, 3, 4], live rows [1, 5, 3, 4]: [0.9, 1, 1, -0.7].
    """
    holds_L = np.ones(print_L.shape[0])
    for layer in range(print_L.shape[0]):
        if planned_L[layer] == print_L[layer] and 0.0 < abs(promised_L[layer]) <= 1.0:
            holds_L[layer] = promised_L[layer]
    return holds_L


@numba.njit(error_model="numpy", cache=CACHE)
def plan_layers(  # size: what follows the search stands here: a function of its own takes 3 % longer
    windows_TLE: FloatArray, live_LP: IntArray, promised_L: FloatArray, rules: Rules, work: Work
) -> tuple[IntArray, FloatArray, IndexArray, FloatArray]:
    """Plan the layers that are due.

    Args:
        windows_TLE: tokens per expert.
        live_LP: the live placement; -1 is an empty slot.
        promised_L: mean / peak that was promised when the layer was last deployed, or, negative, that it had when it was planned in vain; 1 if
            nothing is known.
        rules: the settings; a rank has fewer slots than there are experts.
        work: scratch, of T windows.

    Returns:
        int32 [L, P]: planned rows, any where nothing is gained; the gain of each layer: the part by which the mean PAR falls,
        0 for a layer that is to stay, infinite for one that has to change because a rank holds an expert twice; whether it
        was planned without regard to where experts are, so that its ranks are still to be matched to the live ones; and what
        is promised from now on, which for a layer that stays is what was, unless it has been planned in vain.
    """
    num_layers = live_LP.shape[0]
    count_E = work.count_E
    planned_LP = np.zeros(live_LP.shape, dtype=np.int32)
    gain_L, astray_L, ratio_L = np.zeros(num_layers), np.zeros(num_layers, dtype=np.int64), promised_L.copy()
    scale_LT, alone = read_scales(windows_TLE, rules.num_ranks), windows_TLE.shape[0] == 1
    for layer in range(num_layers):
        used, noise = read_noise(scale_LT[layer])
        if used == 0:
            continue
        live_RS = live_LP[layer].reshape((rules.num_ranks, rules.slots_per_rank))
        doubled = _count(live_RS, promised_L[layer], count_E, work.trial_E)
        if alone:
            put_window_on_ranks(windows_TLE[0, layer], scale_LT[layer, 0], live_RS, count_E, work.part_N, work.load_RT)
        else:
            read_shares(windows_TLE, layer, scale_LT[layer], work)
            put_on_ranks(work.share_ET, used, live_RS, count_E, work.part_N, work.load_RT)
        live_par = mean_peak(work.load_RT, used, work.peak_T)
        ratio = 1.0 / max(1.0, live_par - rules.allowance * noise / np.sqrt(used))
        if not doubled and not _is_due(ratio, promised_L[layer], rules):
            continue
        if alone:
            read_shares(windows_TLE, layer, scale_LT[layer], work)
        find_homes(live_RS, count_E, work.home_P, work.home_at_E)
        read_statistics(work, used, rules.z_score)
        order_E = heaviest_first(work.risk_E)
        # it may have to change, or any gain may do, one that only swaps find as well
        worth = np.inf if doubled or rules.least_gain == 0.0 else live_par * (1.0 - rules.least_gain)
        found = search(work, used, order_E, count_E, worth, rules)
        if used > 1:
            # until it turns out to pay
            ratio_L[layer] = -ratio
        if found >= worth:
            continue
        par = np.inf
        for within in (rules.stay_within, NO_HOMES):
            par, met = deal(work, used, order_E, count_E, within, np.inf, rules)
            if met:
                par = _part_doubles(work, used, count_E)
            if within > NO_HOMES and par > found * HOPELESS:
                continue
            par = swap_experts(work, used, count_E, par, rules)
            astray_L[layer] = within == NO_HOMES
            if par <= found * WORSE_THAN_FOUND:
                break
        gain = 1.0 - par / live_par
        if doubled or gain > rules.least_gain:
            gain_L[layer] = np.inf if doubled else gain
            ratio_L[layer] = 1.0 / par
        planned_RS = planned_LP[layer].reshape(live_RS.shape)
        for rank in range(rules.num_ranks):
            for slot in range(rules.slots_per_rank):
                planned_RS[rank, slot] = work.row_RS[rank, slot]
    return planned_LP, gain_L, astray_L, ratio_L


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def _count(row_RS: IntArray, promised: float, count_E: IndexArray, last_E: IndexArray) -> bool:
    """Count the replicas of a live row; whether some rank holds an expert twice. `last_E` is scratch."""
    if promised == 1.0:
        return count_replicas(row_RS, count_E, last_E)
    # planned, or planned in vain: had a rank held an expert twice, the row would be another one
    count_slots(row_RS, count_E)
    return False


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def _is_due(ratio: float, promised: float, rules: Rules) -> bool:
    """Whether a layer of this mean / peak is to be planned.

    Promised 0.8, `ratio` 0.98, `below` 0.7: at less than 0.784. Planned in vain at 0.5: at less than 0.485.
    """
    if promised < 0.0:
        return ratio < -RETRY * promised
    return ratio < rules.ratio * promised or ratio < rules.below


@numba.njit(error_model="numpy", cache=CACHE)
def find_homes(row_RS: IntArray, count_E: IndexArray, home_P: IndexArray, home_at_E: IndexArray) -> None:
    """List the ranks that hold each expert, of which `count_E` says how many there are.

    [[0, 1], [0, -1]] and counts [2, 1]: ranks [0, 1, 0], which begin at [0, 2, 3].
    """
    home_at_E[0] = 0
    for expert in range(count_E.shape[0]):
        home_at_E[expert + 1] = home_at_E[expert] + count_E[expert]
    # filled from the last rank down, each list from its end
    for rank in range(row_RS.shape[0] - 1, -1, -1):
        for slot in range(row_RS.shape[1]):
            expert = row_RS[rank, slot]
            if expert >= 0:
                count_E[expert] -= 1
                home_P[home_at_E[expert] + count_E[expert]] = rank
    for expert in range(count_E.shape[0]):
        count_E[expert] = home_at_E[expert + 1] - home_at_E[expert]


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def _part_doubles(work: Work, num_windows: int, count_E: IndexArray) -> float:
    """Swap replicas that met on a rank apart; the mean PAR after that."""
    row_P = work.row_RS.reshape(work.row_RS.size)
    weight_P = np.zeros(row_P.shape[0])
    for slot in range(row_P.shape[0]):
        weight_P[slot] = work.mean_E[row_P[slot]] / count_E[row_P[slot]]
    separate(row_P, weight_P, work.mean_R, count_E.shape[0])
    put_on_ranks(work.share_ET, num_windows, work.row_RS, count_E, work.part_N, work.load_RT)
    return mean_peak(work.load_RT, num_windows, work.peak_T)

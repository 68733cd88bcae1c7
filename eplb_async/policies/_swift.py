"""The `swift_balancer` policy's loop over layers, compiled by numba: one layer at a time, one thread (see `_kernels`).

    _swift_layer    what the loops work on
    _swift_copies   which experts the redundant slots copy
    _swift_swaps    swaps between ranks

Plain twins of all of them are in tests/policies/twins_swift.py.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._kernels import CACHE
from eplb_async.policies._swift_copies import choose_copies, fill_rest, place_copies
from eplb_async.policies._swift_layer import Layer, Rules, open_layer, start_plan
from eplb_async.policies._swift_swaps import swap_while_it_pays

__all__ = ["plan_layer", "plan_layers", "restore_slots"]

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]


@numba.njit(error_model="numpy", cache=CACHE)
def plan_layers(load_LE: FloatArray, live_LP: IntArray, num_ranks: int, rules: Rules) -> IntArray:
    """Plan each layer by itself from the live placement.

    Args:
        load_LE: tokens per expert.
        live_LP: the live placement, -1 for an empty slot.
        num_ranks: R.
        rules: of the plan.

    Returns:
        int32 [L, P]; equal to the live row in a layer that is left alone.
    """
    num_experts, num_slots = load_LE.shape[1], live_LP.shape[1]
    planned_LP = live_LP.copy()
    live_RE = np.empty((num_ranks, num_experts), dtype=np.bool_)
    held_RE = np.empty((num_ranks, num_experts), dtype=np.bool_)
    sent_RR = np.empty((num_ranks, num_ranks), dtype=np.int32)
    count_E = np.empty(num_experts, dtype=np.int64)
    share_E = np.empty(num_experts, dtype=np.float64)
    rank_load_R = np.empty(num_ranks, dtype=np.float64)
    source_P = np.empty(num_slots, dtype=np.int64)
    for index in range(load_LE.shape[0]):
        layer = Layer(
            load_LE[index],
            live_LP[index],
            live_RE,
            planned_LP[index],
            held_RE,
            count_E,
            share_E,
            rank_load_R,
            source_P,
            sent_RR,
        )
        plan_layer(layer, rules)
    return planned_LP


@numba.njit(error_model="numpy", cache=CACHE)
def plan_layer(layer: Layer, rules: Rules) -> None:
    """Plan one layer: leave it, or choose its copies anew and swap experts, if that pays.

    Loads [6, 3, 1, 1] in [0, 1 | 2, 3], all gains 0: no slot is redundant; 0 and 2 change places, which lowers the peak
    from 9 to 7, and then no swap lowers it further: [2, 1 | 0, 3]. If 2 moves of 4 slots had to lower the peak by more than
    2, that is with a layer_gain over 2 * 4 / 2 / 2.75 (the mean slot load) = 1.45, the layer would stay as it is.

    Args:
        layer: its `row_P` equals `live_P`; the arrays after that are filled in here.
        rules: of the plan.
    """
    repeats = open_layer(layer, rules)
    total, old_peak = 0.0, 0.0
    for expert in range(layer.load_E.shape[0]):
        total += layer.load_E[expert]
    for rank in range(layer.rank_load_R.shape[0]):
        old_peak = max(old_peak, layer.rank_load_R[rank])
    mean = total / layer.rank_load_R.shape[0]
    if not repeats and old_peak <= rules.threshold * mean:
        return
    # a rank that holds an expert twice for no need is mended whatever that does to the peak
    best = np.inf if repeats else old_peak
    best_P = layer.live_P.copy()
    margin = rules.copy_gain * mean / rules.slots_per_rank
    for _ in range(2):
        start_plan(layer, rules)
        for first_rank in range(0, layer.rank_load_R.shape[0], rules.ranks_per_unit):
            chosen = choose_copies(layer, rules, first_rank, margin)
            place_copies(layer, rules, first_rank, chosen)
            fill_rest(layer, rules, first_rank)
        score, stuck = swap_while_it_pays(layer, rules, mean)
        if score < best:
            best = score
            for slot in range(best_P.shape[0]):
                best_P[slot] = layer.row_P[slot]
        if not stuck or margin == 0:
            break
        margin = 0.0
    # slot by slot: a slice assignment takes numba two seconds longer to compile
    for slot in range(best_P.shape[0]):
        layer.row_P[slot] = best_P[slot]
    restore_slots(layer, rules)


@numba.njit(error_model="numpy", cache=CACHE)
def restore_slots(layer: Layer, rules: Rules) -> None:
    """Put experts that are on the rank where they were into the slot where they were.

    [2, 0, 3] over a live [0, 1, 2]: 0 and then 2 go back, [0, 3, 2]. (The row holds no expert twice on a rank.)
    """
    row_P, live_P = layer.row_P, layer.live_P
    for slot in range(row_P.shape[0]):
        first = slot // rules.slots_per_rank * rules.slots_per_rank
        for other in range(first, first + rules.slots_per_rank):
            if other != slot and row_P[other] >= 0 and row_P[other] == live_P[slot]:
                row_P[slot], row_P[other] = row_P[other], row_P[slot]
                break

"""The loops that swap experts between ranks, for the `swift_balancer` policy (see `_kernels` for numba)."""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._kernels import CACHE
from eplb_async.policies._swift_layer import Layer, Rules, sum_rank

__all__ = ["best_swap", "swap", "swap_while_it_pays"]

FloatArray = NDArray[np.float64]


@numba.njit(error_model="numpy", cache=CACHE)
def swap_while_it_pays(layer: Layer, rules: Rules, mean: float) -> tuple[float, bool]:
    """Swap experts of the heaviest rank away; then take back the last swaps as far as they did not pay.

    Returns:
        The peak that is left plus what the moves of the plan cost (the least sum after any number of swaps); and whether
        swaps ended for want of a good one with a peak over `copy_gain` slot loads above the mean.
    """
    slot_load, num_slots = mean / rules.slots_per_rank, layer.row_P.shape[0]
    num_moved, peak = 0, 0.0
    for slot in range(num_slots):
        num_moved += layer.source_P[slot] >= 0
    for rank in range(layer.rank_load_R.shape[0]):
        layer.rank_load_R[rank] = sum_rank(rank, rules.slots_per_rank, layer.row_P, layer.share_E)
        peak = max(peak, layer.rank_load_R[rank])
    cost_of_move = rules.layer_gain * slot_load / num_slots
    swapped = np.empty((rules.most_swaps, 2), dtype=np.int64)
    stuck = False
    num_swaps, kept, kept_peak, least = 0, 0, peak, peak + cost_of_move * num_moved
    while num_swaps < rules.most_swaps and peak > rules.threshold * mean:
        slot, other, moves = best_swap(layer, rules, rules.swap_gain * slot_load)
        if slot < 0:
            stuck = True
            break
        swap(layer, rules, slot, other)
        swapped[num_swaps, 0], swapped[num_swaps, 1] = slot, other
        num_swaps += 1
        num_moved += moves
        peak = 0.0
        for rank in range(layer.rank_load_R.shape[0]):
            peak = max(peak, layer.rank_load_R[rank])
        if peak + cost_of_move * num_moved < least:
            kept, kept_peak, least = num_swaps, peak, peak + cost_of_move * num_moved
    for taken_back in range(num_swaps - 1, kept - 1, -1):
        slot, other = swapped[taken_back, 0], swapped[taken_back, 1]
        layer.row_P[slot], layer.row_P[other] = layer.row_P[other], layer.row_P[slot]
    return least, stuck and kept_peak > mean + rules.copy_gain * slot_load


@numba.njit(error_model="numpy", cache=CACHE)
def best_swap(layer: Layer, rules: Rules, gain_per_move: float) -> tuple[int, int, int]:
    """The swap of an expert on the heaviest rank with one on another rank that is most worth its moves.

    Its gain is by how much the busier of the two ranks gets lighter, less `gain_per_move` for each expert that it brings to
    a rank where it is not live. An expert that is new on its rank costs nothing more if it goes on to a third one; one that
    comes back costs less than nothing.

    Loads [6, 3, 1, 1] in [0, 1 | 2, 3], rank loads [9, 2], 0.5 per move: swapping 0 with 2 leaves 4 and 7, a gain of 2 for 2
    moves, worth 1; so do 0 with 3, and 1 with either (7 and 4), but they come later: (0, 2, 2).

    Returns:
        The slots of the heaviest and the other rank, and the moves it adds; (-1, -1, 0) if no swap is worth anything.
        Ties: the lightest other rank, then the first slot, then the first other slot.
    """
    rank_load_R, done_R = layer.rank_load_R, np.zeros(layer.rank_load_R.shape[0], dtype=np.bool_)
    heavy = 0
    for rank in range(rank_load_R.shape[0]):
        if rank_load_R[rank] > rank_load_R[heavy]:
            heavy = rank
    first_rank = heavy // rules.ranks_per_unit * rules.ranks_per_unit
    # looked up once for the loops below; with -inf in a free slot no swap with it gains anything
    share_P = np.empty(layer.row_P.shape[0], dtype=np.float64)
    for slot in range(share_P.shape[0]):
        share_P[slot] = layer.share_E[layer.row_P[slot]] if layer.row_P[slot] >= 0 else -np.inf
    best_slot, best_other, best_moves, best = -1, -1, 0, 0.0
    for _ in range(rules.ranks_per_unit):
        light = -1
        for rank in range(first_rank, first_rank + rules.ranks_per_unit):
            if not done_R[rank] and (light < 0 or rank_load_R[rank] < rank_load_R[light]):
                light = rank
        done_R[light] = True
        # no swap gains more than half the gap or takes back more than two moves; the ranks that follow have smaller gaps
        if (rank_load_R[heavy] - rank_load_R[light]) / 2 + 2 * gain_per_move <= best:
            break
        if light != heavy:
            # int(): numba would compile the call a second time for the literals that both start as
            slot, other, moves, worth = _best_swap_between(
                layer, rules, share_P, int(heavy), int(light), gain_per_move, best
            )
            if slot >= 0:
                best_slot, best_other, best_moves, best = slot, other, moves, worth
    return best_slot, best_other, best_moves


@numba.njit(error_model="numpy", cache=CACHE)
def _best_swap_between(  # size: the innermost loops, on what their caller looked up
    layer: Layer, rules: Rules, share_P: FloatArray, heavy: int, light: int, gain_per_move: float, best: float
) -> tuple[int, int, int, float]:
    """The swap between two ranks that is most worth its moves, if more than `best`: slots, moves, worth; or (-1, ...)."""
    row_P, source_P = layer.row_P, layer.source_P
    held_RE, live_RE, sent_RR = layer.held_RE, layer.live_RE, layer.sent_RR
    per_rank, most = rules.slots_per_rank, rules.most_transfers
    gap = layer.rank_load_R[heavy] - layer.rank_load_R[light]
    best_slot, best_other, best_moves = -1, -1, 0
    for slot in range(heavy * per_rank, (heavy + 1) * per_rank):
        expert, source, share = row_P[slot], source_P[slot], share_P[slot]
        # the least gain that can be worth more than the best so far, as the other expert takes back one move at most
        # (and two for both, here where the moves of this one are not known yet); a gain is never more than the share
        if expert < 0 or held_RE[light, expert] or share <= best - 2 * gain_per_move:
            continue
        moves = 0 if source < 0 else -1
        if not live_RE[light, expert]:
            moves += 1
            if sent_RR[heavy if source < 0 else source, light] >= most:
                continue
        needed = max(best + gain_per_move * (moves - 1), 0.0)
        for other in range(light * per_rank, (light + 1) * per_rank):
            less = share - share_P[other]
            gain = min(less, gap - less)
            if gain <= needed:
                continue
            swapped, other_source = row_P[other], source_P[other]
            if held_RE[heavy, swapped]:
                continue
            both = moves if other_source < 0 else moves - 1
            if not live_RE[heavy, swapped]:
                both += 1
                if sent_RR[light if other_source < 0 else other_source, heavy] >= most:
                    continue
            if gain - gain_per_move * both > best:
                best_slot, best_other, best_moves = slot, other, both
                best = gain - gain_per_move * both
                needed = max(best + gain_per_move * (moves - 1), 0.0)
    return best_slot, best_other, best_moves, best


@numba.njit(error_model="numpy", cache=CACHE)
def swap(layer: Layer, rules: Rules, slot: int, other: int) -> None:
    """Exchange the experts of two slots on different ranks; what they come from, and the loads of both, follow.

    [0, 1 | 2, 3], all live: after swapping slots 1 and 2, [0, 2 | 1, 3], slot 1 has its expert from rank 1, slot 2 from
    rank 0, and each rank sends the other one expert.
    """
    row_P, source_P, held_RE = layer.row_P, layer.source_P, layer.held_RE
    for place in (slot, other):
        rank = place // rules.slots_per_rank
        held_RE[rank, row_P[place]] = False
        if source_P[place] >= 0:
            layer.sent_RR[source_P[place], rank] -= 1
        else:
            source_P[place] = rank
    row_P[slot], row_P[other] = row_P[other], row_P[slot]
    source_P[slot], source_P[other] = source_P[other], source_P[slot]
    for place in (slot, other):
        rank = place // rules.slots_per_rank
        held_RE[rank, row_P[place]] = True
        if layer.live_RE[rank, row_P[place]]:
            source_P[place] = -1
        else:
            layer.sent_RR[source_P[place], rank] += 1
        layer.rank_load_R[rank] = sum_rank(rank, rules.slots_per_rank, row_P, layer.share_E)

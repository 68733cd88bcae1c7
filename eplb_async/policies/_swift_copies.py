"""The loops that choose anew what redundant slots copy, for the `swift_balancer` policy (see `_kernels` for numba).

In each unit of ranks

    choose_copies   experts with many tokens per replica take slots from experts that would hardly miss theirs
    place_copies    each new copy goes to the lightest rank that has a free slot for it
    fill_rest       a slot that is still free gets its expert back, or, if it was empty, the hottest one that may go there
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._kernels import CACHE
from eplb_async.policies._swift_layer import Layer, Rules, sum_rank

__all__ = ["choose_copies", "fill_rest", "first_free", "hottest", "least_missed", "place_copies"]

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@numba.njit(error_model="numpy", cache=CACHE)
def choose_copies(layer: Layer, rules: Rules, first_rank: int, margin: float) -> LongArray:
    """Decide which experts of a unit get another replica, and free the slots for them.

    Free slots go to the experts with most tokens per replica. Then, while an expert has over `margin` more tokens per
    replica than another would have with one replica less, that other gives up a replica: on the heaviest rank that does not
    hold the hot expert, or if there is none, on the heaviest.

    Loads [90, 40, 20, 6] in [0, 1, 2 | 3, 1, 2], one unit of two ranks, margin 10: 0 has 90 tokens per replica, and 2 would
    have 20 without one of its two: 2 leaves rank 1, which does not hold 0, and 0 is chosen, [0]; the row is
    [0, 1, 2 | 3, 1, -]. Now 0 and 1 are on all ranks; 2 has 20, but 1 would have 40 with one replica less: that is all.

    Args:
        layer: `row_P` and `held_RE` lose the freed slots; `count_E` and `share_E` follow what is chosen.
        rules: of the plan.
        first_rank: of the unit.
        margin: tokens.

    Returns:
        The experts to place, int64, one per new replica, in the order they were chosen; never more than free slots.
    """
    load_E, count_E, share_E, row_P = layer.load_E, layer.count_E, layer.share_E, layer.row_P
    first, end = first_rank * rules.slots_per_rank, (first_rank + rules.ranks_per_unit) * rules.slots_per_rank
    # in this unit: the slots of each expert, and how many ranks could still take it (none if it is live on none)
    placed_E = np.zeros(load_E.shape[0], dtype=np.int64)
    room_E = np.zeros(load_E.shape[0], dtype=np.int64)
    chosen = np.empty(end - first, dtype=np.int64)
    num_chosen, num_free = 0, 0
    for slot in range(first, end):
        if layer.live_P[slot] >= 0:
            room_E[layer.live_P[slot]] = rules.ranks_per_unit
        if row_P[slot] >= 0:
            placed_E[row_P[slot]] += 1
        else:
            num_free += 1
    for expert in range(load_E.shape[0]):
        room_E[expert] -= placed_E[expert]
    while num_chosen < end - first:
        hot = hottest(share_E, count_E, room_E, rules.most_replicas)
        if hot < 0:
            break
        if num_free > 0:
            num_free -= 1
        else:
            donor = least_missed(load_E, count_E, placed_E)
            if donor < 0 or share_E[hot] - load_E[donor] / (count_E[donor] - 1) <= margin:
                break
            _free(layer, rules, first_rank, donor, hot)
            placed_E[donor] -= 1
            room_E[donor] += 1
            count_E[donor] -= 1
            share_E[donor] = load_E[donor] / count_E[donor]
        chosen[num_chosen] = hot
        num_chosen += 1
        room_E[hot] -= 1
        count_E[hot] += 1
        share_E[hot] = load_E[hot] / count_E[hot]
    return chosen[:num_chosen]


@numba.njit(error_model="numpy", cache=CACHE)
def hottest(share_E: FloatArray, count_E: LongArray, room_E: LongArray, most_replicas: int) -> int:
    """The expert with most tokens per replica among those with room for one more and fewer than K; -1: none.

    Shares [5, 9, 9, 7] of [1, 2, 1, 1] replicas, room for all but the last: 2, the one of both 9s with fewer replicas.
    """
    best = -1
    for expert in range(share_E.shape[0]):
        if room_E[expert] <= 0 or count_E[expert] >= most_replicas:
            continue
        if (
            best < 0
            or share_E[expert] > share_E[best]
            or (share_E[expert] == share_E[best] and count_E[expert] < count_E[best])
        ):
            best = expert
    return best


@numba.njit(error_model="numpy", cache=CACHE)
def least_missed(load_E: FloatArray, count_E: LongArray, placed_E: LongArray) -> int:
    """The expert with a slot in the unit that would have fewest tokens per replica with one replica less; -1: none.

    Loads [90, 40, 60, 5] of [2, 2, 3, 1] replicas: 30 would be left for 2, and 40 for 1: expert 2.
    """
    best, fewest = -1, np.inf
    for expert in range(load_E.shape[0]):
        if placed_E[expert] > 0 and count_E[expert] > 1:
            without = load_E[expert] / (count_E[expert] - 1)
            if without < fewest:
                best, fewest = expert, without
    return best


@numba.njit(error_model="numpy", cache=CACHE)
def _free(layer: Layer, rules: Rules, first_rank: int, donor: int, hot: int) -> None:
    """Free the donor's slot on the heaviest rank of the unit, a rank without the hot expert if there is one."""
    best, heaviest, best_holds_hot = -1, -1.0, True
    for rank in range(first_rank, first_rank + rules.ranks_per_unit):
        if not layer.held_RE[rank, donor]:
            continue
        load = sum_rank(rank, rules.slots_per_rank, layer.row_P, layer.share_E)
        holds_hot = bool(layer.held_RE[rank, hot])
        if best < 0 or (best_holds_hot and not holds_hot) or (best_holds_hot == holds_hot and load > heaviest):
            best, heaviest, best_holds_hot = rank, load, holds_hot
    slot = best * rules.slots_per_rank
    while layer.row_P[slot] != donor:
        slot += 1
    layer.row_P[slot] = -1
    layer.held_RE[best, donor] = False


@numba.njit(error_model="numpy", cache=CACHE)
def place_copies(layer: Layer, rules: Rules, first_rank: int, chosen: LongArray) -> None:
    """Put the chosen copies into the free slots of a unit: most tokens per replica first, each on the lightest rank.

    Copy [0] of 45 tokens into [0, 1, 2 | 3, 1, -], rank loads [85, 26]: only rank 1 has a free slot, and it does not hold 0.
    [0, 1, 2 | 3, 1, 0], and the new copy comes from rank 0.

    A rank is fit for a copy if it has a free slot, does not hold the expert, and either it is live there or a rank of the
    unit where it is live may send one more expert there. A copy for which no rank is fit is not made.

    Args:
        layer: changed.
        rules: of the plan.
        first_rank: of the unit.
        chosen: experts, as `choose_copies` returned them; destroyed.
    """
    per_rank, end_rank = rules.slots_per_rank, first_rank + rules.ranks_per_unit
    share_E, rank_load_R = layer.share_E, layer.rank_load_R
    for rank in range(first_rank, end_rank):
        rank_load_R[rank] = sum_rank(rank, per_rank, layer.row_P, share_E)
    for _ in range(chosen.shape[0]):
        hot = -1
        for place in range(chosen.shape[0]):
            if chosen[place] >= 0 and (hot < 0 or share_E[chosen[place]] > share_E[chosen[hot]]):
                hot = place
        expert = chosen[hot]
        chosen[hot] = -1
        best_slot = -1
        for rank in range(first_rank, end_rank):
            if best_slot < 0 or rank_load_R[rank] < rank_load_R[best_slot // per_rank]:
                slot = first_free(rank, per_rank, layer.row_P)
                if slot >= 0 and _fits(layer, rules, rank, expert):
                    best_slot = slot
        if best_slot >= 0:
            rank = best_slot // per_rank
            _put(layer, rules, best_slot, expert)
            rank_load_R[rank] = sum_rank(rank, per_rank, layer.row_P, share_E)
        else:
            layer.count_E[expert] -= 1
            share_E[expert] = layer.load_E[expert] / layer.count_E[expert]
            for rank in range(first_rank, end_rank):
                rank_load_R[rank] = sum_rank(rank, per_rank, layer.row_P, share_E)


@numba.njit(error_model="numpy", cache=CACHE)
def fill_rest(layer: Layer, rules: Rules, first_rank: int) -> None:
    """Fill the slots of a unit that are still free, in slot order, where that can be done.

    A slot that `choose_copies` freed gets its expert back, which moves nothing; one that was empty gets the expert with most
    tokens per replica that fits: [0, 1, - | 3, 2, 0] becomes [0, 1, 2 | 3, 2, 0] over a live [0, 1, 2 | 3, 2, 1].
    """
    first, end = first_rank * rules.slots_per_rank, (first_rank + rules.ranks_per_unit) * rules.slots_per_rank
    fits_E = np.zeros(layer.load_E.shape[0], dtype=np.int64)
    for slot in range(first, end):
        if layer.row_P[slot] >= 0:
            continue
        rank, best = slot // rules.slots_per_rank, int(layer.live_P[slot])
        if best < 0 or layer.held_RE[rank, best] or layer.count_E[best] >= rules.most_replicas:
            for expert in range(fits_E.shape[0]):
                fits_E[expert] = _fits(layer, rules, rank, expert)
            best = hottest(layer.share_E, layer.count_E, fits_E, rules.most_replicas)
        if best >= 0:
            _put(layer, rules, slot, best)
            layer.count_E[best] += 1
            layer.share_E[best] = layer.load_E[best] / layer.count_E[best]


@numba.njit(error_model="numpy", cache=CACHE)
def first_free(rank: int, slots_per_rank: int, row_P: IntArray) -> int:
    """The first free slot of a rank; -1: none. Slots [4, -, -] of rank 0: 1."""
    for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
        if row_P[slot] < 0:
            return slot
    return -1


@numba.njit(error_model="numpy", cache=CACHE)
def _fits(layer: Layer, rules: Rules, rank: int, expert: int) -> bool:
    """Whether a rank that has a free slot may take an expert."""
    if layer.held_RE[rank, expert]:
        return False
    return bool(layer.live_RE[rank, expert]) or _sender(layer, rules, rank, expert) >= 0


@numba.njit(error_model="numpy", cache=CACHE)
def _sender(layer: Layer, rules: Rules, rank: int, expert: int) -> int:
    """The rank of the unit where an expert is live that sends least to a rank, if it may send more; else -1."""
    first = rank // rules.ranks_per_unit * rules.ranks_per_unit
    best, fewest = -1, rules.most_transfers
    for sender in range(first, first + rules.ranks_per_unit):
        if layer.live_RE[sender, expert] and layer.sent_RR[sender, rank] < fewest:
            best, fewest = sender, layer.sent_RR[sender, rank]
    return best


@numba.njit(error_model="numpy", cache=CACHE)
def _put(layer: Layer, rules: Rules, slot: int, expert: int) -> None:
    """Put an expert that fits into a free slot."""
    rank = slot // rules.slots_per_rank
    layer.row_P[slot] = expert
    layer.held_RE[rank, expert] = True
    layer.source_P[slot] = -1
    if not layer.live_RE[rank, expert]:
        source = _sender(layer, rules, rank, expert)
        layer.source_P[slot] = source
        layer.sent_RR[source, rank] += 1

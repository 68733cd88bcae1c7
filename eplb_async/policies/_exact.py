"""The least possible peak of one small layer, by branch and bound over replica counts and packings, compiled by numba.

A placement fills every slot, holds no expert twice on a rank, splits every expert's tokens evenly, and gives an expert 1 to
min(K, R) replicas. The question "is there one whose ranks all have at most x tokens?" is answered in two nested searches:

    _decide   replica counts, one expert after the other, heaviest first. x gives each expert a least count; experts of
              equal load have falling counts, because they can be exchanged
    _pack     one rank after the other gets a set of S experts. It holds the heaviest share left (some rank must, and ranks
              can be exchanged), and no more than x, and so much that the later ranks can take the rest (bin completion,
              Gent 1998, "Heuristic solution of open bin packing problems", and Korf 2002, "A new algorithm for optimal bin
              packing"; here with exactly S items to a bin). Replicas of an expert are one item with a number, not several

`solve` asks it with x just below the best peak known until the answer is no. If the node budget ends first, it bisects
between what is known to be possible and what is known not to be. Every bound rests on sums of float64, so peaks that
differ by less than a billionth count as equal.

Sizes: a few thousand nodes for 16 slots, too many from about 24 slots on, unless a cheap bound is reached. The plain twin is
exhaustive search (tests/policies/twins_exact.py).

Shape suffixes: E logical experts (here by descending load, or by descending share), P slots, R ranks.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._exact_start import descending, greedy, peak_of, simple_bound
from eplb_async.policies._kernels import CACHE

__all__ = ["packing_bound", "solve"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]
IndexArray = NDArray[np.int64]

_EQUAL = 1e-9
"""Peaks whose ratio is closer to 1 are the same."""
_CLOSE = 1e-6
"""Bisection ends when this share of the lower bound is left to it."""
_ROUNDING = 1e-12
"""What sums of a layer's loads may be off by, as a share of their total."""

_NONE, _FOUND, _UNKNOWN = 0, 1, 2
"""Answers of a search: proven that there is none, found one, node budget spent."""


@numba.njit(error_model="numpy", cache=CACHE)
def solve(
    load_E: FloatArray, num_ranks: int, slots_per_rank: int, most_replicas: int, node_budget: int, upper: float
) -> tuple[IntArray, float, float, int]:
    """The placement with the least peak, and how far that is proven.

    Loads [3, 2, 1] on 2 ranks of 2 slots: one expert gets a second replica. Splitting the first gives 1.5 + 2 at best, the
    second 3 + 1 (it must stand on both ranks beside 3 and 1), the third 3 + 0.5: peak 3.5, proven. Row [0, 2, 1, 2]
    reaches it; so does another.

    Args:
        load_E: tokens per logical expert, finite and >= 0.
        num_ranks: R.
        slots_per_rank: S, at most E.
        most_replicas: K; E * min(K, R) >= R * S >= E.
        node_budget: replica counts and experts tried at most, about 10 million a second.
        upper: a peak that is known to be possible; infinity if none is.

    Returns:
        row_P: int32, the best placement found; -1 everywhere if none has a peak below `upper`.
        peak: its busiest rank's tokens, or `upper`.
        lower_bound: no placement has a smaller peak; equal to `peak` if that is proven to be the least.
        nodes: used.

    Raises:
        ValueError: no placement fills every slot without an expert twice on a rank.
    """
    num_experts, num_slots = load_E.shape[0], num_ranks * slots_per_rank
    most = min(most_replicas, num_ranks)
    if num_experts > num_slots or slots_per_rank > num_experts or num_slots > num_experts * most:
        raise ValueError("no placement fills every slot without an expert twice on a rank")
    order_E = descending(load_E)
    sorted_E = load_E[order_E]
    row_P, peak = greedy(sorted_E, num_ranks, slots_per_rank, most)
    if peak >= upper:
        row_P, peak = np.full(num_slots, -1, dtype=np.int32), upper
    lower, nodes = simple_bound(sorted_E, num_slots, num_ranks, most), 0
    # first the whole question, then bisection up to `open_`, the least ceiling that a share of the budget did not settle
    whole, open_ = True, np.inf
    while lower < peak * (1 - _EQUAL) and nodes < node_budget and min(open_, peak) - lower > _CLOSE * lower:
        ceiling = peak * (1 - _EQUAL) if whole else (lower + min(open_, peak)) / 2
        ceiling = min(ceiling, 2 * sorted_E.sum())  # where no peak is known: any placement
        allowed = max((node_budget - nodes) // (2 if whole else 3), 1)
        answer, found_P, used = _decide(sorted_E, num_ranks, slots_per_rank, most, ceiling, allowed)
        nodes += used
        if answer == _FOUND:
            row_P, peak = found_P, peak_of(sorted_E, found_P, num_ranks)
        elif answer == _NONE:
            lower = ceiling
        elif whole:
            whole = False
        else:
            open_ = ceiling
    for slot in range(num_slots):
        if row_P[slot] >= 0:
            row_P[slot] = order_E[row_P[slot]]
    return row_P, peak, lower if lower < peak * (1 - _EQUAL) else peak, nodes


@numba.njit(error_model="numpy", cache=CACHE)
def packing_bound(share_P: FloatArray, num_ranks: int) -> float:
    """A load that some rank has at least, however these shares are packed, S on each rank.

    Of the m R + 1 heaviest, m + 1 share a rank: it has at least the m + 1 lightest of these and the lightest of all for the
    rest. And of the i <= R heaviest two share a rank, or each has a rank of its own: then i (S - 1) others go beside them,
    so one of these is at least as heavy as the i (S - 1)-th lightest of all.

    Shares [6, 5, 4, 1] on 2 ranks: 6 + 1, two of the first three share a rank: 5 + 4, so 9; each of 6 and 5 with a rank of
    its own: 5 + 4 as well. 9 is also the optimum, [6, 1 | 5, 4].

    Args:
        share_P: tokens per replica, descending.
        num_ranks: R; divides P.
    """
    num_slots = share_P.shape[0]
    per_rank = num_slots // num_ranks
    bound = float(share_P.sum()) / num_ranks
    for together in range(per_rank):
        last = together * num_ranks
        load = 0.0
        for item in range(last - together, last + 1):
            load += share_P[item]
        for item in range(num_slots - (per_rank - together - 1), num_slots):
            load += share_P[item]
        bound = max(bound, load)
    if per_rank < 2:
        return bound
    fill = 0.0
    for item in range(num_slots - (per_rank - 2), num_slots):
        fill += share_P[item]
    for heaviest in range(2, num_ranks + 1):
        shared = share_P[heaviest - 2] + share_P[heaviest - 1] + fill
        alone = share_P[heaviest - 1] + share_P[num_slots - heaviest * (per_rank - 1)] + fill
        bound = max(bound, min(shared, alone))
    return bound


@numba.njit(error_model="numpy", cache=CACHE)
def _decide(
    load_E: FloatArray, num_ranks: int, slots_per_rank: int, most: int, ceiling: float, budget: int
) -> tuple[int, IntArray, int]:
    """Look for a placement of which no rank has more than `ceiling` tokens.

    Args:
        load_E: descending.
        num_ranks: R.
        slots_per_rank: S.
        most: replicas of an expert.
        ceiling: tokens.
        budget: nodes.

    Returns:
        The answer, the placement if found (else -1), and the nodes used.
    """
    num_experts, num_slots, nodes = load_E.shape[0], num_ranks * slots_per_rank, 0
    row_P = np.full(num_slots, -1, dtype=np.int32)
    share_E = np.empty(num_experts, dtype=np.float64)
    least_E = np.ones(num_experts, dtype=np.int64)
    needed_E = np.zeros(num_experts + 1, dtype=np.int64)  # slots that experts e, e + 1, ... need at least
    for expert in range(num_experts - 1, -1, -1):
        while least_E[expert] <= most and load_E[expert] / least_E[expert] > ceiling:
            least_E[expert] += 1
        needed_E[expert] = needed_E[expert + 1] + least_E[expert]
        if least_E[expert] > most:
            return _NONE, row_P, nodes
    count_E, left_E = np.zeros(num_experts, dtype=np.int64), np.zeros(num_experts, dtype=np.int64)
    expert = 0
    left_E[0] = num_slots
    count_E[0] = least_E[0] - 1
    while expert >= 0:
        if nodes >= budget:
            return _UNKNOWN, row_P, nodes
        count_E[expert] += 1
        nodes += 1
        limit = count_E[expert - 1] if expert and load_E[expert] == load_E[expert - 1] else most
        left, later = left_E[expert] - count_E[expert], num_experts - expert - 1
        if count_E[expert] > limit or left < needed_E[expert + 1]:
            expert -= 1
        elif left <= later * most:  # else this expert must take more
            if later:
                expert += 1
                left_E[expert] = left
                count_E[expert] = max(least_E[expert], left - (later - 1) * most) - 1
                continue
            for each in range(num_experts):
                share_E[each] = load_E[each] / count_E[each]
            answer, used = _pack(share_E, count_E, num_ranks, ceiling, budget - nodes, row_P)
            nodes += used
            if answer != _NONE:
                return answer, row_P, nodes
    return _NONE, row_P, nodes


@numba.njit(error_model="numpy", cache=CACHE)
def _pack(
    share_E: FloatArray, count_E: IndexArray, num_ranks: int, ceiling: float, budget: int, row_P: IntArray
) -> tuple[int, int]:
    """Look for a packing of given replicas of which no rank has more than `ceiling` tokens.

    Args:
        share_E: tokens per replica.
        count_E: replicas of each expert; their sum is P.
        num_ranks: R.
        ceiling: tokens.
        budget: nodes.
        row_P: out: the experts of each slot, if found; else it is left alone.

    Returns:
        The answer and the nodes used.
    """
    order_E, num_slots, nodes, depth = descending(share_E), row_P.shape[0], 0, 0
    item_E, left_E = share_E[order_E], count_E[order_E]
    share_P = np.empty(num_slots, dtype=np.float64)
    for expert in range(item_E.shape[0]):
        for _ in range(left_E[expert]):
            share_P[depth] = item_E[expert]
            depth += 1
    if packing_bound(share_P, num_ranks) > ceiling:
        return _NONE, 0
    depth, per_rank, slack = 0, num_slots // num_ranks, _ROUNDING * share_P.sum()
    choice_P = np.full(num_slots + 1, -1, dtype=np.int64)  # by place in order_E
    load_P = np.zeros(num_slots + 1, dtype=np.float64)  # of the rank before the slot is filled
    rest_P = np.zeros(num_slots + 1, dtype=np.float64)  # of this rank and the later ones in all
    rest_P[0] = share_P.sum()
    while depth >= 0:
        if nodes >= budget:
            return _UNKNOWN, nodes
        nodes += 1
        if choice_P[depth] >= 0:
            left_E[choice_P[depth]] += 1
        ranks_left = num_ranks - depth // per_rank
        least = rest_P[depth] - (ranks_left - 1) * ceiling - slack
        chosen = _next(
            item_E,
            left_E,
            choice_P[: depth + 1],
            (depth % per_rank, per_rank, ranks_left),
            (load_P[depth], least, ceiling),
        )
        choice_P[depth] = chosen
        if chosen < 0:
            depth -= 1
            continue
        left_E[chosen] -= 1
        load = load_P[depth] + item_E[chosen]
        depth += 1
        if depth == num_slots:
            for slot in range(num_slots):
                row_P[slot] = order_E[choice_P[slot]]
            return _FOUND, nodes
        choice_P[depth], begins = -1, depth % per_rank == 0
        rest_P[depth] = rest_P[depth - 1] - (load if begins else 0.0)
        load_P[depth] = 0.0 if begins else load
    return _NONE, nodes


@numba.njit(error_model="numpy", cache=CACHE)
def _next(
    item_E: FloatArray,
    left_E: IndexArray,
    choice_D: IndexArray,
    place: tuple[int, int, int],
    loads: tuple[float, float, float],
) -> int:
    """The next expert to try in a slot, or -1.

    Args:
        item_E: tokens per replica, descending.
        left_E: replicas that have no slot yet.
        choice_D: experts of the slots so far, and the last one tried in this slot, -1 for none.
        place: slots of this rank that are filled, S, and ranks that are not full, this one among them.
        loads: tokens of this rank so far, least and greatest it may end with.
    """
    (filled, per_rank, ranks_left), (load, least, ceiling) = place, loads
    num_experts, depth = item_E.shape[0], choice_D.shape[0] - 1
    tried, previous = choice_D[depth], choice_D[depth - 1] if filled else -1
    if not filled and tried >= 0:
        return -1  # the heaviest left is on some rank; that it is this one costs nothing
    for expert in range(max(tried, previous) + 1, num_experts):
        if not left_E[expert]:
            continue
        same = expert > 0 and item_E[expert] == item_E[expert - 1] and left_E[expert] == left_E[expert - 1]
        if not (same and filled and previous != expert - 1):  # else it can be exchanged for the one passed over
            wanted, heaviest, other = per_rank - filled, load, expert
            while wanted and other < num_experts:
                if left_E[other]:
                    heaviest += item_E[other]
                    wanted -= 1
                other += 1
            if wanted or heaviest < least:
                return -1
            lightest, wanted, other = load + item_E[expert], per_rank - filled - 1, num_experts - 1
            while wanted and other > expert:
                if left_E[other]:
                    lightest += item_E[other]
                    wanted -= 1
                other -= 1
            if lightest <= ceiling and (filled + 1 < per_rank or _rest_fits(left_E, expert, ranks_left)):
                return expert
        if left_E[expert] == ranks_left or not filled:
            return -1  # every rank from here on needs it
    return -1


@numba.njit(error_model="numpy", cache=CACHE)
def _rest_fits(left_E: IndexArray, last: int, ranks_left: int) -> bool:
    """Whether no expert after the last one of a rank has a replica for each rank that is not full, this one included."""
    for expert in range(last + 1, left_E.shape[0]):  # noqa: SIM110 - numba compiles no generator here
        if left_E[expert] >= ranks_left:
            return False
    return True

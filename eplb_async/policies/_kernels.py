"""The loops that plan bins for the `default` policy, compiled by numba: one layer at a time, one thread.

A bin is what one rank is to hold: S consecutive entries of a planned row. The algorithm is DeepSeek's EPLB
(github.com/deepseek-ai/EPLB, README: hierarchical and global load balancing), written anew. Every function here has a
plain twin in tests/policies/twins.py that must give the same arrays. Ties go to the lowest index everywhere, so results do
not depend on the machine.

Importing this module imports numba (about a quarter of a second); only warm-up and planning do that. Compiled code is cached
on disk only where NUMBA_CACHE_DIR says so: a place chosen by numba need not be writable, or not be this host's alone.
The daemon sets it, for its workers, to a folder of its runtime directory.
The loops use scalars where numpy has a function, because numba compiles those about three times as fast.
"""

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["CACHE", "heaviest_first", "node_of_expert", "pack", "plan_layers", "replicate", "separate"]

CACHE = bool(numba.config.CACHE_DIR)  # type: ignore[attr-defined]

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]


@numba.njit(error_model="numpy", cache=CACHE)
def plan_layers(
    load_LE: FloatArray, num_ranks: int, slots_per_rank: int, num_nodes: int, num_groups: int, most_replicas: int
) -> IntArray:
    """Plan each layer by itself.

    With several nodes (hierarchical), whole expert groups are packed on nodes first, then each node replicates and packs
    the experts of its groups over its own ranks. With one node (global), that node holds all experts.

    Args:
        load_LE: tokens per expert.
        num_ranks: R.
        slots_per_rank: S, at most E / num_nodes.
        num_nodes: 1, or the nodes to plan for; divides R and num_groups.
        num_groups: expert groups; divides E. Not used with one node.
        most_replicas: at most R / num_nodes; E * most_replicas >= P.

    Returns:
        int32 [L, P]: bins of S experts in the order of ranks; within a bin no expert twice.
    """
    num_layers, num_experts = load_LE.shape
    slots_per_node = num_ranks // num_nodes * slots_per_rank
    planned_LP = np.empty((num_layers, num_ranks * slots_per_rank), dtype=np.int32)
    members_M = np.empty(num_experts // num_nodes, dtype=np.int64)
    for layer in range(num_layers):
        node_E = node_of_expert(load_LE[layer], num_nodes, num_groups)
        for node in range(num_nodes):
            num_members = 0
            for expert in range(num_experts):
                if node_E[expert] == node:
                    members_M[num_members] = expert
                    num_members += 1
            first = node * slots_per_node
            _fill_bins(
                load_LE[layer],
                members_M,
                slots_per_rank,
                most_replicas,
                planned_LP[layer, first : first + slots_per_node],
            )
    return planned_LP


@numba.njit(error_model="numpy", cache=CACHE)
def _fill_bins(
    load_E: FloatArray, members_M: NDArray[np.int64], slots_per_rank: int, most_replicas: int, row_Q: IntArray
) -> None:
    """Replicate, pack and separate the experts of one node; writes its bins to `row_Q`."""
    num_slots = row_Q.shape[0]
    expert_Q, weight_Q = replicate(load_E, members_M, num_slots, most_replicas)
    bin_Q, bin_load_R = pack(weight_Q, num_slots // slots_per_rank, slots_per_rank)
    filled_R = np.zeros(bin_load_R.shape[0], dtype=np.int64)
    weight_in_row_Q = np.empty(num_slots, dtype=np.float64)
    for item in range(num_slots):
        rank = bin_Q[item]
        place = rank * slots_per_rank + filled_R[rank]
        row_Q[place] = expert_Q[item]
        weight_in_row_Q[place] = weight_Q[item]
        filled_R[rank] += 1
    separate(row_Q, weight_in_row_Q, bin_load_R, load_E.shape[0])


@numba.njit(error_model="numpy", cache=CACHE)
def node_of_expert(load_E: FloatArray, num_nodes: int, num_groups: int) -> NDArray[np.int64]:
    """The node of each expert: groups packed on nodes by their load. int64 [E]."""
    num_experts = load_E.shape[0]
    node_E = np.zeros(num_experts, dtype=np.int64)
    if num_nodes > 1:
        per_group = num_experts // num_groups
        group_load = np.zeros(num_groups, dtype=np.float64)
        for expert in range(num_experts):
            group_load[expert // per_group] += load_E[expert]
        node_of_group, _ = pack(group_load, num_nodes, num_groups // num_nodes)
        for expert in range(num_experts):
            node_E[expert] = node_of_group[expert // per_group]
    return node_E


@numba.njit(error_model="numpy", cache=CACHE)
def replicate(
    load_E: FloatArray, members: NDArray[np.int64], num_slots: int, most_replicas: int
) -> tuple[NDArray[np.int64], FloatArray]:
    """Give each spare slot to the expert with most load per replica so far.

    Loads [90, 40, 20] of experts 0..2 in 5 slots: expert 0 gets the fourth (90 > 40), and the fifth (45 > 40);
    the items are experts [0, 1, 2, 0, 0] with weights [30, 40, 20, 30, 30].

    Args:
        load_E: tokens per expert.
        members: the experts to place, ascending.
        num_slots: Q, at least len(members) and at most len(members) * most_replicas.
        most_replicas: an expert that has as many gets no more.

    Returns:
        The expert of each item (each member once, then the copies in the order they were given out), int64 [Q], and
        the tokens one replica of it computes, [Q]. Ties: the first expert; without load, the one with fewest replicas.
    """
    num_members = members.shape[0]
    count = np.ones(num_members, dtype=np.int64)
    share = np.empty(num_members, dtype=np.float64)
    # what the greedy compares: the share, or -1 for an expert that gets no more
    wanted = np.empty(num_members, dtype=np.float64)
    expert_Q = np.empty(num_slots, dtype=np.int64)
    weight_Q = np.empty(num_slots, dtype=np.float64)
    for member in range(num_members):
        share[member] = load_E[members[member]]
        wanted[member] = share[member] if most_replicas > 1 else -1.0
        expert_Q[member] = member
    for item in range(num_members, num_slots):
        best, most_wanted = 0, wanted[0]
        for member in range(1, num_members):
            if wanted[member] > most_wanted:
                best, most_wanted = member, wanted[member]
        if most_wanted == 0.0:
            for member in range(num_members):
                if wanted[member] == 0.0 and count[member] < count[best]:
                    best = member
        count[best] += 1
        share[best] = load_E[members[best]] / count[best]
        wanted[best] = share[best] if count[best] < most_replicas else -1.0
        expert_Q[item] = best
    for item in range(num_slots):
        member = expert_Q[item]
        expert_Q[item] = members[member]
        weight_Q[item] = share[member]
    return expert_Q, weight_Q


@numba.njit(error_model="numpy", cache=CACHE)
def pack(weight_Q: FloatArray, num_bins: int, capacity: int) -> tuple[NDArray[np.int64], FloatArray]:
    """Balanced packing: heaviest item first, each into the lightest bin that has room (longest processing time first).

    Weights [30, 40, 20, 30, 30, 10] in 2 bins of 3 fill them to 40 | 0, 40 | 30, 40 | 60, 70 | 60, 70 | 80, 80 | 80:
    bins [1, 0, 1, 1, 0, 0].

    Args:
        weight_Q: num_bins * capacity weights.
        num_bins: bins, lowest index first on ties.
        capacity: items in each bin; with one item per bin nothing can be balanced and item i stays in bin i.

    Returns:
        The bin of each item, int64 [Q], and the load of each bin.
    """
    num_items = weight_Q.shape[0]
    bin_Q = np.empty(num_items, dtype=np.int64)
    bin_load = np.zeros(num_bins, dtype=np.float64)
    if capacity == 1:
        for item in range(num_items):
            bin_Q[item] = item
            bin_load[item] = weight_Q[item]
        return bin_Q, bin_load
    filled = np.zeros(num_bins, dtype=np.int64)
    # what the greedy compares: the load, or infinity for a bin without room
    height = np.zeros(num_bins, dtype=np.float64)
    for item in heaviest_first(weight_Q):
        best, lowest = 0, height[0]
        for candidate in range(1, num_bins):
            if height[candidate] < lowest:
                best, lowest = candidate, height[candidate]
        bin_Q[item] = best
        bin_load[best] += weight_Q[item]
        filled[best] += 1
        height[best] = bin_load[best] if filled[best] < capacity else np.inf
    return bin_Q, bin_load


@numba.njit(error_model="numpy", cache=CACHE)
def heaviest_first(weight_Q: FloatArray) -> NDArray[np.int64]:
    """Indices by descending weight, equal weights in their order: a bottom-up merge sort. int64 [Q].

    [30, 40, 20, 30]: [1, 0, 3, 2]. (np.argsort would do, but numba takes nearly a second longer to compile it.)
    """
    num_items = weight_Q.shape[0]
    order = np.arange(num_items)
    merged = np.empty(num_items, dtype=np.int64)
    width = 1
    while width < num_items:
        for start in range(0, num_items, 2 * width):
            middle = min(start + width, num_items)
            end = min(start + 2 * width, num_items)
            left, right = start, middle
            for place in range(start, end):
                if left < middle and (right >= end or weight_Q[order[left]] >= weight_Q[order[right]]):
                    merged[place] = order[left]
                    left += 1
                else:
                    merged[place] = order[right]
                    right += 1
        order, merged = merged, order
        width *= 2
    return order


@numba.njit(error_model="numpy", cache=CACHE)
def separate(row_Q: IntArray, weight_Q: FloatArray, bin_load_R: FloatArray, num_experts: int) -> None:
    """Swap second replicas of an expert out of a bin, in place, where that costs the balance least.

    Bins [0, 0 | 1, 2] of weights [5, 5 | 6, 4]: the first 0 changes places with 1, which leaves 11 and 9 at most
    (with 2 it would be 9 and 11: no better, and 1 comes first): [1, 0 | 0, 2].

    No duplicate is left if no expert has more than R replicas and S <= the number of experts: a bin that holds e twice
    leaves some bin without e, and there is an expert to swap it with that is not in the first bin, or is itself a
    duplicate in the other. Each swap removes at least one duplicate, so this ends.

    Args:
        row_Q: bins of experts, [R * S]; changed.
        weight_Q: tokens of each item, [R * S]; changed.
        bin_load_R: load of each bin; changed.
        num_experts: E.
    """
    num_bins = bin_load_R.shape[0]
    capacity = row_Q.shape[0] // num_bins
    held_RE = np.zeros((num_bins, num_experts), dtype=np.int32)
    duplicates = 0
    for place in range(row_Q.shape[0]):
        held = held_RE[place // capacity, row_Q[place]]
        duplicates += held > 0
        held_RE[place // capacity, row_Q[place]] = held + 1
    while duplicates:
        before = duplicates
        for place in range(row_Q.shape[0]):
            source = place // capacity
            if held_RE[source, row_Q[place]] > 1:
                other, removed = _cheapest_swap(place, row_Q, weight_Q, bin_load_R, held_RE)
                if removed:
                    _swap(place, other, row_Q, weight_Q, bin_load_R, held_RE)
                    duplicates -= removed
        if duplicates == before:
            return


@numba.njit(error_model="numpy", cache=CACHE)
def _cheapest_swap(
    place: int, row_Q: IntArray, weight_Q: FloatArray, bin_load_R: FloatArray, held_RE: IntArray
) -> tuple[int, int]:
    """The place to swap a duplicate with, and how many duplicates that removes (0: no swap removes any)."""
    capacity = row_Q.shape[0] // bin_load_R.shape[0]
    source, expert = place // capacity, row_Q[place]
    best, best_removed, best_peak = -1, 0, np.inf
    for other in range(row_Q.shape[0]):
        target, incoming = other // capacity, row_Q[other]
        if held_RE[target, expert]:
            continue
        removed = 1 - (held_RE[source, incoming] > 0) + (held_RE[target, incoming] > 1)
        change = weight_Q[other] - weight_Q[place]
        peak = max(bin_load_R[source] + change, bin_load_R[target] - change)
        if removed > 0 and peak < best_peak:
            best, best_removed, best_peak = other, removed, peak
    return best, best_removed


@numba.njit(error_model="numpy", cache=CACHE)
def _swap(
    place: int, other: int, row_Q: IntArray, weight_Q: FloatArray, bin_load_R: FloatArray, held_RE: IntArray
) -> None:
    capacity = row_Q.shape[0] // bin_load_R.shape[0]
    source, target = place // capacity, other // capacity
    change = weight_Q[other] - weight_Q[place]
    bin_load_R[source] += change
    bin_load_R[target] -= change
    held_RE[source, row_Q[place]] -= 1
    held_RE[source, row_Q[other]] += 1
    held_RE[target, row_Q[other]] -= 1
    held_RE[target, row_Q[place]] += 1
    row_Q[place], row_Q[other] = row_Q[other], row_Q[place]
    weight_Q[place], weight_Q[other] = weight_Q[other], weight_Q[place]

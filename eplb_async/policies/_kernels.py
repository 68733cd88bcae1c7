"""The loops that plan bins for the `default` policy, compiled by numba: one thread, one layer and node after the other.

A bin is what one rank is to hold: S consecutive entries of a planned row. The algorithm is DeepSeek's EPLB
(github.com/deepseek-ai/EPLB, README: hierarchical and global load balancing), written anew, with every tie and the order in
a bin as vLLM's default policy has them. Every function here has a plain twin in tests/policies/twins.py that must give the
same arrays.

    order_in_nodes   the experts of each node, groups packed on nodes
    replicate_all    which expert each spare slot of a node copies
    pack_all         the replicas of a node packed on its ranks, and pulled apart where two met

The orders in which things are packed come from outside: equal weights stand in the order in which numpy sorts them, and
that is numpy's affair (see `policies.default`). Else ties go to the lowest index.

Importing this module imports numba (about a quarter of a second); only warm-up and planning do that. Compiled code is cached
on disk only where NUMBA_CACHE_DIR says so: a place chosen by numba need not be writable, or not be this host's alone.
The daemon sets it, for its workers, to a folder of its runtime directory.
The loops use scalars where numpy has a function, because numba compiles those about three times as fast.
"""

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["CACHE", "order_in_nodes", "pack", "pack_all", "replicate", "replicate_all", "separate", "sink"]

CACHE = bool(numba.config.CACHE_DIR)  # type: ignore[attr-defined]

IntArray = NDArray[np.int32]
IndexArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@numba.njit(error_model="numpy", cache=CACHE)
def order_in_nodes(group_load_LG: FloatArray, order_LG: IndexArray, num_nodes: int, per_group: int) -> IndexArray:
    """Pack whole groups on nodes by load; in a node, groups stand in the order in which they were packed.

    Loads [[1, 5, 4, 3]] of four groups of one expert on 2 nodes, heaviest first [1, 2, 3, 0]: node 0 gets groups 1 and 0,
    node 1 gets 2 and 3: [[1, 0, 2, 3]].

    Args:
        group_load_LG: tokens per expert group.
        order_LG: groups by descending load.
        num_nodes: divides the groups.
        per_group: experts in each group.

    Returns:
        int64 [L, E]: the experts of the first node, then those of the second, ...
    """
    num_layers, num_groups = group_load_LG.shape
    kinds_G = np.arange(num_groups, dtype=np.int32)
    member_LE = np.empty((num_layers, num_groups * per_group), dtype=np.int64)
    for layer in range(num_layers):
        group_G, _ = pack(group_load_LG[layer], kinds_G, order_LG[layer], num_nodes, False)
        for place in range(num_groups):
            for index in range(per_group):
                member_LE[layer, place * per_group + index] = group_G[place] * per_group + index
    return member_LE


@numba.njit(error_model="numpy", cache=CACHE)
def replicate_all(
    load_LE: FloatArray, member_LE: IndexArray, num_nodes: int, num_slots: int, most_replicas: int
) -> tuple[IntArray, FloatArray]:
    """`replicate` for each layer and node.

    Args:
        load_LE: tokens per expert.
        member_LE: the experts of the first node, then those of the second, ...
        num_nodes: divides E.
        num_slots: Q, slots of one node.
        most_replicas: of one expert in its node.

    Returns:
        Experts and weights of the items of each node, int32 and float64 [L * nodes, Q].
    """
    num_layers, num_experts = load_LE.shape
    per_node = num_experts // num_nodes
    expert_XQ = np.empty((num_layers * num_nodes, num_slots), dtype=np.int32)
    weight_XQ = np.empty((num_layers * num_nodes, num_slots), dtype=np.float64)
    for row in range(num_layers * num_nodes):
        layer, first = row // num_nodes, row % num_nodes * per_node
        member_M = member_LE[layer, first : first + per_node]
        replicate(load_LE[layer], member_M, most_replicas, expert_XQ[row], weight_XQ[row])
    return expert_XQ, weight_XQ


@numba.njit(error_model="numpy", cache=CACHE)
def replicate(
    load_E: FloatArray, member_M: IndexArray, most_replicas: int, expert_Q: IntArray, weight_Q: FloatArray
) -> None:
    """Give each spare slot to the expert with most load per replica so far; the first of equals.

    Loads [90, 40, 20] of experts 0..2 in 5 slots: expert 0 gets the fourth (90 > 40), and the fifth (45 > 40);
    the items are experts [0, 1, 2, 0, 0] with weights [30, 40, 20, 30, 30].

    Args:
        load_E: tokens per expert.
        member_M: the experts to place.
        most_replicas: an expert that has as many gets no more; M * most_replicas >= Q.
        expert_Q: out: the expert of each item: each member once, then the copies in the order they were given out; Q >= M.
        weight_Q: out: the tokens that one replica of it computes.
    """
    num_members, num_slots = member_M.shape[0], expert_Q.shape[0]
    count_M = np.ones(num_members, dtype=np.int64)
    share_M = np.empty(num_members, dtype=np.float64)
    # a heap has the least key on top: the negated share, or infinity for an expert that gets no more
    heap_M = np.arange(num_members)
    key_M = np.empty(num_members, dtype=np.float64)
    for member in range(num_members):
        share_M[member] = load_E[member_M[member]]
        key_M[member] = -share_M[member] if most_replicas > 1 else np.inf
        expert_Q[member] = member
    for node in range(num_members // 2 - 1, -1, -1):
        sink(heap_M, key_M, node)
    for item in range(num_members, num_slots):
        best = heap_M[0]
        count_M[best] += 1
        share_M[best] = load_E[member_M[best]] / count_M[best]
        key_M[best] = -share_M[best] if count_M[best] < most_replicas else np.inf
        expert_Q[item] = best
        sink(heap_M, key_M, 0)
    for item in range(num_slots):
        member = expert_Q[item]
        expert_Q[item] = member_M[member]
        weight_Q[item] = share_M[member]


@numba.njit(error_model="numpy", cache=CACHE)
def pack_all(
    expert_XQ: IntArray, weight_XQ: FloatArray, order_XQ: IndexArray, capacity: int, num_experts: int, apart: bool
) -> IntArray:
    """Pack the replicas of each layer and node on its ranks.

    Args:
        expert_XQ: the expert of each item.
        weight_XQ: the tokens that it brings.
        order_XQ: items by descending weight.
        capacity: S.
        num_experts: E.
        apart: keep replicas of an expert on different ranks: in packing, and where that failed, by swapping them apart.

    Returns:
        int32 [X, Q]: bins of S experts in the order of ranks; inside a bin in the order of packing.
    """
    num_rows, num_slots = expert_XQ.shape
    planned_XQ = np.empty((num_rows, num_slots), dtype=np.int32)
    weight_Q = np.empty(num_slots, dtype=np.float64)
    for row in range(num_rows):
        item_Q, bin_load_R = pack(weight_XQ[row], expert_XQ[row], order_XQ[row], num_slots // capacity, apart)
        for slot in range(num_slots):
            planned_XQ[row, slot] = expert_XQ[row, item_Q[slot]]
            weight_Q[slot] = weight_XQ[row, item_Q[slot]]
        if apart:
            separate(planned_XQ[row], weight_Q, bin_load_R, num_experts)
    return planned_XQ


@numba.njit(error_model="numpy", cache=CACHE)
def pack(
    weight_Q: FloatArray, kind_Q: IntArray, order_Q: IndexArray, num_bins: int, apart: bool
) -> tuple[IndexArray, FloatArray]:
    """Balanced packing: heaviest item first, each into the lightest bin that has room (longest processing time first).

    Weights [30, 40, 20, 30, 30, 10] of kinds [0, 1, 2, 0, 0, 3] in 2 bins of 3, in the order [1, 0, 3, 4, 2, 5], fill them to
    40 | 0, 40 | 30, 40 | 60, 70 | 60, 70 | 80, 80 | 80: items [1, 4, 5 | 0, 3, 2]. Apart, item 3 may not join item 0, of
    its kind: 70 | 30, and item 4 finds both bins taken by its kind and joins 0: 70 | 60, 70 | 80, 80 | 80: [1, 3, 5 | 0, 4, 2].

    Args:
        weight_Q: of the items, as many as there are slots.
        kind_Q: what `apart` keeps apart (experts).
        order_Q: items by descending weight.
        num_bins: bins, lowest index first on ties; each takes as many items. With one item per bin nothing can be
            balanced and item i stays in bin i.
        apart: pass over bins that hold an item of the same kind, while there are others with room.

    Returns:
        The item in each slot of the bins, in the order of packing, int64 [Q], and the load of each bin.
    """
    num_items = weight_Q.shape[0]
    capacity = num_items // num_bins
    item_Q = np.arange(num_items)
    bin_load = np.zeros(num_bins, dtype=np.float64)
    if capacity == 1:
        for item in range(num_items):
            bin_load[item] = weight_Q[item]
        return item_Q, bin_load
    filled = np.zeros(num_bins, dtype=np.int64)
    # a heap has the least key on top: the load, or infinity for a bin without room
    heap = np.arange(num_bins)
    key = np.zeros(num_bins, dtype=np.float64)
    for item in order_Q:
        node, best = 0, heap[0]
        if apart and _holds(kind_Q[item], kind_Q, item_Q, best * capacity, filled[best]):
            # so few items come here that a search through the whole heap costs little
            lowest = np.inf
            for other in range(1, num_bins):
                bin_ = heap[other]
                if key[bin_] > lowest or key[bin_] == np.inf or (key[bin_] == lowest and bin_ > best):
                    continue
                if not _holds(kind_Q[item], kind_Q, item_Q, bin_ * capacity, filled[bin_]):
                    node, best, lowest = other, bin_, key[bin_]
        item_Q[best * capacity + filled[best]] = item
        bin_load[best] += weight_Q[item]
        filled[best] += 1
        key[best] = bin_load[best] if filled[best] < capacity else np.inf
        sink(heap, key, node)
    return item_Q, bin_load


@numba.njit(error_model="numpy", cache=CACHE)
def _holds(kind: int, kind_Q: IntArray, item_Q: IndexArray, first: int, filled: int) -> bool:
    """Whether one of the items in slots first .. first + filled - 1 is of a kind."""
    for slot in range(first, first + filled):  # noqa: SIM110 - numba compiles no generator here
        if kind_Q[item_Q[slot]] == kind:
            return True
    return False


@numba.njit(error_model="numpy", cache=CACHE)
def sink(heap: IndexArray, key: FloatArray, node: int) -> None:
    """Let an entry of a binary heap that has grown sink to its place; least key on top, of equal keys the lowest index.

    Heap [0, 1, 2] after the key of 0 grew in [7, 5, 5]: 1 rises, 0 takes its place: [1, 0, 2].

    Args:
        heap: indices into `key`; node i has children 2i + 1 and 2i + 2; changed.
        key: what is compared.
        node: where the grown entry is.
    """
    size, index = heap.shape[0], heap[node]
    grown = key[index]
    while 2 * node + 1 < size:
        child = 2 * node + 1
        least = heap[child]
        if child + 1 < size:
            other = heap[child + 1]
            if key[other] < key[least] or (key[other] == key[least] and other < least):
                child, least = child + 1, other
        if grown < key[least] or (grown == key[least] and index < least):
            break
        heap[node] = least
        node = child
    heap[node] = index


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
    # [R, E] is worth making only where there is something to do
    last_bin_E = np.full(num_experts, -1, dtype=np.int64)
    duplicates = 0
    for place in range(row_Q.shape[0]):
        expert = row_Q[place]
        duplicates += last_bin_E[expert] == place // capacity
        last_bin_E[expert] = place // capacity
    if duplicates == 0:
        return
    held_RE = np.zeros((num_bins, num_experts), dtype=np.int32)
    for place in range(row_Q.shape[0]):
        held_RE[place // capacity, row_Q[place]] += 1
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

"""Plain twins of the compiled loops, written the obvious way, and the exact optimum of small cases."""

from collections import Counter
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.placement import replica_count
from eplb_async.core.score import rank_load
from eplb_async.core.spec import Topology

__all__ = [
    "all_placements",
    "best_assignment_score",
    "heaviest_first_twin",
    "keep_slots_twin",
    "least_peak",
    "node_of_expert_twin",
    "pack_twin",
    "plan_layers_twin",
    "replicate_twin",
    "separate_twin",
    "shared_experts_twin",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]


def replicate_twin(load_E: FloatArray, members: list[int], num_slots: int, most: int) -> tuple[list[int], list[float]]:
    """`_kernels.replicate`: every spare slot to the greatest load per replica."""
    items = list(members)
    count = dict.fromkeys(members, 1)
    while len(items) < num_slots:
        share = {expert: load_E[expert] / count[expert] for expert in members if count[expert] < most}
        top = max(share.values())
        # without load (top 0) the fewest replicas, else the first; `min` returns the first of equals
        hottest = min((e for e in share if share[e] == top), key=lambda e: count[e] if top == 0 else 0)
        count[hottest] += 1
        items.append(hottest)
    return items, [float(load_E[expert] / count[expert]) for expert in items]


def heaviest_first_twin(weight_Q: FloatArray) -> list[int]:
    """`_kernels.heaviest_first`: a stable sort."""
    return sorted(range(len(weight_Q)), key=lambda item: -weight_Q[item])


def pack_twin(weight_Q: FloatArray, num_bins: int, capacity: int) -> tuple[list[int], list[float]]:
    """`_kernels.pack`: heaviest item into the lightest bin with room."""
    if capacity == 1:
        return list(range(num_bins)), [float(weight) for weight in weight_Q]
    bins = [-1] * len(weight_Q)
    load = [0.0] * num_bins
    for item in heaviest_first_twin(weight_Q):
        best = min((b for b in range(num_bins) if bins.count(b) < capacity), key=lambda b: load[b])
        bins[item] = best
        load[best] += float(weight_Q[item])
    return bins, load


def separate_twin(row_Q: IntArray, weight_Q: FloatArray, bin_load_R: FloatArray) -> None:
    """`_kernels.separate`: in place, the cheapest swap that leaves fewer duplicates, for each duplicate in turn."""
    capacity = len(row_Q) // len(bin_load_R)

    def duplicates(row: IntArray) -> int:
        return sum(len(stretch) - len(set(stretch)) for stretch in row.reshape(-1, capacity).tolist())

    while duplicates(row_Q):
        for place in range(len(row_Q)):
            source = place // capacity
            bins = row_Q.reshape(-1, capacity).tolist()
            if bins[source].count(row_Q[place]) < 2:
                continue
            options = []
            for other in range(len(row_Q)):
                target = other // capacity
                swapped = row_Q.copy()
                swapped[[place, other]] = swapped[[other, place]]
                if row_Q[place] not in bins[target] and duplicates(swapped) < duplicates(row_Q):
                    change = weight_Q[other] - weight_Q[place]
                    options.append((max(bin_load_R[source] + change, bin_load_R[target] - change), other))
            if options:
                other = min(options)[1]
                change = weight_Q[other] - weight_Q[place]
                bin_load_R[source] += change
                bin_load_R[other // capacity] -= change
                row_Q[[place, other]] = row_Q[[other, place]]
                weight_Q[[place, other]] = weight_Q[[other, place]]


def node_of_expert_twin(load_E: FloatArray, num_nodes: int, num_groups: int) -> list[int]:
    """`_kernels.node_of_expert`: whole groups packed on nodes."""
    per_group = len(load_E) // num_groups
    group_load = np.array([sum(load_E[g * per_group : (g + 1) * per_group]) for g in range(num_groups)])
    nodes, _ = pack_twin(group_load, num_nodes, num_groups // num_nodes)
    return [nodes[expert // per_group] for expert in range(len(load_E))]


def plan_layers_twin(load_LE: FloatArray, topology: Topology, num_nodes: int, most: int) -> IntArray:
    """`_kernels.plan_layers`, from the twins above."""
    per_rank, ranks = topology.slots_per_rank, topology.num_ranks // num_nodes
    rows = []
    for load_E in load_LE:
        nodes = [0] * len(load_E)
        if num_nodes > 1:
            nodes = node_of_expert_twin(load_E, num_nodes, topology.num_expert_groups)
        row: list[int] = []
        for node in range(num_nodes):
            members = [expert for expert in range(len(load_E)) if nodes[expert] == node]
            items, weights = replicate_twin(load_E, members, ranks * per_rank, most)
            bins, bin_load = pack_twin(np.array(weights), ranks, per_rank)
            order = sorted(range(len(items)), key=lambda item: bins[item])
            bins_Q = np.array([items[item] for item in order], dtype=np.int32)
            separate_twin(bins_Q, np.array([weights[item] for item in order]), np.array(bin_load))
            row += bins_Q.tolist()
        rows.append(row)
    return np.array(rows, dtype=np.int32)


def keep_slots_twin(planned_LP: IntArray, live_LP: IntArray, per_rank: int) -> IntArray:
    """`_matching.keep_slots`: stayers first, then newcomers into the gaps."""
    kept = np.full_like(planned_LP, -1)
    for layer, first in product(range(len(planned_LP)), range(0, planned_LP.shape[1], per_rank)):
        left = planned_LP[layer, first : first + per_rank].tolist()
        for slot in range(first, first + per_rank):
            if live_LP[layer, slot] in left:
                kept[layer, slot] = live_LP[layer, slot]
                left.remove(live_LP[layer, slot])
        gaps = [slot for slot in range(first, first + per_rank) if kept[layer, slot] < 0]
        kept[layer, gaps] = left
    return kept


def shared_experts_twin(planned_Q: IntArray, live_Q: IntArray, width: int) -> NDArray[np.int64]:
    """`_matching.shared_experts`: sizes of multiset intersections."""
    planned = [Counter(stretch.tolist()) for stretch in planned_Q.reshape(-1, width)]
    live = [Counter(stretch[stretch >= 0].tolist()) for stretch in live_Q.reshape(-1, width)]
    return np.array([[(one & other).total() for other in live] for one in planned], dtype=np.int64)


def best_assignment_score(score: NDArray[np.int64]) -> int:
    """The greatest sum that `_matching.assign` can reach, by trying all n! permutations."""
    rows = np.arange(len(score))
    return max(int(score[rows, list(columns)].sum()) for columns in permutations(range(len(score))))


def all_placements(num_experts: int, topology: Topology) -> IntArray:
    """Every valid placement of one layer without empty slots, int32 [number, P]."""
    rows_NP = np.array(list(product(range(num_experts), repeat=topology.num_slots)), dtype=np.int32)
    count_NE = replica_count(rows_NP, num_experts)
    return rows_NP[(count_NE > 0).all(axis=1) & (count_NE <= topology.max_replicas).all(axis=1)]


def least_peak(load_E: FloatArray, placements_NP: IntArray, topology: Topology) -> float:
    """The least load of the busiest rank over the given placements."""
    load_NE = np.broadcast_to(load_E, (len(placements_NP), len(load_E)))
    return float(rank_load(load_NE, placements_NP, topology).max(axis=1).min())

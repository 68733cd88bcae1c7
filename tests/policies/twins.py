"""Plain twins of the compiled loops, written the obvious way, the exact optimum of small cases, and inputs to try both on."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.placement import initial_placement, replica_count
from eplb_async.core.score import rank_load
from eplb_async.core.spec import MoESpec, Topology

__all__ = [
    "all_placements",
    "assign_twin",
    "best_assignment_score",
    "default_twin",
    "keep_slots_twin",
    "least_peak",
    "order_in_nodes_twin",
    "pack_twin",
    "plan_node_twin",
    "random_inputs",
    "replicate_twin",
    "separate_twin",
    "shared_experts_twin",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]


def replicate_twin(load_E: FloatArray, members: list[int], num_slots: int, most: int) -> tuple[list[int], list[float]]:
    """`_kernels.replicate`: every spare slot to the greatest load per replica, the first of equals."""
    items = list(members)
    count = dict.fromkeys(members, 1)
    while len(items) < num_slots:
        share = {expert: float(load_E[expert]) / count[expert] for expert in members if count[expert] < most}
        hottest = max(share, key=lambda expert: share[expert])
        count[hottest] += 1
        items.append(hottest)
    return items, [float(load_E[expert]) / count[expert] for expert in items]


def pack_twin(
    weights: Sequence[float], kinds: Sequence[int], order: Sequence[int], num_bins: int, apart: bool
) -> tuple[list[list[int]], list[float]]:
    """`_kernels.pack`: the bins as lists of items, and their loads."""
    capacity = len(weights) // num_bins
    if capacity == 1:
        return [[item] for item in range(num_bins)], list(weights)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    load = [0.0] * num_bins
    for item in order:
        room = [b for b in range(num_bins) if len(bins[b]) < capacity]
        free = [b for b in room if kinds[item] not in [kinds[held] for held in bins[b]]]
        best = min(free if apart and free else room, key=lambda b: load[b])
        bins[best].append(item)
        load[best] += weights[item]
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


def order_in_nodes_twin(group_load_G: NDArray[np.floating[Any]], num_nodes: int, per_group: int) -> list[list[int]]:
    """`_kernels.order_in_nodes`, for one layer, with numpy's order: the experts of each node."""
    order, groups = np.argsort(-group_load_G).tolist(), range(len(group_load_G))
    nodes, _ = pack_twin([float(load) for load in group_load_G], groups, order, num_nodes, apart=False)
    return [[group * per_group + i for group in node for i in range(per_group)] for node in nodes]


def plan_node_twin(load_E: FloatArray, members: list[int], num_ranks: int, per_rank: int, most: int) -> list[int]:
    """The bins of one node, one after the other; most: replicas of an expert, 0 for vLLM's way without limits."""
    items, weights = replicate_twin(load_E, members, num_ranks * per_rank, most or num_ranks * per_rank)
    order = np.argsort(-np.array(weights)).tolist()
    bins, load = pack_twin(weights, items, order, num_ranks, apart=most > 0)
    flat = [item for held in bins for item in held]
    row_Q = np.array([items[item] for item in flat], dtype=np.int32)
    if most:
        separate_twin(row_Q, np.array([weights[item] for item in flat]), np.array(load))
    row: list[int] = row_Q.tolist()
    return row


def default_twin(load_LE: FloatArray, live_LP: IntArray, topology: Topology, strict: bool) -> IntArray:
    """The whole `default` policy for ranks with fewer slots than there are experts, or `strict` (and then any ranks)."""
    nodes, groups, num_experts = topology.num_nodes, topology.num_expert_groups, load_LE.shape[1]
    if groups % nodes or (nodes > 1 and not strict and topology.slots_per_rank * nodes > num_experts):
        nodes = groups = 1
    ranks, per_group = topology.num_ranks // nodes, num_experts // groups
    rows = []
    for load_E in load_LE.astype(np.float32):
        group_load_G = load_E.reshape(groups, per_group).sum(axis=1)
        members = order_in_nodes_twin(group_load_G, nodes, per_group)
        most = 0 if strict else min(topology.max_replicas, ranks)
        rows.append(
            [slot for node in members for slot in plan_node_twin(load_E, node, ranks, topology.slots_per_rank, most)]
        )
    return keep_slots_twin(np.array(rows, dtype=np.int32), live_LP, topology.slots_per_rank)


def random_inputs(number: int, seed: int) -> Iterator[tuple[MoESpec, FloatArray, IntArray]]:
    """Specs of all kinds, windows with ties, zeros, skew and huge values, and live placements in any order."""
    random = np.random.default_rng(seed)
    for index in range(number):
        groups, nodes = int(random.choice([1, 1, 1, 2, 3, 4, 8])), int(random.choice([1, 1, 2, 3, 4]))
        experts, ranks = groups * int(random.integers(1, 9)), nodes * int(random.integers(1, 5))
        redundant = (-(-experts // ranks) + int(random.integers(0, 4))) * ranks - experts
        spec = MoESpec(
            num_layers=int(random.integers(1, 4)),
            num_experts=experts,
            num_redundant=redundant,
            num_ranks=ranks,
            num_nodes=nodes,
            num_expert_groups=groups,
            table_length=0 if random.random() < 0.7 else redundant + 1,
        )
        shape = (int(random.integers(1, 4)), spec.num_layers, experts)
        windows: list[NDArray[Any]] = [
            random.integers(0, 4, size=shape),
            np.zeros(shape),
            random.lognormal(sigma=2.0, size=shape),
            random.lognormal(sigma=3.0, size=shape) * 1e25,
            random.poisson(random.lognormal(sigma=1.0, size=(1, *shape[1:])) * 30, size=shape),
            random.random(size=shape) * (random.random(size=shape) < 0.3),
            # different, but many of them equal as float32
            random.integers(2**24, 2**24 + 8, size=shape),
        ]
        live_LP = initial_placement(spec)
        if random.random() < 0.7:
            live_LP = random.permuted(live_LP, axis=1)
        yield spec, windows[index % len(windows)].astype(np.float64), live_LP


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


def assign_twin(score: NDArray[np.int64]) -> NDArray[np.int64]:
    """`_matching.assign` on the whole matrix: rows enter one by one, each by the cheapest chain of reassignments.

    Columns differ where several sets of them have the same sum.
    """
    size = len(score)
    row_price, column_price = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    row_of = [-1] * size
    for entering in range(size):
        distance = np.full(size, np.iinfo(np.int64).max)
        came_from, done = np.full(size, -1), np.zeros(size, dtype=bool)
        row, current, length = entering, -1, 0
        while row >= 0:
            step = length - score[row] - row_price[row] - column_price
            shorter = ~done & (step < distance)
            distance[shorter], came_from[shorter] = step[shorter], current
            current = int(np.where(done, np.iinfo(np.int64).max, distance).argmin())
            length, row = int(distance[current]), row_of[current]
            done[current] = True
        reached = [column for column in np.flatnonzero(done) if column != current]
        row_price[entering] += length
        for column in reached:
            row_price[row_of[column]] += length - distance[column]
            column_price[column] -= length - distance[column]
        while current >= 0:
            before = int(came_from[current])
            row_of[current] = entering if before < 0 else row_of[before]
            current = before
    return np.argsort(row_of)


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

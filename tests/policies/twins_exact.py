"""Plain twins of the exact search and its bounds: every placement of a small layer, and the least peak among them."""

from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.placement import replica_count
from eplb_async.core.spec import Topology
from tests.policies import twins

__all__ = ["SHAPES", "full_placements", "loads_to_try", "moves_from", "packing_bound_twin", "solve_twin"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]

SHAPES = [
    (2, Topology(num_ranks=3, slots_per_rank=1)),
    (3, Topology(num_ranks=2, slots_per_rank=2)),
    (3, Topology(num_ranks=1, slots_per_rank=3)),
    (3, Topology(num_ranks=4, slots_per_rank=2, max_replicas=3)),
    (4, Topology(num_ranks=2, slots_per_rank=3)),
    (4, Topology(num_ranks=4, slots_per_rank=2)),
    (5, Topology(num_ranks=3, slots_per_rank=2)),
    (5, Topology(num_ranks=3, slots_per_rank=3, max_replicas=2)),
    (6, Topology(num_ranks=3, slots_per_rank=3)),
    (6, Topology(num_ranks=2, slots_per_rank=3)),
]
"""Experts and ranks of which all placements can be listed, with K small, no spare slot, and one rank among them."""


def full_placements(num_experts: int, topology: Topology) -> IntArray:
    """Every placement that fills all slots with no expert twice on a rank, experts ascending in each; int32 [number, P]."""
    ranks = product(combinations(range(num_experts), topology.slots_per_rank), repeat=topology.num_ranks)
    rows_NP = np.array(list(ranks), dtype=np.int32).reshape(-1, topology.num_slots)
    count_NE = replica_count(rows_NP, num_experts)
    return rows_NP[(count_NE > 0).all(axis=1) & (count_NE <= topology.max_replicas).all(axis=1)]


def solve_twin(load_E: FloatArray, topology: Topology) -> float:
    """`_exact.solve`: the least peak, by trying all placements."""
    return twins.least_peak(load_E, full_placements(len(load_E), topology), topology)


def packing_bound_twin(shares: list[float], num_ranks: int) -> float:
    """`_exact.packing_bound`, from its definition."""
    heavy, light = sorted(shares, reverse=True), sorted(shares)
    size = len(shares) // num_ranks
    together = [sum(heavy[: m * num_ranks + 1][-(m + 1) :]) + sum(light[: size - m - 1]) for m in range(size)]
    bounds = [sum(shares) / num_ranks, *together]
    for i in range(2, num_ranks + 1 if size > 1 else 0):
        shared = sum(heavy[:i][-2:])
        alone = heavy[i - 1] + light[i * (size - 1) - 1]
        bounds.append(min(shared, alone) + sum(light[: size - 2]))
    return max(bounds)


def moves_from(live_P: IntArray, rows_NP: IntArray, topology: Topology) -> NDArray[np.int64]:
    """Experts of each row that stand on a rank which does not hold them in the live row, [number]."""
    number, size = len(rows_NP), topology.slots_per_rank
    moved_N = np.zeros(number, dtype=np.int64)
    for slot in range(topology.num_slots):
        first = slot // size * size
        moved_N += ~np.isin(rows_NP[:, slot], live_P[first : first + size])
    return moved_N


def loads_to_try(num_experts: int, number: int, seed: int) -> FloatArray:
    """Skewed loads, small integers with ties and zeros, and all zero: [number, E]."""
    random = np.random.default_rng(seed)
    load_NE = random.lognormal(sigma=1.5, size=(number, num_experts))
    load_NE[::3] = random.integers(0, 5, size=load_NE[::3].shape)
    load_NE[1::3] *= random.random(size=load_NE[1::3].shape) < 0.7
    load_NE[0] = 0
    return load_NE

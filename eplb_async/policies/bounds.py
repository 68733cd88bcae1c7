"""How good any placement can be: a lower bound on the load of the busiest rank, per layer.

A policy's distance to it is what is left to gain; where the distance is 0 the placement is optimal. The bound holds for
every valid placement, with even or weighted dispatch and with empty slots. It need not be reachable.
"""

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.spec import Topology

__all__ = ["par_lower_bound", "peak_lower_bound"]

FloatArray = NDArray[np.float64]


def peak_lower_bound(load_LE: NDArray[np.float64], topology: Topology) -> FloatArray:
    """Tokens that the busiest rank computes at least, per layer.

    The greatest of three, each of which no placement can beat:

    - mean: total load / R.
    - share: some replica has at least the w for which sum of ceil(load / w) replicas just fit in P slots, with at most
      min(K, R) for each expert (more than R would share ranks and relieve none).
    - pigeonhole: with D spare slots at most D experts are split. Of the m R + D + 1 hottest experts at least m R + 1
      are whole, so m + 1 of them share a rank: it has at least the m + 1 lightest of these.

    Loads [8, 1, 1, 1] on 2 ranks of 2 slots: mean 5.5, share 8 (no spare slot), pigeonhole 1 + 1: 8.

    Args:
        load_LE: tokens per logical expert.
        topology: S, R and K.

    Returns:
        float64 [L].
    """
    mean_L = load_LE.sum(axis=1) / topology.num_ranks
    bounds_L = [mean_L, _share_bound(load_LE, topology), _pigeonhole_bound(load_LE, topology)]
    return np.asarray(np.max(bounds_L, axis=0), dtype=np.float64)


def par_lower_bound(load_LE: NDArray[np.float64], topology: Topology) -> FloatArray:
    """PAR that any placement has at least, per layer, >= 1 (1 for a layer without load). float64 [L]."""
    mean_L = load_LE.sum(axis=1) / topology.num_ranks
    loaded_L = mean_L > 0
    bound_L = peak_lower_bound(load_LE, topology) / np.where(loaded_L, mean_L, 1.0)
    return np.where(loaded_L, np.maximum(bound_L, 1.0), 1.0)


def _share_bound(load_LE: NDArray[np.float64], topology: Topology) -> FloatArray:
    """Least possible load of the heaviest replica: giving each spare slot to the heaviest reaches it."""
    num_layers, num_experts = load_LE.shape
    most = min(topology.max_replicas, topology.num_ranks)
    layers = np.arange(num_layers)
    count_LE = np.ones((num_layers, num_experts))
    share_LE = load_LE.astype(np.float64)
    for _ in range(topology.num_slots - num_experts):
        hottest_L = share_LE.argmax(axis=1)
        # where the hottest cannot be split further the bound is reached, and the slot is of no use
        count_LE[layers, hottest_L] = np.minimum(count_LE[layers, hottest_L] + 1, most)
        share_LE[layers, hottest_L] = load_LE[layers, hottest_L] / count_LE[layers, hottest_L]
    return np.asarray(share_LE.max(axis=1))


def _pigeonhole_bound(load_LE: NDArray[np.float64], topology: Topology) -> FloatArray:
    """The heaviest set of m + 1 whole experts that must share some rank, over all m. float64 [L]."""
    num_layers, num_experts = load_LE.shape
    spare = topology.num_slots - num_experts
    hottest_LE = -np.sort(-load_LE, axis=1)
    bound_L = np.zeros(num_layers)
    for on_one_rank in range(1, topology.slots_per_rank):
        considered = on_one_rank * topology.num_ranks + spare + 1
        if considered > num_experts:
            break
        lightest_L = hottest_LE[:, considered - on_one_rank - 1 : considered].sum(axis=1)
        bound_L = np.maximum(bound_L, lightest_L)
    return bound_L

"""How well a placement fits a load: the only definitions of PAR and balancedness in the project.

PAR (peak-to-average ratio) of a layer is max / mean over ranks of the tokens they compute, >= 1; a layer without load
has PAR 1. Balancedness, as vLLM reports it, is the sum over layers of the mean divided by the sum over layers of the max.
"""

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.placement import replica_count
from eplb_async.core.spec import Topology

__all__ = ["balancedness", "par", "rank_load", "windows_par"]

FloatArray = NDArray[np.float64]


def rank_load(load_LE: NDArray[np.generic], slot_to_expert_LP: NDArray[np.int32], topology: Topology) -> FloatArray:
    """Tokens per rank when every expert's tokens are split evenly over its slots.

    Load [[6, 2]], slots [[0, 1, 0, -1]] on 2 ranks of 2 slots: expert 0 puts 3 on each rank: [[5, 3]].

    Args:
        load_LE: tokens per logical expert, [L, E] (or [..., L, E] for several windows).
        slot_to_expert_LP: the placement, [L, P].
        topology: S and R.

    Returns:
        float64 [..., L, R].
    """
    num_layers, num_slots = slot_to_expert_LP.shape
    count_LE = replica_count(slot_to_expert_LP, load_LE.shape[-1])
    share_LE = load_LE / np.maximum(count_LE, 1)
    index = np.broadcast_to(np.maximum(slot_to_expert_LP, 0), (*load_LE.shape[:-2], num_layers, num_slots))
    slot_load = np.take_along_axis(share_LE, index, axis=-1) * (slot_to_expert_LP >= 0)
    shape = (*slot_load.shape[:-1], topology.num_ranks, topology.slots_per_rank)
    return np.asarray(slot_load.reshape(shape).sum(axis=-1), dtype=np.float64)


def par(rank_load_LR: NDArray[np.generic]) -> FloatArray:
    """Peak-to-average ratio per layer; [[5, 3]] gives [1.25]. Any leading dimensions; float64 [..., L]."""
    mean = rank_load_LR.mean(axis=-1)
    peak = rank_load_LR.max(axis=-1)
    return np.asarray(np.where(mean > 0, peak / np.where(mean > 0, mean, 1.0), 1.0), dtype=np.float64)


def balancedness(rank_load_LR: NDArray[np.generic]) -> float:
    """Sum over layers of the mean / sum over layers of the max (vLLM's definition), in (0, 1]; 1 without load."""
    peak = float(rank_load_LR.max(axis=-1).sum())
    return float(rank_load_LR.mean(axis=-1).sum()) / peak if peak > 0 else 1.0


def windows_par(
    windows_TLE: NDArray[np.generic], slot_to_expert_LP: NDArray[np.int32], topology: Topology
) -> FloatArray:
    """Mean over windows of each layer's PAR, windows weighted by their tokens: what a step of that traffic feels.

    Returns:
        float64 [L].
    """
    load_TLR = rank_load(windows_TLE, slot_to_expert_LP, topology)
    weight_TL = load_TLR.sum(axis=-1)
    total_L = weight_TL.sum(axis=0)
    weighted_L = (par(load_TLR) * weight_TL).sum(axis=0)
    return np.asarray(np.where(total_L > 0, weighted_L / np.where(total_L > 0, total_L, 1.0), 1.0), dtype=np.float64)

"""How well a placement fits a load: the only definitions of PAR and balancedness in the project.

PAR (peak-to-average ratio) of a layer is max / mean over ranks of the tokens they compute, >= 1; a layer without load
has PAR 1. Balancedness, as vLLM reports it, is the sum over layers of the mean divided by the sum over layers of the max.

How an expert's tokens are split over its slots is given by shares [L, P]: the part of them that each slot gets, 0 for an
empty one, with sum 1 over the slots of each expert. Without shares the split is even.
"""

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.placement import replica_count
from eplb_async.core.spec import Topology

__all__ = ["balancedness", "even_share", "par", "rank_load", "table_share", "windows_par"]

FloatArray = NDArray[np.float64]


def even_share(slot_to_expert_LP: NDArray[np.int32], num_experts: int) -> FloatArray:
    """Shares of an even split, [L, P]. Row [0, 1, 0, -1]: [0.5, 1, 0.5, 0]."""
    count_LE = replica_count(slot_to_expert_LP, num_experts)
    share_LP = 1.0 / np.take_along_axis(np.maximum(count_LE, 1), np.maximum(slot_to_expert_LP, 0), axis=1)
    return np.asarray(share_LP * (slot_to_expert_LP >= 0), dtype=np.float64)


def table_share(table_EK: NDArray[np.int32], count_E: NDArray[np.int32], num_slots: int) -> FloatArray:
    """Shares that a dispatch table gives the slots of a layer, [P].

    Rows [[0, 2, 2, 2], [1, -1, -1, -1]] of lengths [4, 1] on 4 slots: [0.25, 1, 0.75, 0].
    """
    used_EK = np.arange(table_EK.shape[1]) < count_E[:, None]
    weight_EK = np.broadcast_to(1.0 / count_E[:, None], table_EK.shape)
    share_P = np.bincount(table_EK[used_EK], weights=weight_EK[used_EK], minlength=num_slots)
    return np.asarray(share_P, dtype=np.float64)


def rank_load(
    load_LE: NDArray[np.generic],
    slot_to_expert_LP: NDArray[np.int32],
    topology: Topology,
    share_LP: FloatArray | None = None,
) -> FloatArray:
    """Tokens per rank when every expert's tokens are split over its slots.

    Load [[6, 2]], slots [[0, 1, 0, -1]] on 2 ranks of 2 slots: expert 0 puts 3 on each rank: [[5, 3]]. With shares
    [[0.25, 1, 0.75, 0]] it puts 1.5 and 4.5 there: [[3.5, 4.5]].

    Args:
        load_LE: tokens per logical expert, [L, E] (or [..., L, E] for several windows).
        slot_to_expert_LP: the placement, [L, P].
        topology: S and R.
        share_LP: what part of its expert's tokens each slot gets; None for an even split.

    Returns:
        float64 [..., L, R].
    """
    num_layers, num_slots = slot_to_expert_LP.shape
    index = np.broadcast_to(np.maximum(slot_to_expert_LP, 0), (*load_LE.shape[:-2], num_layers, num_slots))
    if share_LP is None:
        count_LE = replica_count(slot_to_expert_LP, load_LE.shape[-1])
        each_LE = load_LE / np.maximum(count_LE, 1)
        slot_load = np.take_along_axis(each_LE, index, axis=-1) * (slot_to_expert_LP >= 0)
    else:
        slot_load = np.take_along_axis(np.asarray(load_LE, dtype=np.float64), index, axis=-1) * share_LP
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
    windows_TLE: NDArray[np.generic],
    slot_to_expert_LP: NDArray[np.int32],
    topology: Topology,
    share_LP: FloatArray | None = None,
) -> FloatArray:
    """Mean over windows of each layer's PAR, windows weighted by their tokens: what a step of that traffic feels.

    Args:
        as for rank_load.

    Returns:
        float64 [L].
    """
    load_TLR = rank_load(windows_TLE, slot_to_expert_LP, topology, share_LP)
    weight_TL = load_TLR.sum(axis=-1)
    total_L = weight_TL.sum(axis=0)
    weighted_L = (par(load_TLR) * weight_TL).sum(axis=0)
    return np.asarray(np.where(total_L > 0, weighted_L / np.where(total_L > 0, total_L, 1.0), 1.0), dtype=np.float64)

"""How good any placement can be: lower bounds on the load of the busiest rank, per layer.

A policy's distance to a bound is what is left to gain; where the distance is 0 the placement is optimal. A bound need not
be reachable.

    peak_lower_bound             cheap; for every valid placement, with even or weighted dispatch and with empty slots
    proven_peak_lower_bound      with exact search where a layer is small; even dispatch, all slots filled, no expert twice on
                                 a rank
    peak_lower_bound_with_moves  the same placements, as far as m moves from the live one lead
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.spec import Topology

__all__ = [
    "NODE_BUDGET",
    "par_lower_bound",
    "peak_lower_bound",
    "peak_lower_bound_with_moves",
    "proven_peak_lower_bound",
]

FloatArray = NDArray[np.float64]

NODE_BUDGET = 300_000
"""Nodes of an exact search by default: about 20 ms for a layer whose proof it does not reach."""

_BISECTIONS = 6
"""Halvings between two values at which the answer of a bound with moves may jump."""

_ROUNDING = 1e-9
"""What sums of loads may be off by, as a share of the limit that they are compared with; far more than they are."""

_MOST_SLOTS = 24
"""P of the largest layers that are searched: beyond, the search hardly ever ends within any budget worth waiting for."""


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


def proven_peak_lower_bound(
    load_LE: NDArray[np.float64], topology: Topology, node_budget: int = NODE_BUDGET
) -> FloatArray:
    """`peak_lower_bound`, raised by exact search where a layer is small (P <= 24): often the least possible peak itself.

    It holds for placements that fill every slot, hold no expert twice on a rank, and split every expert's tokens evenly.
    Others can have less: loads [3, 2, 1] on 2 ranks of 2 slots need 3.5, but 3 | 2 + 1 with a slot left empty needs 3.

    Loads [600, 560, 120, 120, 20, 10, 10, 10] on 8 ranks of 2 slots (the example of vllm-ascend's FlashLB): the cheap
    bound is the mean, 181.25, this one 196.67, which a placement reaches.

    Args:
        load_LE: tokens per logical expert.
        topology: S, R and K. Nodes and groups are not looked at: a placement that respects them is a placement too.
        node_budget: for the search of each layer; 0 searches nothing. A million takes about 60 ms. Where it
            ends before the proof, the bound is what was proven until then.

    Returns:
        float64 [L]. The first call of a process compiles the search (about 10 s without a cache), if a layer is small.
    """
    bound_L = peak_lower_bound(load_LE, topology)
    num_experts, ranks, most = load_LE.shape[1], topology.num_ranks, min(topology.max_replicas, topology.num_ranks)
    possible = topology.slots_per_rank <= num_experts <= topology.num_slots <= num_experts * most
    if topology.num_slots > _MOST_SLOTS or not possible or node_budget < 1:
        return bound_L
    from eplb_async.policies._exact import solve

    for layer, load_E in enumerate(load_LE.astype(np.float64)):
        _, _, proven, _ = solve(load_E, ranks, topology.slots_per_rank, most, node_budget, np.inf)
        bound_L[layer] = max(bound_L[layer], proven)
    return bound_L


def peak_lower_bound_with_moves(
    load_E: NDArray[np.float64], row_P: NDArray[np.int32], topology: Topology, num_moves: int
) -> float:
    """Tokens of the busiest rank at least, if at most m experts are sent to ranks that do not hold them.

    It holds for placements that fill every slot, hold no expert twice on a rank, and split every expert's tokens evenly.
    The live row may be any.

    Proof. A rank that receives k experts keeps S - k of its own. An expert on h ranks has at most h + j replicas after j
    moves of it, and at most min(K, R); so the j-th move of it relieves each host by at most a step of
    load / (h + j - 1) - load / (h + j). A replica that is dropped relieves no other rank. A rank does not receive what it
    holds, so at most m - k moves relieve what it keeps. Hence it ends with at most x tokens only if it receives at least

        need(x) = least k for which (its S - k lightest shares) - (the m - k greatest steps of its experts) <= x.

    The ranks with need(x) >= 1 use up the sum of their needs. Each other rank with more than x receives one of the moves
    left, or is relieved of its excess over x by moves of experts that it holds. So, of these ranks,

        all but as many as there are moves left hold a moved expert: they are no more than the sum of the m largest
        numbers of them that hold the same expert;
        the excess of all but the busiest, as many as there are moves left, is no more than the m greatest reliefs, each
        a step times the number of them that hold the expert.

    Where one of these fails, no m moves bring the peak down to x. (What bisection finds is proven; more may be so too.)

    Six experts with 4 tokens each and five with 1, 6 ranks of 2 slots, row [0, 1 | 2, 3 | 4, 5 | 6, 7 | 8, 9 | 10, 6]: rank
    loads 8, 8, 8, 1.5, 2, 1.5. One move relieves at most the rank that receives and one host of what it receives, two of
    the three ranks with 8: 8. Two moves may relieve all: 29 / 6, the mean.

    Args:
        load_E: tokens per logical expert.
        row_P: the live row; -1 for an empty slot.
        topology: S, R and K.
        num_moves: m, >= 0.

    Returns:
        The greater of this bound and `peak_lower_bound`; the latter where m moves lead to no such placement.
    """
    floor = float(peak_lower_bound(load_E[None], topology)[0])
    if topology.slots_per_rank > len(load_E):
        return floor
    reach = _reach(load_E, row_P, topology, num_moves)
    if reach.excludes(np.inf):
        return floor
    value_X = np.concatenate([reach.kept_RK.ravel(), reach.load_R, [floor]])
    value_X = np.unique(value_X[np.isfinite(value_X) & (value_X >= floor)])
    below, above = 0, len(value_X)  # first where the needs change, so that these are met exactly
    while below + 1 < above:
        middle = (below + above) // 2
        if reach.excludes(float(value_X[middle])):
            below = middle
        else:
            above = middle
    proven = float(value_X[below])
    unproven = float(value_X[above]) if above < len(value_X) else proven
    for _ in range(_BISECTIONS):
        half = (proven + unproven) / 2
        proven, unproven = (half, unproven) if reach.excludes(half) else (proven, half)
    return proven


@dataclass(frozen=True)
class _Reach:
    """What m moves can do to each rank of one layer.

    Fields:
        hosted_RE: which experts a rank holds.
        load_R: its tokens; infinity if it holds fewer than S different experts, and so must receive one.
        kept_RK: what it has at least after receiving k = 0 .. min(m, S) experts; infinity if that cannot fill it.
        step_EM: by how much each further replica of an expert relieves its hosts.
        num_moves: m.
    """

    hosted_RE: NDArray[np.bool_]
    load_R: FloatArray
    kept_RK: FloatArray
    step_EM: FloatArray
    num_moves: int

    def excludes(self, limit: float) -> bool:
        """Whether m moves certainly leave some rank with `limit` tokens or more."""
        enough_RK = self.kept_RK < limit
        if not enough_RK.any(axis=1).all():
            return True
        need_R = enough_RK.argmax(axis=1)
        left = self.num_moves - int(need_R.sum())
        others_R = (need_R == 0) & (self.load_R >= limit)
        number = int(others_R.sum())
        if left < 0 or number <= left:
            return left < 0
        host_E = self.hosted_RE[others_R].sum(axis=0)
        if number > left + int(np.sort(host_E)[::-1][: self.num_moves].sum()):
            return True
        excess = float(np.sort(self.load_R[others_R] - limit)[: number - left].sum())
        relief = float(np.sort((self.step_EM * host_E[:, None]).ravel())[::-1][: self.num_moves].sum())
        return excess > relief + _ROUNDING * limit


def _reach(load_E: NDArray[np.float64], row_P: NDArray[np.int32], topology: Topology, num_moves: int) -> _Reach:
    """Loads after receiving and relief, as the proof of `peak_lower_bound_with_moves` counts them; S <= E."""
    ranks, per_rank, filled = topology.num_ranks, topology.slots_per_rank, np.flatnonzero(row_P >= 0)
    hosted_RE = np.zeros((ranks, len(load_E)), dtype=np.bool_)
    hosted_RE[filled // per_rank, row_P[filled]] = True
    host_E = np.maximum(hosted_RE.sum(axis=0), 1)
    lightest_RS = np.sort(np.where(hosted_RE, load_E / host_E, np.inf), axis=1)[:, :per_rank]
    sum_RS = np.concatenate([np.zeros((ranks, 1)), lightest_RS.cumsum(axis=1)], axis=1)
    most = min(topology.max_replicas, ranks)
    replicas_EM = host_E[:, None] + np.arange(min(num_moves, most))
    step_EM = np.where(replicas_EM < most, load_E[:, None] / (replicas_EM * (replicas_EM + 1)), 0.0)
    received_K = np.arange(min(num_moves, per_rank) + 1)
    kept_RK = sum_RS[:, per_rank - received_K]
    for rank, hosted_E in enumerate(hosted_RE):
        step_X = -np.sort(-step_EM[hosted_E].ravel())
        relief_X = np.concatenate([[0.0], step_X.cumsum()])
        kept_RK[rank] -= relief_X[np.minimum(num_moves - received_K, len(step_X))]
    return _Reach(hosted_RE, sum_RS[:, per_rank], kept_RK, step_EM, num_moves)


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

"""The best replace for a rank in the search of the `frontier` policy, compiled by numba (see `_frontier`).

The fall of a replace is what the ranks above the waterline of the expert that comes lose (`relief_E`), less what the other ranks of the
one that goes get more (`harm`), and what changes on the slot's own rank; where both have another rank in common, that is corrected.

Shape suffixes: T windows, E experts, K most replicas, P slots, R ranks, S slots per rank, C cool ranks.
"""

import numba
import numpy as np

from eplb_async.policies._frontier_ceilings import (
    Leaving,
    expert_with,
    favoured,
    highest_of,
    leaving_slot,
    others_than,
    work_out_ceilings,
)
from eplb_async.policies._frontier_state import (
    ENOUGH,
    LEAST_COST,
    LEAST_GAIN,
    MOST_FAVOUR,
    LayerState,
    above,
    refresh_relief,
)
from eplb_async.policies._kernels import CACHE

__all__ = ["best_replace", "in_common"]


@numba.njit(error_model="numpy", cache=CACHE)
def best_replace(state: LayerState, busiest: int, least: float) -> tuple[int, int, float]:
    """The best slot to give to another expert: one on a cool rank to an expert of the rank, or one of the rank to any.

    Args:
        state: of the layer.
        busiest: the rank to relieve.
        least: fall per slot that must be beaten.

    Returns:
        The slot (-1 if none), its new expert, and the fall per slot filled anew (`least` if none).
    """
    load_RT, load_ET, waterline, row_P = state.load_RT, state.load_ET, state.waterline, state.row_P
    count_E, host_EK, live_RE, above_R = state.count_E, state.host_EK, state.live_RE, state.above_R
    relief_E, others_E, cool_C = state.relief_E, state.others_E, state.cool_C
    width = row_P.shape[0] // load_RT.shape[0]
    refresh_relief(state)
    most_here, most_elsewhere = 0.0, -1.0
    for slot in range(busiest * width, busiest * width + width):
        most_here = max(most_here, relief_E[row_P[slot]])
    best_slot, best_expert, best = -1, -1, least
    for turn in range(cool_C.shape[0] + 1):
        rank = cool_C[turn - 1] if turn > 0 else busiest
        for slot in range(rank * width, rank * width + width):
            held = row_P[slot]
            count = count_E[held]
            if count < 2:
                continue
            if turn == 0 and most_elsewhere < 0.0:
                most_elsewhere = others_than(row_P[rank * width : rank * width + width], relief_E, others_E)
            reach = above_R[rank] + (most_here if turn > 0 else most_elsewhere)
            bar = max(ENOUGH * best * (1.0 if live_RE[rank, held] else LEAST_COST) / MOST_FAVOUR, LEAST_GAIN)
            if reach <= bar:
                continue
            more, harm = 1.0 / (count - 1) - 1.0 / count, 0.0
            for copy in range(count):
                host = host_EK[held, copy]
                if host != rank:
                    harm += above(load_RT, load_ET, waterline, host, held, more, held, 0.0) - above_R[host]
            if reach - harm <= bar:
                continue
            leaving = leaving_slot(state, slot, rank, harm)
            expert, rate = (
                _best_of_all(state, leaving, best) if turn == 0 else _best_of_rank(state, leaving, busiest, best)
            )
            if expert >= 0:
                best_slot, best_expert, best = slot, expert, rate
    return best_slot, best_expert, best


@numba.njit(error_model="numpy", cache=CACHE, inline="always")
def _best_of_all(state: LayerState, leaving: Leaving, least: float) -> tuple[int, float]:
    """The best expert of all for a slot of the rank to relieve, if it beats a fall per slot; else (-1, that).

    The one with the highest ceiling comes first: with one window that is nearly always the best, and no other is looked at.
    """
    load_RT, load_ET, live_RE, ceiling_E = state.load_RT, state.load_ET, state.live_RE, state.ceiling_E
    rank, best_expert, best = leaving.rank, -1, least
    highest = work_out_ceilings(state, leaving)
    while highest > best:
        expert = expert_with(ceiling_E, highest)
        ceiling_E[expert] = -np.inf
        highest = highest_of(ceiling_E)
        if state.node_E[expert] != state.node_R[rank]:
            continue
        gain = state.relief_E[expert] + leaving.base + in_common(state, leaving, expert)
        share = 1.0 / (state.count_E[expert] + 1)
        gain -= above(load_RT, load_ET, state.waterline, rank, expert, share, leaving.held, leaving.gives)
        rate = favoured(gain, state.splits_E[expert] - leaving.merges)
        rate *= 1.0 / LEAST_COST if live_RE[rank, expert] else leaving.weight
        if gain > LEAST_GAIN and rate > best:
            best_expert, best = expert, rate
    return best_expert, best


@numba.njit(error_model="numpy", cache=CACHE, inline="always")
def _best_of_rank(state: LayerState, leaving: Leaving, busiest: int, least: float) -> tuple[int, float]:
    """The best expert of a rank for a slot of another, if it beats a fall per slot; else (-1, that)."""
    load_RT, load_ET, row_P, count_E = state.load_RT, state.load_ET, state.row_P, state.count_E
    on_RE, live_RE, relief_E, splits_E = state.on_RE, state.live_RE, state.relief_E, state.splits_E
    node_E, node_R = state.node_E, state.node_R
    width, rank, best_expert, best = row_P.shape[0] // load_RT.shape[0], leaving.rank, -1, least
    for place in range(busiest * width, busiest * width + width):
        expert = row_P[place]
        gain, fewer = relief_E[expert] + leaving.base, splits_E[expert] - leaving.merges
        worth = 1.0 / LEAST_COST if live_RE[rank, expert] else leaving.weight
        if favoured(gain, fewer) * worth <= ENOUGH * best:
            continue
        if gain <= LEAST_GAIN or on_RE[rank, expert] or node_E[expert] != node_R[rank]:
            continue
        gain += in_common(state, leaving, expert)
        if favoured(gain - leaving.stays, fewer) * worth <= best:
            continue
        share = 1.0 / (count_E[expert] + 1)
        gain -= above(load_RT, load_ET, state.waterline, rank, expert, share, leaving.held, leaving.gives)
        rate = favoured(gain, fewer) * worth
        if gain > LEAST_GAIN and rate > best:
            best_expert, best = expert, rate
    return best_expert, best


@numba.njit(error_model="numpy", cache=CACHE, inline="always")
def in_common(state: LayerState, leaving: Leaving, expert: int) -> float:
    """What a replace brings more than relief less harm on the other ranks that hold both experts.

    Such a rank has load 1.6, waterline 1; the expert that comes takes 0.3 off it, the one that goes adds 0.2. By themselves they change
    its potential, 0.6 * 1.1 + 0.01 * 0.36 = 0.6636, to 0.2409 and 1.0464; together to 0.5 * 1 + 0.01 * 0.25 = 0.5025. So it falls by
    0.1611, and not by the relief less the harm, 0.4227 - 0.3828 = 0.0399: 0.1212 more.
    """
    load_RT, load_ET, waterline, above_R = state.load_RT, state.load_ET, state.waterline, state.above_R
    held, count, held_count = leaving.held, state.count_E[expert], state.count_E[leaving.held]
    more = 0.0
    for copy in range(held_count):
        host = state.host_EK[held, copy]
        if host != leaving.rank and state.on_RE[host, expert]:
            takes, adds = 1.0 / (count + 1) - 1.0 / count, 1.0 / (held_count - 1) - 1.0 / held_count
            more += above(load_RT, load_ET, waterline, host, held, adds, held, 0.0)
            more -= above(load_RT, load_ET, waterline, host, expert, takes, held, adds)
            if state.over_R[host]:
                more += above(load_RT, load_ET, waterline, host, expert, takes, expert, 0.0) - above_R[host]
    return more

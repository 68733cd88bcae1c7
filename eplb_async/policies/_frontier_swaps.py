"""The best swap for a rank in the search of the `frontier` policy, compiled by numba (see `_frontier`).

Shape suffixes: T windows, E experts, P slots, R ranks, S slots per rank, C cool ranks.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._frontier_state import ENOUGH, EVEN, LEAST_COST, LEAST_GAIN, STEEP, LayerState
from eplb_async.policies._kernels import CACHE

__all__ = ["best_swap"]

FloatArray = NDArray[np.float64]


@numba.njit(error_model="numpy", cache=CACHE)
def best_swap(state: LayerState, busiest: int, least: float) -> tuple[int, int, float]:
    """The best swap of an expert of a rank with one of a cool rank, if it beats a fall per slot; else (-1, -1, that).

    A swap lowers the rank's potential by at most slope * (load that leaves), because the potential is convex, and both
    ranks' by at most all of it: most swaps are out before the exact sums over the windows.
    """
    load_RT, load_ET, waterline, row_P = state.load_RT, state.load_ET, state.waterline, state.row_P
    count_E, on_RE, live_RE, slopes_2S = state.count_E, state.on_RE, state.live_RE, state.slopes_2S
    above_R, node_E, node_R, costs_S = state.above_R, state.node_E, state.node_R, state.costs_S
    width = row_P.shape[0] // load_RT.shape[0]
    _slopes(state, busiest, slopes_2S[0])
    best_first, best_second, best = -1, -1, least
    for rank in state.cool_C:
        both = above_R[busiest] + above_R[rank]
        _slopes(state, rank, slopes_2S[1])
        coldest, cheapest = np.inf, 1
        for place in range(width):
            expert = row_P[rank * width + place]
            costs_S[place] = int(live_RE[rank, expert]) - int(live_RE[busiest, expert])
            if on_RE[busiest, expert] or node_E[expert] != node_R[busiest]:
                slopes_2S[1, place] = np.inf
                continue
            cheapest = min(cheapest, costs_S[place])
            coldest = min(coldest, slopes_2S[1, place])
        for first in range(width):
            one = row_P[busiest * width + first]
            away = int(live_RE[busiest, one]) - int(live_RE[rank, one])
            bar = ENOUGH * best * max(1.0 * (away + cheapest), LEAST_COST)
            if slopes_2S[0, first] - coldest <= max(bar, LEAST_GAIN) or both <= bar:
                continue
            if on_RE[rank, one] or node_E[one] != node_R[rank]:
                continue
            part = 1.0 / count_E[one]
            for second in range(width):
                leaves = min(slopes_2S[0, first] - slopes_2S[1, second], both)
                cost = max(1.0 * (away + costs_S[second]), LEAST_COST)
                if leaves <= ENOUGH * best * cost or leaves <= LEAST_GAIN:
                    continue
                two = row_P[rank * width + second]
                other = 1.0 / count_E[two]
                here, there = 0.0, 0.0
                for window in range(load_RT.shape[1]):
                    change = other * load_ET[two, window] - part * load_ET[one, window]
                    load = load_RT[busiest, window] + change
                    over = max(load - waterline, 0.0)
                    here += over * (STEEP + over) + EVEN * (load - 1.0) * (load - 1.0)
                    load = load_RT[rank, window] - change
                    over = max(load - waterline, 0.0)
                    there += over * (STEEP + over) + EVEN * (load - 1.0) * (load - 1.0)
                gain = both - here - there
                if gain > LEAST_GAIN and gain > best * cost:
                    best_first, best_second, best = busiest * width + first, rank * width + second, gain / cost
    return best_first, best_second, best


@numba.njit(error_model="numpy", cache=CACHE, inline="always")
def _slopes(state: LayerState, rank: int, slopes_S: FloatArray) -> None:
    """What taking each expert's load from a rank would bring the busiest at most: its load times the slope, over the windows."""
    load_ET, slope_T, row_P, count_E = state.load_ET, state.slope_T, state.row_P, state.count_E
    width = slopes_S.shape[0]
    for place in range(width):
        expert, slope = row_P[rank * width + place], 0.0
        for window in range(slope_T.shape[0]):
            slope += slope_T[window] * load_ET[expert, window]
        slopes_S[place] = slope / count_E[expert]

"""All layers of a plan of the `frontier` policy, compiled by numba: the search in each, and points of the journals.

Shape suffixes: T windows, L layers, E experts, P slots, R ranks, J steps of a journal.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._borrowed import borrowed, keep
from eplb_async.policies._frontier import search
from eplb_async.policies._frontier_state import LayerState, holds, layer_state, mean_peak
from eplb_async.policies._kernels import CACHE

__all__ = ["cheapest", "complete_rows", "moved_slots", "rows_at", "search_layers"]

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@numba.njit(error_model="numpy", cache=CACHE)
def complete_rows(
    live_LP: IntArray, load_LE: FloatArray, node_LE: LongArray, node_R: LongArray, most_replicas: int
) -> tuple[IntArray, BoolArray]:
    """Give each empty slot, and each second replica on one rank, to the expert with most load per replica that may be there.

    [0, 1 | 1, -1] with loads [6, 2]: the empty slot gets expert 0.

    Args:
        live_LP: a valid placement.
        load_LE: tokens per expert.
        node_LE, node_R: an expert may only be on ranks of its node.
        most_replicas: at most R.

    Returns:
        The rows, int32 [L, P], and which layers it could be done for (bool [L]): not where an expert is on a node that
        is not its own, or no expert may take a slot.
    """
    num_layers, num_slots = live_LP.shape
    num_experts, num_ranks = load_LE.shape[1], node_R.shape[0]
    width = num_slots // num_ranks
    rows_LP = live_LP.copy()
    done_L = np.ones(num_layers, dtype=np.bool_)
    for layer in range(num_layers):
        count_E = np.zeros(num_experts, dtype=np.int64)
        on_RE = np.zeros((num_ranks, num_experts), dtype=np.bool_)
        for slot in range(num_slots):
            expert, rank = rows_LP[layer, slot], slot // width
            if expert < 0 or on_RE[rank, expert]:
                rows_LP[layer, slot] = -1
                continue
            on_RE[rank, expert] = True
            count_E[expert] += 1
            done_L[layer] &= node_LE[layer, expert] == node_R[rank]
        for slot in range(num_slots):
            if rows_LP[layer, slot] >= 0:
                continue
            best, rank = -1, slot // width
            for expert in range(num_experts):
                if on_RE[rank, expert] or count_E[expert] >= most_replicas or node_LE[layer, expert] != node_R[rank]:
                    continue
                if best < 0 or load_LE[layer, expert] * count_E[best] > load_LE[layer, best] * count_E[expert]:
                    best = expert
            if best < 0:
                done_L[layer] = False
                break
            rows_LP[layer, slot] = best
            on_RE[rank, best] = True
            count_E[best] += 1
    return rows_LP, done_L


@numba.njit(error_model="numpy", cache=CACHE)
def search_layers(  # size: all that a search depends on
    load_LET: FloatArray,
    start_LP: IntArray,
    live_LP: IntArray,
    node_LE: LongArray,
    node_R: LongArray,
    limits: tuple[int, int, int],
    bars_L2: FloatArray,
    prices: tuple[float, float],
) -> tuple[IntArray, FloatArray, LongArray, LongArray]:
    """Search each layer from its start.

    Args:
        load_LET: load in mean rank loads of the window; all zero for a layer without load, which gets no steps.
        start_LP: complete rows to start from.
        live_LP: what is on each rank now; -1 is an empty slot.
        node_LE, node_R: an expert may only be on ranks of its node.
        limits: most replicas of an expert (at most R), most steps J, and steps without a better point that end a search.
        bars_L2: PAR up to which the layer is left as it starts, and PAR at which a rank is left alone.
        prices: PAR that one slot filled anew is worth, and `spread`, how much splitting hot experts is favoured (see `_frontier`).

    Returns:
        Journals int32 [L, J, 5] (see `_frontier.search`; slots filled anew count from the live placement), the PAR
        at the start and after each step [L, J + 1], how many steps each layer has [L], and the slots that the start
        itself fills anew [L].
    """
    most_replicas, most_steps, patience = limits
    num_layers = start_LP.shape[0]
    num_experts, num_ranks = load_LET.shape[1], node_R.shape[0]
    journal_LJ5 = np.full((num_layers, most_steps, 5), -1, dtype=np.int32)
    par_LJ = np.ones((num_layers, most_steps + 1))
    steps_L = np.zeros(num_layers, dtype=np.int64)
    moved_L = moved_slots(start_LP, live_LP, num_experts, num_ranks)
    for layer in range(num_layers):
        if not load_LET[layer].any():
            continue
        owner = layer_state(
            load_LET[layer],
            start_LP[layer].copy(),
            live_LP[layer],
            node_LE[layer],
            node_R,
            most_replicas,
            bars_L2[layer, 1],
            prices[1],
        )
        state: LayerState = borrowed(owner)
        par_LJ[layer, 0] = mean_peak(state.load_RT)
        if par_LJ[layer, 0] > bars_L2[layer, 0]:
            steps_L[layer] = search(state, prices[0], 1.0, patience, journal_LJ5[layer], par_LJ[layer, 1:])
            journal_LJ5[layer, : steps_L[layer], 4] += moved_L[layer]
        keep(owner)
    return journal_LJ5, par_LJ, steps_L, moved_L


@numba.njit(error_model="numpy", cache=CACHE)
def cheapest(
    journal_LJ5: IntArray, par_LJ: FloatArray, steps_L: LongArray, moved_L: LongArray, price: float
) -> tuple[LongArray, FloatArray, LongArray]:
    """The point of each journal with the least PAR + price * slots filled anew.

    PAR 1.5 at the start, then 1.3 after 2 moves and 1.25 after 4: with price 0.05 the first step (1.4; 1.45 after both).

    Args:
        journal_LJ5, par_LJ, steps_L: of `search_layers`.
        moved_L: slots filled anew at the start.
        price: PAR that one slot filled anew is worth.

    Returns:
        Steps to take, the PAR + price * moves there, and the slots filled anew there; each [L].
    """
    num_layers = par_LJ.shape[0]
    chosen_L, filled_L = np.zeros(num_layers, dtype=np.int64), moved_L.copy()
    score_L = par_LJ[:, 0] + price * moved_L
    for layer in range(num_layers):
        for step in range(steps_L[layer]):
            score = par_LJ[layer, step + 1] + price * journal_LJ5[layer, step, 4]
            if score < score_L[layer]:
                score_L[layer], chosen_L[layer], filled_L[layer] = score, step + 1, journal_LJ5[layer, step, 4]
    return chosen_L, score_L, filled_L


@numba.njit(error_model="numpy", cache=CACHE)
def rows_at(start_LP: IntArray, journal_LJ5: IntArray, chosen_L: LongArray) -> IntArray:
    """The placement after so many steps of each journal.

    [0, 1 | 2, 3] and the step (0, 3, 3, 0, ..): [3, 1 | 2, 0].
    """
    rows_LP = start_LP.copy()
    for layer in range(rows_LP.shape[0]):
        for step in range(chosen_L[layer]):
            rows_LP[layer, journal_LJ5[layer, step, 0]] = journal_LJ5[layer, step, 1]
            if journal_LJ5[layer, step, 2] >= 0:
                rows_LP[layer, journal_LJ5[layer, step, 2]] = journal_LJ5[layer, step, 3]
    return rows_LP


@numba.njit(error_model="numpy", cache=CACHE)
def moved_slots(rows_LP: IntArray, live_LP: IntArray, num_experts: int, num_ranks: int) -> LongArray:
    """Slots whose expert is not on that rank in the live placement, per layer.

    [3, 0 | 1, 2] over [0, 1 | 2, 3]: 3 on rank 0 and 1 on rank 1: 2.
    """
    moved_L = np.zeros(rows_LP.shape[0], dtype=np.int64)
    width = rows_LP.shape[1] // num_ranks
    for layer in range(rows_LP.shape[0]):
        live_RE = holds(live_LP[layer], num_experts, num_ranks)
        for slot in range(rows_LP.shape[1]):
            moved_L[layer] += not live_RE[slot // width, rows_LP[layer, slot]]
    return moved_L

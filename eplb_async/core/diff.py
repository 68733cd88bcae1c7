"""From one placement to another with the fewest bytes: which rows move, from where, in which order, in which commits.

    aligned_target   an expert that stays on a rank keeps its slot there
    commit_rows      split a layer's change into rows that are valid placements and fit the staging memory
    moves_between    a source for every incoming row, spread over all replicas, ordered so that no rank is a hot spot

Worked example, 2 ranks x 2 slots, from [0, 1, 2, 0] to [1, 2, 0, 0]: rank 0 keeps 1 where it is, so the aligned target
is [2, 1, 0, 0]; slot 0 gets expert 2 from slot 2, slot 2 gets expert 0 from slot 3, which lies on its own rank.
"""

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.errors import InternalError, SettingError
from eplb_async.core.placement import EMPTY
from eplb_async.core.spec import Topology

__all__ = ["aligned_target", "commit_rows", "least_staging_rows", "moves_between"]

IntArray = NDArray[np.int32]


def least_staging_rows(topology: Topology) -> int:
    """Staging rows that any change can be split to: two, so that two slots of one rank can swap."""
    return min(2, topology.slots_per_rank)


def aligned_target(current_P: IntArray, target_P: IntArray, topology: Topology) -> IntArray:
    """The target with the slots of each rank permuted so that experts which stay there keep their slots.

    Returns:
        int32 [P], a new array; each rank holds the same experts as in `target_P`, copies and empty slots included.
    """
    result_P = target_P.copy()
    width = topology.slots_per_rank
    for first in range(0, topology.num_slots, width):
        current, wanted = current_P[first : first + width], target_P[first : first + width]
        if np.array_equal(current, wanted):
            continue
        pending = wanted.tolist()
        row: list[int | None] = []
        for expert in current.tolist():
            stays = expert in pending
            row.append(expert if stays else None)
            if stays:
                pending.remove(expert)
        result_P[first : first + width] = [pending.pop(0) if expert is None else expert for expert in row]
    return result_P


def commit_rows(current_P: IntArray, target_P: IntArray, topology: Topology, staging_rows: int) -> list[IntArray]:
    """The rows to commit one after the other, the last of them `target_P`; empty if nothing changes.

    Each is a valid placement, and differs from the one before by at most `staging_rows` incoming experts per rank. If
    the whole change fits, there is one row. Else slots whose expert lives elsewhere too go first; when none can change
    alone, whole cycles are taken, and a cycle that does not fit is cut by a swap, which costs one extra move.

    Raises:
        SettingError: `staging_rows` is less than `least_staging_rows`.
    """
    if staging_rows < least_staging_rows(topology):
        raise SettingError(f"staging_rows is {staging_rows}; splitting a plan needs {least_staging_rows(topology)}")
    rows: list[IntArray] = []
    row_P = current_P
    # every row brings at least one slot to its target for good
    for _ in range(topology.num_slots + 1):
        if np.array_equal(row_P, target_P):
            return rows
        row_P = _next_row(row_P, target_P, topology, staging_rows)
        rows.append(row_P)
    raise InternalError("splitting a layer's change into commits did not end")


def _next_row(current_P: IntArray, target_P: IntArray, topology: Topology, staging_rows: int) -> IntArray:
    changed = np.flatnonzero(current_P != target_P)
    incoming = changed[target_P[changed] != EMPTY]
    received_R = np.bincount(incoming // topology.slots_per_rank, minlength=topology.num_ranks)
    if received_R.max(initial=0) <= staging_rows:
        return target_P.copy()
    row_P = current_P.copy()
    free_R = np.full(topology.num_ranks, staging_rows)
    copies = np.bincount(current_P[current_P >= 0], minlength=int(max(current_P.max(), target_P.max())) + 1)
    progress, moved = True, False
    while progress:
        progress = False
        for slot in np.flatnonzero(row_P != target_P).tolist():
            old, new, rank = int(row_P[slot]), int(target_P[slot]), slot // topology.slots_per_rank
            needs_row = new != EMPTY and current_P[slot] != new
            if (old != EMPTY and copies[old] < 2) or (needs_row and not free_R[rank]):
                continue
            # between two rows that both have K copies of an expert there must be none with more
            if new != EMPTY and copies[new] >= topology.max_replicas:
                continue
            # an expert that is only incoming in this row has no live source yet
            if new != EMPTY and not (current_P == new).any():
                continue
            if old != EMPTY:
                copies[old] -= 1
            if new != EMPTY:
                copies[new] += 1
                free_R[rank] -= needs_row
            row_P[slot] = new
            progress = moved = True
    return row_P if moved else _rotated_row(current_P, target_P, topology, staging_rows)


def _rotated_row(current_P: IntArray, target_P: IntArray, topology: Topology, staging_rows: int) -> IntArray:
    """Next row when no slot can change alone: each holds a single copy, or is to get an expert that has K copies.

    What the slots of a cycle hold goes round in it, so every expert keeps its number of slots.
    """
    row_P = current_P.copy()
    free_R = np.full(topology.num_ranks, staging_rows)
    changed = np.flatnonzero(current_P != target_P).tolist()
    holders: dict[int, list[int]] = {}
    for slot in changed:
        holders.setdefault(int(current_P[slot]), []).append(slot)
    pending, moved = set(changed), False
    for start in changed:
        if start not in pending:
            continue
        cycle = _cycle(start, target_P, holders, pending)
        pending.difference_update(cycle or [start])
        filled = [slot for slot in cycle if target_P[slot] != EMPTY]
        need_R = np.bincount(np.array(filled, dtype=np.int64) // topology.slots_per_rank, minlength=topology.num_ranks)
        if cycle and (need_R <= free_R).all():
            row_P[cycle] = target_P[cycle]
            free_R -= need_R
            moved = True
    if moved:
        return row_P
    # a slot that loses its expert's only copy has one that gets it; one that gains a K-th copy has one that gives it up
    slot = next(slot for slot in changed if int(target_P[slot]) in holders)
    source = holders[int(target_P[slot])][0]
    row_P[slot], row_P[source] = current_P[source], current_P[slot]
    return row_P


def _cycle(start: int, target_P: IntArray, holders: dict[int, list[int]], pending: set[int]) -> list[int]:
    """Changed slots, each to get what the next one holds, and the last what the first holds; empty if the walk ends."""
    cycle = [start]
    while True:
        sources = holders.get(int(target_P[cycle[-1]]), [])
        if start in sources:
            return cycle
        source = next((slot for slot in sources if slot in pending and slot not in cycle), None)
        if source is None:
            return []
        cycle.append(source)


def moves_between(current_P: IntArray, next_P: IntArray, topology: Topology, sent_R: NDArray[np.int64]) -> IntArray:
    """A source for every slot of `next_P` that gets a new expert, in pull order.

    A replica on the same rank is taken first, then one on the same node, then any; among equals the rank that has sent
    least. Each rank pulls from its right-hand neighbour first, then from the one after it, and so on, so that at any
    time the ranks read from different sources.

    Args:
        current_P, next_P: rows before and after, int32 [P].
        topology: where the slots are.
        sent_R: rows that each rank has sent in this plan so far, int64 [R]; updated in place.

    Returns:
        int32 [n, 3] of (expert, source slot, destination slot).
    """
    moves: list[tuple[int, int, int, int]] = []
    width, per_node = topology.slots_per_rank, topology.ranks_per_node
    for slot in np.flatnonzero((current_P != next_P) & (next_P != EMPTY)).tolist():
        expert, rank = int(next_P[slot]), slot // width
        best, best_key = -1, (3, 0)
        for source in np.flatnonzero(current_P == expert).tolist():
            other = source // width
            distance = 0 if other == rank else 1 if other // per_node == rank // per_node else 2
            key = (distance, int(sent_R[other]) if distance else 0)
            if key < best_key:
                best, best_key = source, key
        if best < 0:
            raise InternalError(f"expert {expert} has no live slot to move from")
        if best // width != rank:
            sent_R[best // width] += 1
        moves.append(((best // width - rank) % topology.num_ranks, expert, best, slot))
    moves.sort(key=lambda move: (move[0], move[3]))
    return np.array([move[1:] for move in moves], dtype=np.int32).reshape(-1, 3)

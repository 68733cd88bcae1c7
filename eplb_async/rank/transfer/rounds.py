"""Who exchanges with whom in which round, so that no rank talks to two others at once: an edge colouring of the moves.

Ranks are points, and two that have moves between them, in either direction, are an edge. All moves of an edge are in one
round, and a rank has one edge in a round. The pair that comes first in the plan gets the first round in which both its
ranks are free: at most 2 D - 1 rounds where D is the most edges of a rank (the best possible has D or D + 1).

    moves 0->2, 1->2, 3->1, 2->0      edges 0-2 (both directions), 1-2, 1-3
    round 1: 0-2 and 1-3              1-2 waits: 2 is busy
    round 2: 1-2
"""

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Move", "rounds_of"]


class Move(NamedTuple):
    """One expert on its way between two ranks; slots are local to their rank."""

    expert: int
    source_rank: int
    source_slot: int
    rank: int
    slot: int


def rounds_of(moves: Sequence[Move]) -> list[list[Move]]:
    """The moves by round; the order within a round, and so within a pair of ranks, is the given one."""
    round_of: dict[tuple[int, int], int] = {}
    busy: dict[int, set[int]] = {}
    rounds: list[list[Move]] = []
    for move in moves:
        pair = min(move.source_rank, move.rank), max(move.source_rank, move.rank)
        if pair not in round_of:
            taken = busy.setdefault(pair[0], set()) | busy.setdefault(pair[1], set())
            number = next(number for number in range(len(taken) + 1) if number not in taken)
            round_of[pair] = number
            busy[pair[0]].add(number)
            busy[pair[1]].add(number)
            rounds.extend([] for _ in range(number + 1 - len(rounds)))
        rounds[round_of[pair]].append(move)
    return rounds

"""Rounds: no rank with two others at once, nothing lost, order kept, and not many of them."""

import random

import pytest

from eplb_async.rank.transfer.rounds import Move, rounds_of


def moves_of(*pairs: tuple[int, int]) -> list[Move]:
    """Moves between these ranks, each of an expert of its own."""
    return [Move(expert, source, expert, target, expert) for expert, (source, target) in enumerate(pairs)]


def test_the_example_of_the_docstring() -> None:
    """0->2 and 2->0 share a round with 3->1; 1->2 waits."""
    first, second, third, fourth = moves = moves_of((0, 2), (1, 2), (3, 1), (2, 0))
    assert rounds_of(moves) == [[first, third, fourth], [second]]
    assert rounds_of([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_rounds_are_matchings(seed: int) -> None:
    """Each rank talks to one other in a round; all moves are there once, in their order within a pair; at most 2 D - 1."""
    chosen = random.Random(seed)
    num_ranks = chosen.randint(2, 16)
    pairs = [tuple(chosen.sample(range(num_ranks), 2)) for _ in range(chosen.randint(1, 60))]
    moves = moves_of(*((one, other) for one, other in pairs))
    rounds = rounds_of(moves)
    peers: dict[int, set[int]] = {}
    for part in rounds:
        assert part
        talks = {frozenset((move.source_rank, move.rank)) for move in part}
        assert len(frozenset().union(*talks)) == 2 * len(talks)
    for one, other in pairs:
        peers.setdefault(one, set()).add(other)
        peers.setdefault(other, set()).add(one)
        edge = frozenset((one, other))
        mine = [m for part in rounds for m in part if {m.source_rank, m.rank} == edge]
        assert mine == [move for move in moves if {move.source_rank, move.rank} == edge]
    assert sum(map(len, rounds)) == len(moves)
    assert len(rounds) <= 2 * max(map(len, peers.values())) - 1

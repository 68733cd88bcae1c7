"""Ranks that meet in a store: all or nobody, one round after another, and bytes from rank to rank."""

import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from eplb_async.core.errors import AttachTimeout, EplbError, PeerLost
from eplb_async.rank.meeting import Connections, abort, meet, node_group
from tests.rank.connected import together

LONG_S = 20.0


def came(store: Store, group: str, rank: int, deadline_s: float = LONG_S) -> Store | EplbError:
    """What meeting two others brings."""
    try:
        return meet(store, group, rank, 3, deadline_s)
    except EplbError as error:
        return error


def round_of(shared: Store) -> int:
    """The number of the current round of group g."""
    return PrefixStore("eplb_async/g", shared).add("round", 0)


def test_all_meet_again_and_again() -> None:
    """Each attach has a round of its own, and keys of its own."""
    store = HashStore()
    for number in range(3):
        found = together(3, lambda rank: meet(store, "g", rank, 3, LONG_S))
        assert round_of(store) == number
        found[0].set("key", "value")
        assert all(each.check(["key"]) for each in found)


def test_who_does_not_come_is_named_and_the_next_round_is_open() -> None:
    """A rank that gave up does not spoil the next try, nor does one that came twice."""
    store = HashStore()
    errors = together(2, lambda rank: came(store, "g", rank, 0.2))
    assert all(isinstance(error, AttachTimeout) and error.missing == (2,) for error in errors)
    assert round_of(store) == 1
    assert not any(isinstance(each, EplbError) for each in together(3, lambda rank: came(store, "g", rank)))


def test_a_rank_that_was_replaced_takes_the_waiting_along() -> None:
    """Rank 0 came and died; the one in its place opens the next round, into which those go that wait."""
    store = HashStore()
    assert PrefixStore("eplb_async/g", store).add("0/rank/0", 1) == 1
    found = together(3, lambda rank: came(store, "g", rank))
    assert not any(isinstance(each, EplbError) for each in found)
    assert round_of(store) == 1


def test_bytes_of_every_length_are_gathered() -> None:
    """By rank, whole; and one incarnation for all."""
    store = HashStore()

    def connect(rank: int) -> tuple[list[list[bytes]], int]:
        connections = Connections(store, "g", rank, 3, LONG_S)
        texts = [b"", b"\x00" * (rank + 1), bytes(range(256)) * 7 * rank]
        found = [connections.gather(text) for text in texts]
        abort(connections.words, [(rank + 1) % 3])
        return found, connections.incarnation

    answers = together(3, connect)
    for found, _ in answers:
        assert found == [[b""] * 3, [b"\x00", b"\x00\x00", b"\x00" * 3], [bytes(range(256)) * 7 * r for r in range(3)]]
    assert len({incarnation for _, incarnation in answers}) == 1


def test_a_rank_that_never_connects_ends_the_attach() -> None:
    """PeerLost after the deadline, not gloo's half an hour."""
    with pytest.raises(PeerLost, match="left while this rank attached"):
        Connections(HashStore(), "g", 0, 2, 0.1)


def test_nodes_have_names_of_their_own() -> None:
    """So that two of them can be on one host."""
    assert [node_group("deepseek-v3", node) for node in (0, 1)] == ["deepseek-v3.node0", "deepseek-v3.node1"]

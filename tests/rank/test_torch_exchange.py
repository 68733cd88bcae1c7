"""Words by all-reduce: reduced without overflow, posted every k steps, and the same at the same step on all ranks."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from eplb_async.core.errors import PeerLost
from eplb_async.core.plan import FIRST_COUNTER, NO_PLAN, counter
from eplb_async.core.spec import MoESpec
from eplb_async.rank.meeting import Connections
from eplb_async.rank.torch_exchange import TorchDistExchange, reduced_of, vector_of
from eplb_async.shm.words import AgreementWords, GroupInfo, MemberState, Reduced
from tests.rank.connected import together

TRIO = MoESpec(num_layers=1, num_experts=3, num_ranks=3, num_nodes=3)
FIRST = Reduced(FIRST_COUNTER, FIRST_COUNTER, 0, NO_PLAN, NO_PLAN)
Make = Callable[[int], list[TorchDistExchange]]


@pytest.fixture
def make(make_group: Callable[[str], str]) -> Iterator[Make]:
    """Exchanges of three ranks on a node each, for k."""
    made: list[AgreementWords] = []
    exchanges: list[TorchDistExchange] = []

    def exchanges_for(every: int) -> list[TorchDistExchange]:
        fields = {"spec": TRIO, "lag": 2, "history": 8, "staging_rows": 1, "slot_bytes": [1], "tensors": ""}
        for node in range(3):
            info = GroupInfo(group=make_group(str(node)), num_nodes=3, node=node, reduce_every=every, **fields)  # type: ignore[arg-type]
            words = AgreementWords.create(info, 1)
            words.join(node, os.getpid())
            words.set_state(node, MemberState.READY)
            made.append(words)
        store = HashStore()
        connections = together(3, lambda rank: Connections(store, "g", rank, 3, 20.0))
        for rank, each in enumerate(connections):
            each.settled()
            exchanges.append(TorchDistExchange(each.words, made[rank], rank, 0.5))
        return exchanges

    yield exchanges_for
    for exchange in exchanges:
        exchange.close()
    for words in made:
        words.segment.unlink()
        words.close()


@pytest.mark.parametrize("digests", [(0, 5), (2**63 - 1, 1), (-(2**63), 2**63 - 1), (-1, 0)])
def test_no_digest_overflows(digests: tuple[int, int]) -> None:
    """Least and greatest of any two 64-bit numbers, by a maximum of both vectors."""
    one, other = (vector_of((counter(2, i), counter(1, 9 - i), i, digest)) for i, digest in enumerate(digests))
    assert reduced_of(one.maximum(other)) == Reduced(counter(2, 0), counter(1, 8), 1, min(digests), max(digests))
    assert vector_of((7, 9, 0, 0)).tolist()[:2] == [-8, -10]


def test_vectors_are_reduced_over_all_ranks(make: Make) -> None:
    """Least counters, greatest error, least and greatest digest; those before step 0 are there."""
    exchanges = make(1)
    assert [exchanges[0].collect(step) for step in (-2, -1)] == [FIRST] * 2
    for rank, exchange in enumerate(exchanges):
        exchange.publish(0, (counter(2, rank), counter(1, 5 - rank), rank, 40 + rank))
    assert (
        together(3, lambda rank: exchanges[rank].collect(0)) == [Reduced(counter(2, 0), counter(1, 3), 2, 40, 42)] * 3
    )


def test_every_k_steps_a_vector_serves_k_steps(make: Make) -> None:
    """Words of steps between two posts are seen by nobody but the node's daemon."""
    exchanges, seen = make(3), []
    for step in range(9):
        for rank, exchange in enumerate(exchanges):
            exchange.publish(step, (counter(1, step), FIRST_COUNTER, 0, NO_PLAN))
            newest = exchange._words.newest(rank)
            assert newest is not None
            assert newest.step == step
        found = [exchange.collect(step - 2) for exchange in exchanges]
        assert found == [found[0]] * 3
        seen.append(found[0].staged)
    assert seen == [FIRST_COUNTER] * 2 + [counter(1, 0)] * 3 + [counter(1, 3)] * 3 + [counter(1, 6)]


def test_a_vector_that_does_not_come_is_given_up(make: Make) -> None:
    """PeerLost after the deadline; one that has failed closes at once, with its vectors still out."""
    exchanges = make(1)
    for exchange in exchanges[:2]:
        exchange.publish(0, (FIRST_COUNTER, FIRST_COUNTER, 0, NO_PLAN))
    with pytest.raises(PeerLost, match="one of the ranks 1, 2 is lost"):
        exchanges[0].collect(0)
    exchanges[0].close()
    with pytest.raises(PeerLost):
        exchanges[1].collect(0)


PENDING = """
import torch
from torch._C._distributed_c10d import HashStore
from eplb_async.rank.transfer.torch_dist import GlooLink
from eplb_async.rank.meeting import Connections
from eplb_async.rank.streams import HostStream
from tests.rank.connected import together
store = HashStore()
groups = together(2, lambda rank: Connections(store, "g", rank, 2, 20.0).connect("weights"))
link, stream = GlooLink(groups[0], 0), HostStream("pending")
stream.submit(lambda: link.swap([], [(torch.zeros(8, dtype=torch.uint8), 1)]))
"""


def test_a_process_may_end_with_messages_pending() -> None:
    """An engine that ends without a detach does not wait for peers: gloo's own end would."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", PENDING], cwd=Path(__file__).parents[2], check=True, timeout=60)
    assert time.monotonic() - start < 50

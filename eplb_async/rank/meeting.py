"""How ranks on several nodes find each other at attach: through a store that all reach, then over connections of their own.

    store, below eplb_async/GROUP      round                     number of the round in which ranks gather; only grows
                                       ROUND/rank/R              times that rank R came into it; 1 for a whole round
                                       ROUND/words, ROUND/weights    addresses of the two process groups made in it

A rank comes into the current round, and waits until all ranks are in it. If it was there before (it attaches again, or
its process before this one died), or if it gives up, it opens the next round, and whoever still waits follows. So a store
can be used for one attach after another. Once all are in, the store is not needed any more: what follows goes over a gloo
process group that nobody else uses, made with no global state of torch.distributed.

Words of a step travel in that group afterwards (torch_exchange.py). Weights have another one (transfer/torch_py).
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol, TypeVar, cast

import torch

# where torch.distributed has them from; it exports the classes, but not to a type checker
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, ReduceOp, Store, Work

from eplb_async.core.errors import AttachTimeout, PeerLost

__all__ = ["FOREVER", "Connections", "GlooGroup", "abort", "meet", "node_group"]

Result = TypeVar("Result")
POLL_S = 0.02
FOREVER = timedelta(days=365)
"""After attach no deadline of gloo's own may end an operation: a forward may take as long as it likes."""
ABORT_TAG = 0xAB


class GlooGroup(Protocol):
    """What is used of torch's ProcessGroupGloo, whose stubs leave most of it out. All calls but `size` give a Work to wait for."""

    def size(self) -> int:
        """R."""
        ...

    def allreduce(self, tensors: list[torch.Tensor], op: ReduceOp) -> Work:
        """In place."""
        ...

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> Work:
        """One list of R tensors for the one tensor of each rank."""
        ...

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        """One tensor; matched with receives of the tag in their order."""
        ...

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        """One tensor."""
        ...

    def _set_default_timeout(self, timeout: timedelta) -> None: ...


def node_group(group: str, node: int) -> str:
    """The name under which the segments of one node of a group go; two nodes of a test may be on one host."""
    return f"{group}.node{node}"


def meet(store: Store, group: str, rank: int, num_ranks: int, deadline_s: float) -> Store:
    """Wait until all ranks of a group are in one round; returns the part of the store that is theirs in it.

    Raises:
        AttachTimeout: names the ranks that did not come.
        PeerLost: the store does not answer.
    """
    start = time.monotonic()
    shared = PrefixStore(f"eplb_async/{group}", store)
    try:
        while True:
            number = shared.add("round", 0)
            if shared.add(f"{number}/rank/{rank}", 1) > 1:
                _open_next(shared, number)
            elif not (missing := _gather(shared, number, num_ranks, start + deadline_s)):
                return PrefixStore(str(number), shared)
            elif time.monotonic() > start + deadline_s:
                _open_next(shared, number)
                raise AttachTimeout(group, missing, num_ranks, deadline_s)
    except RuntimeError as error:
        others = [other for other in range(num_ranks) if other != rank]
        waited_s = time.monotonic() - start
        raise PeerLost(group, others, 0, waited_s, f"the rendezvous store does not answer: {error}") from error


def _gather(shared: Store, number: int, num_ranks: int, end: float) -> list[int]:
    """Wait for all in a round; the ranks that are missing when the round, or the time, is over."""
    while True:
        missing = [rank for rank in range(num_ranks) if not shared.check([f"{number}/rank/{rank}"])]
        if not missing or shared.add("round", 0) != number or time.monotonic() > end:
            return missing
        time.sleep(POLL_S)


def _open_next(shared: Store, number: int) -> None:
    """Once, however many ranks want it."""
    shared.compare_set("round", str(number), str(number + 1))


class Connections:
    """The process groups of one incarnation, and the exchange of bytes while it forms. Each call is made by all ranks.

    Attributes:
        words: gloo, on the CPU.
        store: for further process groups.
        incarnation: a number that all ranks have, greater than any before by the latest of their clocks.
    """

    def __init__(self, store: Store, group: str, rank: int, num_ranks: int, deadline_s: float) -> None:
        """Connect to all other ranks.

        Raises:
            PeerLost: some rank does not connect in time.
        """
        self.store, self._group, self._rank, self._num_ranks = store, group, rank, num_ranks
        self._start, self._deadline = time.monotonic(), timedelta(seconds=max(1.0, deadline_s))
        self.words = self._told(lambda: self._connect("words"))
        self.incarnation = self._told(lambda: self._greatest(time.time_ns()))

    def gather(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, by rank; also a barrier.

        Raises:
            PeerLost: a rank went away, or did not come in time.
        """
        return self._told(lambda: self._gather(data))

    def connect(self, name: str) -> GlooGroup:
        """Another gloo group of all ranks.

        Raises:
            PeerLost: as in the constructor.
        """
        return self._told(lambda: self._connect(name))

    def settled(self) -> None:
        """The incarnation has formed: from now on whoever waits keeps its own deadline."""
        self.words._set_default_timeout(FOREVER)

    def _connect(self, name: str) -> GlooGroup:
        store = PrefixStore(name, self.store)
        return cast(GlooGroup, ProcessGroupGloo(store, self._rank, self._num_ranks, timeout=self._deadline))

    def _greatest(self, number: int) -> int:
        cell = torch.tensor([number], dtype=torch.int64)
        self.words.allreduce([cell], ReduceOp(ReduceOp.MAX)).wait()
        return int(cell)

    def _gather(self, data: bytes) -> list[bytes]:
        width = self._greatest(len(data))
        own = torch.zeros(8 + width, dtype=torch.uint8)
        own[:8].view(torch.int64)[0] = len(data)
        own[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else own[:0]
        found = [torch.empty_like(own) for _ in range(self._num_ranks)]
        self.words.allgather([found], [own]).wait()
        return [each[8 : 8 + int(each[:8].view(torch.int64))].numpy().tobytes() for each in found]

    def _told(self, what: Callable[[], Result]) -> Result:
        try:
            return what()
        except RuntimeError as error:
            others = [rank for rank in range(self._num_ranks) if rank != self._rank]
            waited_s = time.monotonic() - self._start
            raise PeerLost(self._group, others, 0, waited_s, f"it left while this rank attached: {error}") from error


def abort(group: GlooGroup, peers: Sequence[int]) -> None:
    """Close a gloo group's connections, at both ends: what is pending in it fails, here at once.

    A receive that times out is gloo's own way to this; destroying a group waits for what is pending instead. A peer whose
    connection is closed already refuses the receive, hence all of them: one at most has to time out.
    """
    for peer in peers:
        with contextlib.suppress(RuntimeError):
            group.recv([torch.zeros(1, dtype=torch.uint8)], peer, ABORT_TAG).wait(timedelta(milliseconds=1))

"""Weights between nodes: send and receive over a process group of their own, beside the forward.

    begin   a decision of all ranks at one step (rank/matched_stager.py): the moves of an entry between nodes
    job     on a thread: for each round the own sends, live slot -> peer, and receives, peer -> staging row; then fingerprints
    end     the completion: all of it is done at this rank, or why not

Both ends have to take part, so this is no `Transfer`: nobody can pull by itself. What a transfer promises still holds:

*No deadlock.* All ranks begin the same entries in the same order, since each decides it from the same vectors and the same
plan; a thread runs them in that order, an entry's rounds in theirs (each round after the one before it), and the messages
of a pair of ranks in the plan's. Take the unfinished (entry, round) that comes first: all its ranks have finished what
comes before it, so each has posted its sends and receives of it, or will without waiting, and they match. So it ends.

*All that is posted ends, also after a drop.* A drop takes no job back, for the peer's may have begun. A wrong fingerprint,
or a connection that broke, is an error only when all rounds have run, for the other peers. A rank that failed before (its error word is out, the drop not decided) still
takes part, as it is the decision of all.

*Sources stay as they are while they are read.* A source is a live slot; it is written only by the commit of an entry.
The expert moved in entry k of plan g is read while entry k is neither committed nor dropped and drained:
- by the commit of k or a later entry: an entry is committed when min(staged) covers it and all before; a rank's `staged`
  covers k when this job has ended there, sends included (I1).
- by the commit of an earlier entry j of the same layer, whose rows the source may be: k is begun only when min(committed)
  covers j on all ranks (I12); `committed` counts what the device has finished, so the source's bytes are there, on the
  stream of the transfer too, without any event between the streams.
- by a later plan: it starts when min(committed) covers (g + 1, 0) (I4), and after a drop a rank's `committed` gets there
  only when its jobs for g have ended (I5).
- by the engine, after a detach: closing aborts the connections first, which ends the job (I13).
"""

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch._C._distributed_c10d import Work

from eplb_async.core.errors import TransferFailed
from eplb_async.rank.fingerprint import fingerprint
from eplb_async.rank.meeting import FOREVER, GlooGroup, abort
from eplb_async.rank.streams import Completion, Stream
from eplb_async.rank.transfer.base import Pull, StagingRows, other_bytes
from eplb_async.rank.transfer.rounds import Move, rounds_of
from eplb_async.rank.weights import WeightRows

__all__ = ["GlooLink", "Message", "PeerLink", "TorchDistTransfer"]

Message = tuple[torch.Tensor, int]
"""A tensor and the peer that it goes to or comes from."""


class PeerLink(Protocol):
    """Point-to-point messages of one rank. All but `close` is called on the transfer's thread."""

    def beside(self) -> AbstractContextManager[object]:
        """What work on the device must be done in, so that it is not on the compute stream."""
        ...

    def swap(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Post all of these, and wait for their end. Messages between two ranks are matched in their order.

        Raises:
            RuntimeError: a peer is gone.
        """
        ...

    def compute(self, pieces: Sequence[torch.Tensor]) -> Sequence[int]:
        """Fingerprints of what was received."""
        ...

    def close(self) -> None:
        """End what is pending, and the connections. Idempotent."""
        ...


class GlooLink:
    """Messages over gloo, for weights on the CPU."""

    def __init__(self, group: GlooGroup, rank: int) -> None:
        """`group`: of all ranks, used by nothing else."""
        self._group = group
        # at the latest when the process ends: what is pending would else keep it
        others = [other for other in range(group.size()) if other != rank]
        self._abort = weakref.finalize(self, abort, group, others)
        # a step may take as long as it likes, and so may what it waits for
        group._set_default_timeout(FOREVER)

    def beside(self) -> AbstractContextManager[object]:
        """See PeerLink; the thread itself is beside the forward."""
        return contextlib.nullcontext()

    def swap(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """See PeerLink."""
        works: list[Work] = []
        broken: RuntimeError | None = None
        posts = [(self._group.recv, *message) for message in receives] + [
            (self._group.send, *message) for message in sends
        ]
        for post, tensor, peer in posts:
            try:
                works.append(post([tensor], peer, 0))
            except RuntimeError as error:  # the connection is closed
                broken = broken or error
        # what other peers take part in ends, whatever became of one
        for work in works:
            try:
                work.wait()
            except RuntimeError as error:
                broken = broken or error
        if broken is not None:
            raise broken

    def compute(self, pieces: Sequence[torch.Tensor]) -> Sequence[int]:
        """See PeerLink."""
        return [fingerprint(piece) for piece in pieces]

    def close(self) -> None:
        """See PeerLink."""
        self._abort()


class TorchDistTransfer:
    """See the module. All methods belong to the thread that runs the forwards.

    Attributes:
        rows_received, rows_sent: of jobs begun.
    """

    name = "torch_dist"

    def __init__(self, link: PeerLink, weights: WeightRows, staging: StagingRows, stream: Stream, rank: int) -> None:
        """`staging`: of the transfer inside the node, which both share."""
        self._link, self._weights, self._staging = link, weights, staging
        self.stream, self._rank = stream, rank
        self.rows_received = self.rows_sent = 0

    def begin(
        self,
        layer: int,
        moves: Sequence[Move],
        rows: Mapping[int, int],
        expected: Callable[[int, int], Sequence[int] | None],
        one_peer: bool,
    ) -> Completion[None] | None:
        """Begin the own part of an entry's moves between nodes; None if there is none. All ranks of the moves must.

        Args:
            layer: of the entry.
            moves: of all ranks, in the plan's order.
            rows: own slot -> staging row to receive it in.
            expected: fingerprints by (layer, expert), or None.
            one_peer: with one other rank at a time, else with all at once.
        """
        own = [move for move in moves if self._rank in (move.source_rank, move.rank)]
        if not own:
            return None
        received = [move for move in own if move.rank == self._rank]
        self.rows_received += len(received)
        self.rows_sent += len(own) - len(received)
        wanted = {move: expected(layer, move.expert) for move in received}
        return self.stream.submit(lambda: self._run(layer, moves if one_peer else own, rows, wanted, one_peer))

    def close(self) -> None:
        """End the jobs, done or not. Idempotent."""
        self._link.close()
        self.stream.close()

    def _run(
        self,
        layer: int,
        moves: Sequence[Move],
        rows: Mapping[int, int],
        wanted: Mapping[Move, Sequence[int] | None],
        one_peer: bool,
    ) -> None:
        broken: RuntimeError | None = None
        with self._link.beside():
            for part in rounds_of(moves) if one_peer else [moves]:
                try:
                    self._swap(layer, part, rows)
                except RuntimeError as error:
                    # peers of later rounds wait for this rank all the same
                    broken = broken or error
            if broken is not None:
                raise TransferFailed(
                    f"layer {layer}: experts could not be exchanged between nodes: {broken}"
                ) from broken
            for move, expected in wanted.items():
                if expected is not None:
                    self._verify(layer, move, rows[move.slot], expected)

    def _swap(self, layer: int, moves: Sequence[Move], rows: Mapping[int, int]) -> None:
        sends: list[Message] = []
        receives: list[Message] = []
        for move in moves:
            if move.source_rank == self._rank:
                sends += [(tensor[move.source_slot], move.rank) for tensor in self._weights.rows[layer]]
            elif move.rank == self._rank:
                receives += [(part, move.source_rank) for part in self._staging.tensors(layer, rows[move.slot])]
        if sends or receives:
            self._link.swap(sends, receives)

    def _verify(self, layer: int, move: Move, row: int, wanted: Sequence[int]) -> None:
        found = self._link.compute(self._staging.tensors(layer, row))
        for index, value in enumerate(found):
            if value != wanted[index]:
                raise other_bytes(layer, Pull(move.expert, move.source_rank, move.source_slot, move.slot), index)

"""What every way of moving weights offers. One-sided: the destination reads the source's live slot by itself.

    attach   export() of every rank is put into shared memory; connect(peer, its export) on every rank
    stage    pull(): live slot of any rank -> own staging row, on the transfer stream, beside the forward
    commit   commit(): own staging rows -> own live slots, between two forwards
    detach   close()

A staging row holds one expert of any layer. What is staged is not visible to the model before the commit.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from eplb_async.rank.streams import Completion, Stream
from eplb_async.rank.weights import WeightRows

__all__ = ["Pull", "StagingRows", "Transfer"]

ALIGNMENT = 64


class Pull(NamedTuple):
    """One incoming expert: slots are local to their rank."""

    expert: int
    source_rank: int
    source_slot: int
    slot: int


class StagingRows:
    """Memory for incoming experts, one buffer of bytes, carved into rows that fit a slot of any layer.

    Attributes:
        num_rows: how many.
        num_bytes: of the whole buffer.
    """

    def __init__(self, weights: WeightRows, num_rows: int) -> None:
        self._offsets: list[list[tuple[int, int]]] = []
        row_bytes = 0
        for tensors in weights.rows:
            places, end = [], 0
            for tensor in tensors:
                places.append((end, end + tensor.shape[1]))
                end = -(-(end + tensor.shape[1]) // ALIGNMENT) * ALIGNMENT
            self._offsets.append(places)
            row_bytes = max(row_bytes, end)
        self.num_rows = num_rows
        self._buffer = torch.empty((num_rows, row_bytes), dtype=torch.uint8, device=weights.rows[0][0].device)
        self.num_bytes = self._buffer.numel()

    def tensors(self, layer: int, row: int) -> list[torch.Tensor]:
        """The parts of a row for the tensors of a layer, uint8 each."""
        buffer = self._buffer[row]
        return [buffer[first:last] for first, last in self._offsets[layer]]


class Transfer(ABC):
    """A way of moving weights between the ranks of a group.

    Attributes:
        name: in settings, logs and the registry.
        weights: of this rank.
        staging: its staging rows.
        stream: on which pulls run.
    """

    name: str

    def __init__(self, weights: WeightRows, num_rows: int, stream: Stream) -> None:
        self.weights, self.stream = weights, stream
        self.staging = StagingRows(weights, num_rows)

    @abstractmethod
    def export(self) -> bytes:
        """What a peer needs to read this rank's live slots."""

    @abstractmethod
    def connect(self, rank: int, exported: bytes) -> None:
        """Get ready to pull from a peer.

        Raises:
            TransferFailed: its memory cannot be reached, or is not what this rank expects.
        """

    @abstractmethod
    def pull(self, layer: int, pull: Pull, row: int, fingerprints: Sequence[int] | None) -> Completion[None]:
        """Copy a live slot into a staging row, on the stream, and compare it with its fingerprints if given.

        The completion's error is TransferFailed if the bytes could not be had or are not the expert's.
        """

    @abstractmethod
    def commit(self, layer: int, rows: Sequence[tuple[int, int]]) -> Completion[None]:
        """Copy (staging row, own slot) pairs into the live slots, before the next forward reads them."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the peers' memory and end the stream. Idempotent."""

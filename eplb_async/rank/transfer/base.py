"""What every way of moving weights offers. One-sided: the destination reads the source's live slot by itself.

    attach   export() of every rank is put into shared memory; connect(peer, its export) on every rank
    stage    pull(), flush(): live slots of any rank -> own staging rows, beside the forward
    commit   commit(): own staging rows -> own live slots, between two forwards
    detach   close()

A staging row holds one expert of any layer. What is staged is not visible to the model before the commit.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from eplb_async.core.errors import SpecError, TransferFailed
from eplb_async.rank.streams import Completion
from eplb_async.rank.weights import WeightRows

__all__ = ["Copy", "Pull", "StagingRows", "Transfer", "other_bytes"]

ALIGNMENT = 64


Copy = tuple[int, int, int]
"""Target and source address and bytes: memory that the device can reach, and nobody writes meanwhile."""


class Pull(NamedTuple):
    """One incoming expert: slots are local to their rank."""

    expert: int
    source_rank: int
    source_slot: int
    slot: int


def other_bytes(layer: int, pull: Pull, tensor: int) -> TransferFailed:
    """The error of a pull whose bytes are not those that the expert had at attach."""
    return TransferFailed(
        f"layer {layer} expert {pull.expert} tensor {tensor} from rank {pull.source_rank} slot {pull.source_slot}: "
        "received bytes do not match the fingerprint taken at attach"
    )


class StagingRows:
    """Memory for incoming experts, one buffer of bytes, carved into rows that fit a slot of any layer.

    Attributes:
        num_rows: how many.
        num_bytes: of the whole buffer.
        most_tensors: of a layer.

    Raises:
        SpecError: the device has no memory for it.
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
        self.num_rows, self.num_bytes = num_rows, num_rows * row_bytes
        self.most_tensors = max(len(places) for places in self._offsets)
        device = weights.rows[0][0].device
        try:
            self._buffer = torch.empty((num_rows, row_bytes), dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise SpecError(
                f"no memory on {device} for {num_rows} staging rows of {row_bytes:,} bytes, {self.num_bytes:,} in all; leave "
                "more of it free for them (in vLLM: gpu_memory_utilization), or set hook.staging_rows to fewer"
            ) from error

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
    """

    name: str

    def __init__(self, weights: WeightRows, num_rows: int) -> None:
        self.weights = weights
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
        """Copy a live slot into a staging row, beside the forward, and compare it with its fingerprints if given.

        May wait for `flush` to begin. The completion's error is TransferFailed if the bytes could not be had or are not the
        expert's.
        """

    @abstractmethod
    def flush(self) -> None:
        """Begin all pulls so far that have not begun; called once in a step that pulls."""

    @abstractmethod
    def commit(self, layer: int, rows: Sequence[tuple[int, int]], more: Sequence[Copy]) -> Completion[None]:
        """Copy (staging row, own slot) pairs into the live slots, before the next forward reads them, and what `more` says.

        On a device it is issued on the compute stream, behind what is there. A layer's next commit comes only when this one has ended.
        """

    def abandon(self) -> bool:
        """Give all pulls up that have not ended, with the staging rows, for new ones; false if that cannot be: wait for them.

        Only while nothing is staged or being committed. What was given up may go on reading live slots, also while they are
        overwritten, and writing rows that nobody looks at any more.
        """
        return False

    @abstractmethod
    def close(self) -> None:
        """Let go of the peers' memory and end the stream. Idempotent."""

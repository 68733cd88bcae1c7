"""Transfer through shared memory on one host: the reference backend, for models on the CPU.

    segment weights.<rank>   the tensors of all layers one after the other, 64-byte aligned, written by the engine

The export names the segment and where each tensor's rows lie in it; a peer maps the segment and copies from it.
`share_weights` makes the segment; it belongs to the rank's process and outlives an incarnation, as the model does.
"""

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import torch

from eplb_async.core.errors import SegmentError, SpecError, TransferFailed
from eplb_async.rank.fingerprint import fingerprint
from eplb_async.rank.streams import Completion, HostStream, Stream
from eplb_async.rank.transfer.base import ALIGNMENT, Copy, Pull, StagingRows, Transfer, other_bytes
from eplb_async.rank.weights import LayerTensors, WeightRows, named_tensors
from eplb_async.shm.layout import segment_name
from eplb_async.shm.segment import Segment

__all__ = ["SharedWeights", "ShmTransfer", "share_weights"]

MOST_ABANDONED = 4
"""Times that hung pulls are given up: each keeps a thread and the staging rows until it ends."""
LAYOUT = "weights: tensors of all layers, 64-byte aligned"


class SharedWeights(Sequence[dict[str, torch.Tensor]]):
    """Expert tensors in a shared segment: layer l is a dict of tensors [S, ...] by name, for the engine to compute with.

    Give the whole object to `RankHook.attach(weights=...)`.
    """

    def __init__(self, segment: Segment, layers: list[dict[str, torch.Tensor]]) -> None:
        self.segment, self._layers = segment, layers

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return self._layers[layer]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self._layers)

    def close(self) -> None:
        """Remove the segment's name and drop the tensors; what the engine still holds stays mapped."""
        self.segment.unlink()
        self._layers = []
        self.segment.close()


def share_weights(group: str, rank: int, weights_per_layer: Sequence[LayerTensors]) -> SharedWeights:
    """Copy expert tensors into a new shared segment of this rank.

    Args:
        group, rank: as for `RankHook.attach`.
        weights_per_layer: per MoE layer a tensor, a list, or a dict of tensors [S, ...], on the CPU.

    Returns:
        Tensors of the same names, shapes, dtypes and contents; compute with these from now on.

    Raises:
        NoSharedMemory: no room, or a living process shares weights as this rank of this group.
        SpecError: a tensor is not on the CPU.
    """
    named = [
        {name: tensor.detach().contiguous() for name, tensor in named_tensors(layer).items()}
        for layer in weights_per_layer
    ]
    devices = {tensor.device for tensors in named for tensor in tensors.values() if tensor.device.type != "cpu"}
    if devices:
        raise SpecError(f"expert tensors lie on {', '.join(sorted(map(str, devices)))}; only CPU tensors can be shared")
    offsets, end = [], 0
    for tensors in named:
        for tensor in tensors.values():
            offsets.append(end)
            end = -(-(end + tensor.nbytes) // ALIGNMENT) * ALIGNMENT
    name = segment_name(group, f"weights.{rank}")
    _remove_stale(name)
    segment = Segment.create(name, LAYOUT, end)
    memory = torch.from_numpy(segment.array(np.uint8, (max(end, 1),)))
    layers: list[dict[str, torch.Tensor]] = []
    place = iter(offsets)
    for tensors in named:
        layer = {}
        for key, tensor in tensors.items():
            first = next(place)
            shared = memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            layer[key] = shared.copy_(tensor)
        layers.append(layer)
    segment.publish()
    return SharedWeights(segment, layers)


def _remove_stale(name: str) -> None:
    try:
        old = Segment.open(name, LAYOUT)
    except SegmentError:
        return
    if not old.owner_alive:
        old.unlink()
    old.close()


class _Export(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a rank tells its peers: per layer and tensor (offset, distance of rows, bytes of a row) in the segment."""

    segment: str
    tensors: list[list[tuple[int, int, int]]]


class ShmTransfer(Transfer):
    """See the module. Copies run on a thread."""

    name = "shm"

    def __init__(self, weights: WeightRows, num_rows: int, stream: Stream, shared: SharedWeights) -> None:
        super().__init__(weights, num_rows)
        self.stream, self._shared = stream, shared
        self._peers: dict[int, list[list[torch.Tensor]]] = {}
        self._segments: list[Segment] = []
        self._num_abandoned = 0

    def export(self) -> bytes:
        """See Transfer."""
        base = self._shared.segment.address
        tensors = [
            [(tensor.data_ptr() - base, tensor.stride(0), tensor.shape[1]) for tensor in layer]
            for layer in self.weights.rows
        ]
        return msgspec.json.encode(_Export(segment=self._shared.segment.name, tensors=tensors))

    def connect(self, rank: int, exported: bytes) -> None:
        """See Transfer."""
        try:
            export = msgspec.json.decode(exported, type=_Export)
            segment = Segment.open(export.segment, LAYOUT)
        except (SegmentError, msgspec.MsgspecError) as error:
            raise TransferFailed(f"the weights of rank {rank} cannot be reached: {error}") from error
        memory = torch.from_numpy(segment.array(np.uint8, (segment.header.size - segment.header.data_offset,)))
        own = [[tensor.shape for tensor in layer] for layer in self.weights.rows]
        slots = self.weights.rows[0][0].shape[0]
        if [[(slots, size) for *_, size in layer] for layer in export.tensors] != [
            [tuple(s) for s in layer] for layer in own
        ]:
            raise TransferFailed(f"the weights of rank {rank} have other shapes than those of this rank")
        self._segments.append(segment)
        self._peers[rank] = [
            [memory.as_strided((slots, size), (distance, 1), offset) for offset, distance, size in layer]
            for layer in export.tensors
        ]

    def pull(self, layer: int, pull: Pull, row: int, fingerprints: Sequence[int] | None) -> Completion[None]:
        """See Transfer."""
        staged = self.staging.tensors(layer, row)  # of these rows, whatever `abandon` does before it begins
        return self.stream.submit(lambda: self._pull_now(layer, pull, staged, fingerprints))

    def flush(self) -> None:
        """See Transfer. Pulls begin at once."""

    def commit(self, layer: int, rows: Sequence[tuple[int, int]], more: Sequence[Copy]) -> Completion[None]:
        """See Transfer. On the CPU the copies are done when this returns, and maps leave nothing to copy."""
        for row, slot in rows:
            for target, source in zip(self.weights.rows[layer], self.staging.tensors(layer, row), strict=True):
                target[slot].copy_(source)
        completion: Completion[None] = Completion()
        completion.done = True
        return completion

    def abandon(self) -> bool:
        """See Transfer. Another thread and other rows take over; the old ones live as long as what runs in them."""
        if self._num_abandoned == MOST_ABANDONED:
            return False
        self._num_abandoned += 1
        if isinstance(self.stream, HostStream):
            self.stream.leave()
        self.stream = HostStream("eplb-transfer")
        self.staging = StagingRows(self.weights, self.staging.num_rows)
        return True

    def close(self) -> None:
        """See Transfer."""
        self.stream.close()
        self._peers.clear()
        for segment in self._segments:
            segment.close()
        self._segments.clear()

    def _pull_now(self, layer: int, pull: Pull, staged: list[torch.Tensor], fingerprints: Sequence[int] | None) -> None:
        for index, (target, source) in enumerate(zip(staged, self._peers[pull.source_rank][layer], strict=True)):
            target.copy_(source[pull.source_slot])
            if fingerprints is not None and fingerprint(target) != fingerprints[index]:
                raise other_bytes(layer, pull, index)

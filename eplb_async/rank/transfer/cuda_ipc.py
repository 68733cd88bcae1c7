"""Transfer between GPUs of one host: a rank maps the others' memory with CUDA IPC and copies from it with copy engines.

    export    per allocation that holds weights its IPC handle; per tensor which allocation, where in it, distance and bytes of rows
    connect   open each handle once; a rank of this very process needs none
    pull      collected until `flush`, which issues one batch on the transfer stream:

              copies of all rows, and the table of pieces to check  ->  fingerprints  ->  results to pinned memory  ->  event

    commit    one kernel on the compute stream copies staging rows into live slots, and the maps' rows with them

No kernel runs beside the forward but the fingerprints', and that one on few multiprocessors. Between two forwards a kernel is what is
fast: it has all multiprocessors, and one launch for all pieces. The host never waits: a batch has ended when its event has.
"""

import os
from collections.abc import Sequence

import msgspec
import torch

from eplb_async.core.errors import DeviceCallFailed, SpecError, TransferFailed
from eplb_async.rank.cuda.checker import BatchChecker
from eplb_async.rank.cuda.commit_tables import CommitTables
from eplb_async.rank.cuda.driver import CudaDriver
from eplb_async.rank.cuda.fingerprint import MAX_BYTES
from eplb_async.rank.cuda.streams import ComputeStream, EventCompletion
from eplb_async.rank.streams import Completion
from eplb_async.rank.transfer.base import Copy, Pull, Transfer, other_bytes
from eplb_async.rank.weights import WeightRows

__all__ = ["CudaIpcTransfer"]

Rows = tuple[int, int]
"""Address of a tensor's first row, and the distance between rows."""


class _Export(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a rank tells its peers.

    Fields:
        pid: a rank of the same process uses the addresses themselves.
        device: the GPU's UUID, for messages.
        handles: IPC handle of each allocation.
        bases: its address in the exporting process.
        tensors: per layer and tensor (allocation, offset, distance of rows, bytes of a row).
    """

    pid: int
    device: str
    handles: list[bytes]
    bases: list[int]
    tensors: list[list[tuple[int, int, int, int]]]


class _Batch:
    """Pulls that were issued together; they end together."""

    def __init__(self) -> None:
        self.pulls: list[_BatchedPull] = []
        self.end: EventCompletion | None = None
        self.checker: BatchChecker | None = None
        self.error: Exception | None = None

    def ended(self) -> bool:
        """Asks the device; once that has passed the batch's end, each pull knows how it ended."""
        if self.end is not None and self.end.done:
            self.end = None
            if self.checker is not None and self.error is None:
                self._compare(self.checker)
            for pull in self.pulls:
                pull.error = pull.error or self.error
                pull.finished = True
        return self.pulls[0].finished

    def _compare(self, checker: BatchChecker) -> None:
        found = iter(checker.results(self.pulls[0].row))
        for pull in self.pulls:
            for index, expected in enumerate(pull.expected):
                if next(found) != expected:
                    pull.error = other_bytes(pull.layer, pull.what, index)


class _BatchedPull(Completion[None]):
    """One row of a batch."""

    def __init__(self, batch: _Batch, layer: int, what: Pull, row: int, expected: Sequence[int]) -> None:
        self.finished = False
        super().__init__()
        self.layer, self.what, self.row, self.expected = layer, what, row, expected
        self._batch = batch

    @property
    def done(self) -> bool:
        """See Completion."""
        return self.finished or self._batch.ended()

    @done.setter
    def done(self, value: bool) -> None:
        self.finished = value


class CudaIpcTransfer(Transfer):
    """See the module. All methods belong to the thread that runs the forwards."""

    name = "cuda_ipc"

    def __init__(self, weights: WeightRows, num_rows: int, driver: CudaDriver, compute: ComputeStream) -> None:
        """Allocates the staging rows on the weights' device, and compiles the kernels.

        Raises:
            SpecError: no memory for the rows, or a tensor too large to be checked.
        """
        largest = max(tensor.shape[1] for layer in weights.rows for tensor in layer)
        if largest > MAX_BYTES:
            raise SpecError(f"a slot's tensor has {largest:,} bytes; at most {MAX_BYTES:,} can be moved")
        super().__init__(weights, num_rows)
        self._driver, self._compute = driver, compute
        self.stream = torch.cuda.Stream(compute.device)
        self._checker = BatchChecker(self.staging, driver, self.stream)
        self._own: list[list[Rows]] = [
            [(tensor.data_ptr(), tensor.stride(0)) for tensor in layer] for layer in weights.rows
        ]
        self._sizes = [[tensor.shape[1] for tensor in layer] for layer in weights.rows]
        self._staged = [
            [[part.data_ptr() for part in self.staging.tensors(layer, row)] for row in range(num_rows)]
            for layer in range(len(weights.rows))
        ]
        self._commits = CommitTables(driver, self._own, self._staged, self._sizes)
        self._peers: dict[int, list[list[Rows]]] = {}
        self._opened: dict[bytes, int] = {}
        self._batch = _Batch()
        self._copies: list[Copy] = []

    def export(self) -> bytes:
        """See Transfer.

        Raises:
            SpecError: the weights lie in memory that cannot be shared.
        """
        handles: list[bytes] = []
        bases: list[int] = []
        numbers: dict[int, int] = {}
        tensors = []
        for layer, sizes in zip(self._own, self._sizes, strict=True):
            places = []
            for (address, distance), size in zip(layer, sizes, strict=True):
                base, _ = self._driver.allocation(address)
                if base not in numbers:
                    numbers[base] = len(bases)
                    bases.append(base)
                    handles.append(self._handle(base))
                places.append((numbers[base], address - base, distance, size))
            tensors.append(places)
        device = str(torch.cuda.get_device_properties(self._compute.device).uuid)
        export = _Export(pid=os.getpid(), device=device, handles=handles, bases=bases, tensors=tensors)
        return msgspec.json.encode(export)

    def connect(self, rank: int, exported: bytes) -> None:
        """See Transfer."""
        try:
            export = msgspec.json.decode(exported, type=_Export)
        except msgspec.MsgspecError as error:
            raise TransferFailed(f"what rank {rank} exported cannot be read: {error}") from error
        if [[size for *_, size in layer] for layer in export.tensors] != self._sizes:
            raise TransferFailed(f"the weights of rank {rank} have other shapes than those of this rank")
        bases = export.bases if export.pid == os.getpid() else [self._open(rank, export, h) for h in export.handles]
        self._peers[rank] = [
            [(bases[number] + offset, distance) for number, offset, distance, _ in layer] for layer in export.tensors
        ]

    def pull(self, layer: int, pull: Pull, row: int, fingerprints: Sequence[int] | None) -> Completion[None]:
        """See Transfer. Nothing is issued before `flush`."""
        sources = self._peers[pull.source_rank][layer]
        for (address, distance), target, size in zip(
            sources, self._staged[layer][row], self._sizes[layer], strict=True
        ):
            self._copies.append((target, address + distance * pull.source_slot, size))
        completion = _BatchedPull(self._batch, layer, pull, row, fingerprints or ())
        self._batch.pulls.append(completion)
        return completion

    def flush(self) -> None:
        """See Transfer."""
        batch, copies = self._batch, self._copies
        if not batch.pulls:
            return
        self._batch, self._copies = _Batch(), []
        pieces = [
            piece
            for pull in batch.pulls
            if pull.expected
            for piece in zip(self._staged[pull.layer][pull.row], self._sizes[pull.layer], strict=True)
        ]
        try:
            if pieces:
                batch.checker = self._checker
                copies += self._checker.prepare(batch.pulls[0].row, pieces)
            self._driver.copy_beside(copies, self.stream.cuda_stream)
            if pieces:
                self._checker.launch(batch.pulls[0].row, len(pieces))
        except DeviceCallFailed as error:
            # some of it may have been issued: rows are in use until the stream has passed it
            batch.error = TransferFailed(f"pulls could not be issued: {error}")
        batch.end = EventCompletion(self.stream)

    def commit(self, layer: int, rows: Sequence[tuple[int, int]], more: Sequence[Copy]) -> Completion[None]:
        """See Transfer. One kernel does it all."""
        stream = self._compute.current()
        self._commits.launch(layer, rows, more, stream.cuda_stream)
        return EventCompletion(stream)

    def close(self) -> None:
        """See Transfer. Waits for copies that still run: their memory is other ranks'."""
        if self._opened or self._peers:
            self.stream.synchronize()
        self._peers.clear()
        while self._opened:
            self._driver.close_ipc(self._opened.popitem()[1])

    def _handle(self, base: int) -> bytes:
        try:
            return self._driver.ipc_handle(base)
        except DeviceCallFailed as error:
            raise SpecError(
                f"the memory of these weights cannot be shared with other ranks ({error.why}): it comes from an allocator "
                "of virtual memory. Load the expert weights with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False, "
                "or into tensors made in a torch.cuda.MemPool that does not use them"
            ) from error

    def _open(self, rank: int, export: _Export, handle: bytes) -> int:
        if handle not in self._opened:
            try:
                self._opened[handle] = self._driver.open_ipc(handle)
            except DeviceCallFailed as error:
                raise TransferFailed(
                    f"the weights of rank {rank} on GPU {export.device} cannot be reached ({error.why}); that GPU must be "
                    "visible to this process too (CUDA_VISIBLE_DEVICES) and have peer access to this one"
                ) from error
        return self._opened[handle]

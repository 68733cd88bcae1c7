"""Messages between nodes over NCCL, for weights on CUDA devices; beside the compute stream, on which nothing waits for it.

All messages of a swap are one NCCL group: posted one by one they would wait for each other on the stream, and two ranks
that both send first would wait for ever. The communicator is made at attach by all ranks, since the first swap that is
not everybody's would else hang in making it. NCCL's watchdog ends the process when a peer dies, as that of the engine's
own expert-parallel group does; there is no deadline of its own here.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, Store

from eplb_async.rank.cuda.fingerprint import fingerprint_pieces
from eplb_async.rank.meeting import FOREVER
from eplb_async.rank.transfer.torch_dist import Message

__all__ = ["NcclLink"]


class NcclLink:
    """See PeerLink."""

    def __init__(self, store: Store, rank: int, num_ranks: int, device: torch.device) -> None:
        """Connect to all ranks; made by all of them.

        Args:
            store: where they find each other.
            rank, num_ranks: of the group.
            device: that of the weights.
        """
        from torch._C._distributed_c10d import ProcessGroupNCCL  # a build of torch without CUDA has none

        options = ProcessGroupNCCL.Options()
        options._timeout = FOREVER
        # its stubs leave sends, receives and the coalescing out
        self._group: Any = ProcessGroupNCCL(PrefixStore("nccl", store), rank, num_ranks, options)
        self._stream = torch.cuda.Stream(device)
        self._closed = False
        with torch.cuda.device(device):
            self._group.eager_connect_single_device(device)

    def beside(self) -> AbstractContextManager[object]:
        """See PeerLink: a stream of the transfer's own. Fingerprints are computed on it too."""
        return torch.cuda.stream(self._stream)

    def swap(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """See PeerLink. Waits for the device, on the transfer's thread."""
        self._group._start_coalescing()
        for tensor, peer in receives:
            self._group.recv([tensor], peer, 0)
        for tensor, peer in sends:
            self._group.send([tensor], peer, 0)
        self._group._end_coalescing().wait()
        self._stream.synchronize()

    def compute(self, pieces: Sequence[torch.Tensor]) -> list[int]:
        """See PeerLink."""
        return fingerprint_pieces(pieces)

    def close(self) -> None:
        """See PeerLink."""
        if not self._closed:
            self._closed = True
            self._group.abort()

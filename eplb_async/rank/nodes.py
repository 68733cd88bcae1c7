"""The part of attach, and of a hook, that exists only in groups on several nodes.

    meet in the store -> connect -> compare hellos, agree on the incarnation     before any segment is made
    each node's ranks join their own segments (membership.py)
    gather the fingerprints of all ranks                                         also the barrier before step 0

Whoever fails in between closes its connections, and all others fail with it.
"""

import hashlib
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch._C._distributed_c10d import Store

from eplb_async.core.config import HookSettings
from eplb_async.core.errors import SpecMismatch
from eplb_async.core.placement import IntArray
from eplb_async.rank.matched_stager import MatchedStager, Ways
from eplb_async.rank.meeting import Connections, abort, meet
from eplb_async.rank.streams import HostStream
from eplb_async.rank.torch_exchange import TorchDistExchange
from eplb_async.rank.transfer.base import Transfer
from eplb_async.rank.transfer.torch_dist import GlooLink, PeerLink, TorchDistTransfer
from eplb_async.shm.words import AgreementWords, GroupInfo

__all__ = ["Hello", "NodesJoined"]


class Hello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a rank tells ranks of other nodes first; all of it must be equal.

    Fields:
        info: of the group, under its own name and without a node.
        placement: digest of the placement in which the weights are loaded.
        transfer: name of the transfer inside a node.
        fingerprints: shape of the own ones, of an empty array for a rank that takes none.
    """

    info: GroupInfo
    placement: str
    transfer: str
    fingerprints: tuple[int, ...]

    @classmethod
    def of(cls, info: GroupInfo, group: str, placement_LP: IntArray, transfer: str, shape: tuple[int, ...]) -> "Hello":
        """That of a rank."""
        common = msgspec.structs.replace(info, group=group, node=0)
        rows = np.ascontiguousarray(placement_LP, dtype="<i4").tobytes()
        return cls(info=common, placement=hashlib.sha256(rows).hexdigest(), transfer=transfer, fingerprints=shape)

    def differences(self, other: "Hello") -> list[str]:
        """What differs, for people."""
        found = self.info.differences(other.info)
        if self.placement != other.placement:
            found.append("the placement given here is another")
        if self.transfer != other.transfer:
            found.append(f"weights move by {self.transfer} here and by {other.transfer} there")
        if self.fingerprints != other.fingerprints:
            found.append(f"hook.verify differs (fingerprints {self.fingerprints} here, {other.fingerprints} there)")
        return found


class NodesJoined:
    """The connections of one rank of a group on several nodes, and the parts of its hook that use them.

    Attributes:
        incarnation: that of all ranks.
    """

    def __init__(self, store: Store, rank: int, hello: Hello, end: float) -> None:
        """Meet all ranks and connect to them, until the time `end` of the monotonic clock.

        Raises:
            AttachTimeout: ranks did not come.
            SpecMismatch: another rank describes another group; raised by all ranks.
            PeerLost: a rank left meanwhile.
        """
        self._rank, self._info = rank, hello.info
        group, num_ranks = hello.info.group, hello.info.spec.num_ranks
        met = meet(store, group, rank, num_ranks, max(0.1, end - time.monotonic()))
        self._connections = Connections(met, group, rank, num_ranks, end - time.monotonic())
        self.incarnation = self._connections.incarnation
        self._between: TorchDistTransfer | None = None
        try:
            self._compare(hello)
        except BaseException:
            self.close()
            raise

    def fingerprints(self, own: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Those of all ranks, int64 [L, S, tensors] each; returns when all ranks have called it.

        Raises:
            PeerLost: a rank left.
        """
        gathered = self._connections.gather(np.ascontiguousarray(own).tobytes())
        return [np.frombuffer(data, dtype=np.int64).reshape(own.shape) for data in gathered]

    def stager(
        self,
        inside: Transfer,
        settings: HookSettings,
        expected: Callable[[int, int], Sequence[int] | None],
    ) -> MatchedStager:
        """The stager, with a transfer between nodes beside the one inside; made by all ranks.

        Raises:
            PeerLost: a rank left.
        """
        link = self._connect_weights(inside.weights.rows[0][0].device)
        stream = HostStream(f"eplb-nodes-{self._info.group}-{self._rank}")
        between = self._between = TorchDistTransfer(link, inside.weights, inside.staging, stream, self._rank)
        return MatchedStager(Ways(inside, between), settings, expected, self._info.spec, self._rank)

    def exchange(self, words: AgreementWords, deadline_s: float) -> TorchDistExchange:
        """The agreement backend; it owns the connections of the words from now on."""
        self._connections.settled()
        return TorchDistExchange(self._connections.words, words, self._rank, deadline_s)

    def close(self) -> None:
        """Attach has failed: let the others see it at once."""
        others = [rank for rank in range(self._info.spec.num_ranks) if rank != self._rank]
        abort(self._connections.words, others)
        if self._between is not None:
            self._between.close()

    def _connect_weights(self, device: torch.device) -> PeerLink:
        if device.type == "cuda":
            from eplb_async.rank.transfer.nccl_link import NcclLink

            return NcclLink(self._connections.store, self._rank, self._info.spec.num_ranks, device)
        return GlooLink(self._connections.connect("weights"), self._rank)

    def _compare(self, hello: Hello) -> None:
        texts = self._connections.gather(msgspec.json.encode(hello))
        for rank, text in enumerate(texts):
            try:
                other = msgspec.json.decode(text, type=Hello)
            except msgspec.MsgspecError as error:
                raise SpecMismatch(self._info.group, [f"rank {rank} runs another release ({error})"]) from error
            if differences := hello.differences(other):
                raise SpecMismatch(self._info.group, [f"{difference} (rank {rank})" for difference in differences])

"""Building a hook's parts at attach, and taking them apart at detach, so that nothing is left behind either way."""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_async.core.config import Settings, check_group_name
from eplb_async.core.diff import least_staging_rows
from eplb_async.core.errors import (
    DaemonUnavailable,
    PeerLost,
    PlacementError,
    SegmentMissing,
    SpecError,
    SpecMismatch,
    TransferFailed,
    UnknownName,
)
from eplb_async.core.load import LoadKind
from eplb_async.core.placement import IntArray, initial_placement, validate_placement
from eplb_async.core.spec import MoESpec
from eplb_async.rank.committer import Committer
from eplb_async.rank.exchange import Exchange, SharedMemoryExchange
from eplb_async.rank.maps import Maps
from eplb_async.rank.meeting import node_group
from eplb_async.rank.membership import Membership
from eplb_async.rank.nodes import Hello, NodesJoined
from eplb_async.rank.pace import Pace
from eplb_async.rank.plan_reader import PlanReader
from eplb_async.rank.platform import Platform, choose_platform
from eplb_async.rank.recorder import Recorder, check_load
from eplb_async.rank.stager import Stager
from eplb_async.rank.streams import HostStream
from eplb_async.rank.transfer.base import Transfer
from eplb_async.rank.verification import ExpertFingerprints, SampledFingerprints
from eplb_async.rank.weights import LayerTensors, WeightRows
from eplb_async.shm.export import ExportInfo, RankExport
from eplb_async.shm.launch import daemon_running, ensure_daemon
from eplb_async.shm.ring import LoadRing
from eplb_async.shm.segment import Segment, prepare_runtime_dir
from eplb_async.shm.words import GroupInfo

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["AttachRequest", "Parts", "assemble"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AttachRequest:
    """The arguments of attach, with defaults filled in; see RankHook.attach."""

    group: str
    rank: int
    spec: MoESpec
    weights: Sequence[LayerTensors]
    load: torch.Tensor
    daemon: str
    placement: IntArray | None
    load_kind: LoadKind | None
    settings: Settings
    rendezvous: "Store | None" = None

    @property
    def staging_rows(self) -> int:
        """Of each rank; by default one whole layer."""
        return self.settings.hook.staging_rows or self.spec.slots_per_rank

    def check(self) -> None:
        """Refuse what does not fit together, before anything is made.

        Raises:
            ConfigError, SpecError, UnknownName: an argument.
        """
        check_group_name(self.group)
        if not 0 <= self.rank < self.spec.num_ranks:
            raise SpecError(f"rank {self.rank} was given; ranks are 0..{self.spec.num_ranks - 1}")
        if self.daemon not in ("optional", "auto", "required"):
            raise UnknownName("daemon choice", self.daemon, ("optional", "auto", "required"))
        least = least_staging_rows(self.spec.topology)
        if self.staging_rows < least:
            raise SpecError(f"staging_rows is {self.staging_rows}; needed at least {least}")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a hook is made of. `group` is the name as given; `info.group` that of this node's segments."""

    group: str
    info: GroupInfo
    rank: int
    settings: Settings
    membership: Membership
    exchange: Exchange
    transfer: Transfer
    reader: PlanReader
    stager: Stager
    committer: Committer
    maps: Maps
    recorder: Recorder
    capturing: Callable[[], bool]
    pace: Pace

    def close(self) -> None:
        """End the threads, then leave the group; that in any case, though a thread hangs.

        Raises:
            TimeoutError: a thread did not end.
        """
        with contextlib.ExitStack() as last_first:
            # after the word that this rank has left, so that ranks of this node find it when their connections close
            last_first.callback(self.stager.close)
            last_first.callback(self.exchange.close)
            last_first.callback(self.membership.leave)
            last_first.callback(self.recorder.close)
            last_first.callback(self.transfer.close)
            last_first.callback(self.reader.close)


def assemble(request: AttachRequest) -> Parts:
    """Check the arguments, join the group, connect to the other ranks.

    Raises:
        As RankHook.attach; nothing is left behind then.
    """
    request.check()
    spec, settings = request.spec, request.settings
    given = request.placement if request.placement is not None else initial_placement(spec)
    placement_LP = validate_placement(np.asarray(given), spec)
    if len(placement_LP) != spec.num_layers:
        raise PlacementError(f"a placement of {len(placement_LP)} layers was given; the spec has {spec.num_layers}")
    kind = check_load(request.load, spec, request.load_kind)
    rows = WeightRows(request.weights, spec)
    platform = choose_platform(rows, request.load)
    directory = prepare_runtime_dir(settings.directory)
    num_nodes = spec.num_nodes if request.rendezvous is not None else 1
    node = request.rank // (spec.num_ranks // num_nodes)
    info = GroupInfo(
        group=check_group_name(node_group(request.group, node)) if num_nodes > 1 else request.group,
        spec=spec,
        num_nodes=num_nodes,
        node=node,
        reduce_every=settings.hook.reduce_every,
        one_peer_at_a_time=settings.hook.one_peer_at_a_time,
        lag=settings.hook.lag,
        history=settings.hook.history,
        staging_rows=request.staging_rows,
        slot_bytes=rows.slot_bytes,
        tensors=rows.digest,
    )
    name = f"eplb-transfer-{request.group}-{request.rank}"
    transfer = platform.transfer(request.weights, rows, request.staging_rows, name)
    try:
        if request.daemon == "required" and not daemon_running(settings):
            raise DaemonUnavailable(str(directory))
        joining = _Joining(request, info, placement_LP, kind, platform, transfer)
        parts = joining.join(directory)
    except BaseException:
        transfer.close()
        raise
    log.info(
        "group %s rank %d attached: incarnation %d, %d staging rows (%d bytes), %s",
        request.group,
        request.rank,
        parts.membership.words.incarnation,
        request.staging_rows,
        transfer.staging.num_bytes,
        settings.hook,
    )
    return parts


class _Joining:
    """The part of attach that talks to other ranks."""

    def __init__(
        self,
        request: AttachRequest,
        info: GroupInfo,
        placement_LP: IntArray,
        kind: LoadKind,
        platform: Platform,
        transfer: Transfer,
    ) -> None:
        self._request, self._info, self._placement_LP = request, info, placement_LP
        self._kind, self._platform, self._transfer = kind, platform, transfer
        self._ring: LoadRing
        verify = request.settings.hook.verify != "off"
        rows = transfer.weights
        # an empty array tells the others that this rank took none
        none = np.zeros((0, 0, 0), dtype=np.int64)
        self._own = platform.fingerprints(rows, placement_LP, request.rank) if verify else none

    def join(self, directory: Path) -> Parts:
        request, end = self._request, time.monotonic() + self._request.settings.hook.attach_deadline_s
        nodes = None
        if self._info.num_nodes > 1 and request.rendezvous is not None:
            hello = Hello.of(self._info, request.group, self._placement_LP, self._transfer.name, self._own.shape)
            nodes = NodesJoined(request.rendezvous, request.rank, hello, end)
        try:
            incarnation = nodes.incarnation if nodes else 0
            membership = Membership(self._info, request.rank, directory, incarnation)
            membership.join(self._placement_LP, self._publish, self._start_daemon, max(0.1, end - time.monotonic()))
            try:
                return self._parts(membership, self._connect(membership, nodes), nodes)
            except BaseException:
                membership.leave()
                raise
        except BaseException:
            if nodes:
                nodes.close()
            raise

    def _parts(
        self, membership: Membership, fingerprints: ExpertFingerprints | None, nodes: NodesJoined | None
    ) -> Parts:
        request, info, settings = self._request, self._info, self._request.settings
        maps = self._platform.maps(self._placement_LP, info.spec)
        expected = self._expected(fingerprints)
        exchange: Exchange
        if nodes:
            stager: Stager = nodes.stager(self._transfer, settings.hook, expected)
            exchange = nodes.exchange(membership.words, settings.hook.peer_deadline_s)
        else:
            stager = Stager(self._transfer, settings.hook, expected)
            exchange = SharedMemoryExchange(membership.words, request.rank, settings.hook.peer_deadline_s)
        live = membership.live if request.rank == info.ranks[0] else None
        recorder = self._platform.recorder(request.load, self._ring)
        pace = Pace(settings.hook, max(info.slot_bytes))
        self._ring.show_pace(pace.budget_bytes, 0, 0)
        reader_stream = HostStream(f"eplb-plan-{info.group}-{request.rank}")
        return Parts(
            group=request.group,
            info=info,
            rank=request.rank,
            settings=settings,
            membership=membership,
            exchange=exchange,
            transfer=self._transfer,
            reader=PlanReader(membership.board, info.spec, request.rank, info.staging_rows, reader_stream),
            stager=stager,
            committer=Committer(self._transfer, maps, stager, live),
            maps=maps,
            recorder=recorder,
            capturing=self._platform.capturing,
            pace=pace,
        )

    def _expected(self, fingerprints: ExpertFingerprints | None) -> Callable[[int, int], Sequence[int] | None]:
        """What the rows of an expert must look like; None for a row that is not compared."""
        if fingerprints is None:
            return lambda layer, expert: None
        return fingerprints.of if self._request.settings.hook.verify == "all" else SampledFingerprints(fingerprints).of

    def _publish(self, incarnation: int) -> list[Segment]:
        request, info = self._request, self._info
        exported = ExportInfo(transfer=self._transfer.name, exported=self._transfer.export(), shape=self._own.shape)
        records = request.settings.hook.ring_records
        ring_info = Recorder.ring_info(info.group, request.rank, request.load, self._kind, records)
        self._ring = LoadRing.create(ring_info, incarnation)
        try:
            export = RankExport.create(info.group, request.rank, incarnation, exported, self._own)
        except BaseException:
            self._ring.segment.unlink()
            raise
        return [self._ring.segment, export.segment]

    def _start_daemon(self) -> None:
        # an idle daemon may be about to stop: with the group's segments there, it sees them or we see that it is gone
        if self._request.daemon == "auto":
            ensure_daemon(self._request.settings)

    def _connect(self, membership: Membership, nodes: NodesJoined | None) -> ExpertFingerprints | None:
        """Reach the weights of every rank of this node, the own ones included, and collect the fingerprints of all."""
        info, collected = self._info, []
        live = membership.live.read()
        if live is None or not np.array_equal(live[0], self._placement_LP):
            raise SpecMismatch(info.group, ["the placement given here is not the one that the group started with"])
        for rank in info.ranks:
            try:
                collected.append(self._reach(rank, membership.words.incarnation))
            except (SegmentMissing, TransferFailed) as error:
                if not membership.words.ended:
                    raise
                raise PeerLost(info.group, rank, 0, 0.0, "it left while this rank attached") from error
        if nodes:
            collected = nodes.fingerprints(self._own)
        if self._request.settings.hook.verify == "off":
            return None
        return ExpertFingerprints(np.concatenate(collected, axis=1), self._placement_LP, info.spec)

    def _reach(self, rank: int, incarnation: int) -> NDArray[np.int64]:
        """Connect to one rank; returns its fingerprints, int64 [L, S, tensors]."""
        export, group = RankExport.open(self._info.group, rank, incarnation), self._info.group
        if export.info.transfer != self._transfer.name:
            here = self._transfer.name
            raise TransferFailed(f"rank {rank} moves weights by {export.info.transfer}, this rank by {here}")
        verify = self._request.settings.hook.verify
        if verify != "off" and export.info.shape != self._own.shape:
            raise SpecMismatch(group, [f"hook.verify is {verify} here and off on rank {rank}"])
        self._transfer.connect(rank, export.info.exported)
        fingerprints = np.array(export.fingerprints, dtype=np.int64)
        export.close()
        return fingerprints

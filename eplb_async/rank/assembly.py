"""Building a hook's parts at attach, and taking them apart at detach, so that nothing is left behind either way."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_async.core.config import Settings
from eplb_async.core.errors import (
    DaemonUnavailable,
    PeerLost,
    PlacementError,
    SegmentMissing,
    SpecMismatch,
    TransferFailed,
)
from eplb_async.core.load import LoadKind
from eplb_async.core.placement import IntArray, initial_placement, validate_placement
from eplb_async.core.spec import MoESpec
from eplb_async.rank.committer import Committer
from eplb_async.rank.exchange import Exchange, SharedMemoryExchange
from eplb_async.rank.maps import Maps
from eplb_async.rank.membership import Membership
from eplb_async.rank.pace import StepPace
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

__all__ = ["AttachRequest", "Parts", "assemble"]

LIVE_WRITER = 0
"""The rank that writes the live placement: the lowest of the node."""


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
    staging_rows: int


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a hook is made of."""

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
    pace: StepPace

    def close(self) -> None:
        """End the threads, then leave the group; that in any case, though a thread hangs.

        Raises:
            TimeoutError: a thread did not end.
        """
        with contextlib.ExitStack() as last_first:
            last_first.callback(self.membership.leave)
            last_first.callback(self.recorder.close)
            last_first.callback(self.transfer.close)
            last_first.callback(self.reader.close)


def assemble(request: AttachRequest) -> Parts:
    """Check the arguments, join the group, connect to the other ranks.

    Raises:
        As RankHook.attach; nothing is left behind then.
    """
    spec, settings = request.spec, request.settings
    given = request.placement if request.placement is not None else initial_placement(spec)
    placement_LP = validate_placement(np.asarray(given), spec)
    if len(placement_LP) != spec.num_layers:
        raise PlacementError(f"a placement of {len(placement_LP)} layers was given; the spec has {spec.num_layers}")
    kind = check_load(request.load, spec, request.load_kind)
    rows = WeightRows(request.weights, spec)
    platform = choose_platform(rows, request.load)
    directory = prepare_runtime_dir(settings.directory)
    info = GroupInfo(
        group=request.group,
        spec=spec,
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
        return joining.join(directory)
    except BaseException:
        transfer.close()
        raise


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
        deadline_s = self._request.settings.hook.attach_deadline_s
        membership = Membership(self._info, self._request.rank, directory)
        membership.join(self._placement_LP, self._publish, self._start_daemon, deadline_s)
        try:
            return self._parts(membership, self._connect(membership))
        except BaseException:
            membership.leave()
            raise

    def _parts(self, membership: Membership, fingerprints: ExpertFingerprints | None) -> Parts:
        request, info, settings = self._request, self._info, self._request.settings
        maps = self._platform.maps(self._placement_LP, info.spec)
        stager = Stager(self._transfer, settings.hook, self._expected(fingerprints))
        live = membership.live if request.rank == LIVE_WRITER else None
        recorder = self._platform.recorder(request.load, self._ring)
        reader_stream = HostStream(f"eplb-plan-{info.group}-{request.rank}")
        return Parts(
            info=info,
            rank=request.rank,
            settings=settings,
            membership=membership,
            exchange=SharedMemoryExchange(membership.words, request.rank, settings.hook.peer_deadline_s),
            transfer=self._transfer,
            reader=PlanReader(membership.board, info.spec, request.rank, info.staging_rows, reader_stream),
            stager=stager,
            committer=Committer(self._transfer, maps, stager, live),
            maps=maps,
            recorder=recorder,
            capturing=self._platform.capturing,
            pace=StepPace(settings.hook.slow_step_ratio),
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

    def _connect(self, membership: Membership) -> ExpertFingerprints | None:
        """Reach every rank's weights, the own ones included, and collect the fingerprints."""
        info, collected = self._info, []
        live = membership.live.read()
        if live is None or not np.array_equal(live[0], self._placement_LP):
            raise SpecMismatch(info.group, ["the placement given here is not the one that the group started with"])
        for rank in range(info.spec.num_ranks):
            try:
                collected.append(self._reach(rank, membership.words.incarnation))
            except (SegmentMissing, TransferFailed) as error:
                if not membership.words.ended:
                    raise
                raise PeerLost(info.group, rank, 0, 0.0, "it left while this rank attached") from error
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

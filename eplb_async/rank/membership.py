"""Joining a group: all its ranks attach to one incarnation, and step 0 is the first step after that.

    attach of rank r, under the group's lock (a file lock; the kernel drops it if we die):
      no group segment, or all its members gone      -> remove what is left, make a new incarnation
      it describes another model                     -> SpecMismatch, if anyone in it lives
      it has ended, or a READY member is gone        -> that incarnation can never go on: end it, make a new one
      a living process is rank r in it               -> RankTaken
      else                                           -> join it
    then, without the lock: wait until all are READY; if it ends meanwhile, start again.

A rank that died while JOINING is replaced in place: nobody was past the wait. One that died READY may have been seen by
others that went on, so its death ends the incarnation; they notice by PeerLost, or while they wait here.

Of a group on several nodes each node has a set of segments, for its ranks alone. All ranks have met before (meeting.py) and
bring the number of the incarnation: what is there under another number is over, and if theirs ends, attach fails.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import posix_ipc

from eplb_async.core.errors import (
    AttachTimeout,
    PeerLost,
    RankTaken,
    SegmentError,
    SegmentMissing,
    SegmentRefused,
    SpecMismatch,
)
from eplb_async.core.placement import IntArray
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.launch import group_lock_path
from eplb_async.shm.layout import segment_name
from eplb_async.shm.live import LivePlacement
from eplb_async.shm.segment import Segment, file_lock, list_segments
from eplb_async.shm.words import AgreementWords, GroupInfo, MemberState

__all__ = ["Membership"]

log = logging.getLogger(__name__)
WAIT_S = 0.005
WHY_GONE = "it left while this rank attached"


class Membership:
    """This process as one rank of one incarnation.

    Attributes:
        words, board, live: the group's segments.
        own: further segments of this rank, removed when it leaves.
    """

    def __init__(self, info: GroupInfo, rank: int, runtime_dir: Path, incarnation: int = 0) -> None:
        """`incarnation`: the one that ranks of several nodes have agreed on; 0: whoever comes first makes it."""
        self.info, self.rank, self._agreed = info, rank, incarnation
        self._lock_path = group_lock_path(runtime_dir, info.group)
        self.words: AgreementWords
        self.board: PlanBoard
        self.live: LivePlacement
        self.own: list[Segment] = []

    def join(
        self,
        placement_LP: IntArray,
        publish: Callable[[int], list[Segment]],
        before_ready: Callable[[], None],
        deadline_s: float,
    ) -> None:
        """Attach; returns when all ranks of the incarnation are READY.

        Args:
            placement_LP: the placement in which this rank's weights are loaded.
            publish: makes this rank's own segments for an incarnation; called once per try, before READY.
            before_ready: called once the group's segments and the own ones exist.
            deadline_s: for all of it.

        Raises:
            SpecMismatch, RankTaken, AttachTimeout, SegmentError: see there; nothing of this rank is left behind.
        """
        end = time.monotonic() + deadline_s
        while True:
            try:
                with file_lock(self._lock_path, max(0.1, end - time.monotonic())):
                    self._enter(placement_LP)
                    self._remove_own_names()
                    self.own = publish(self.words.incarnation)
                    before_ready()
                    self.words.set_state(self.rank, MemberState.READY)
            except TimeoutError as error:
                raise AttachTimeout(self.info.group, [], self.info.spec.num_ranks, deadline_s) from error
            except BaseException:
                self._leave()
                raise
            try:
                complete = self._wait(end, deadline_s)
            except BaseException:
                self.leave()
                raise
            if complete:
                return
            if self._agreed:
                gone = self._gone()
                self.leave()
                raise PeerLost(self.info.group, gone, 0, deadline_s - (end - time.monotonic()), WHY_GONE)
            log.info(
                "group %s rank %d: the incarnation ended while it formed; joining the next", self.info.group, self.rank
            )
            self.leave()

    def leave(self) -> None:
        """Detach: say so, remove the own segments, and the group's if nobody else lives. Idempotent."""
        with file_lock(self._lock_path, 30.0):
            self._leave()

    def _leave(self) -> None:
        if hasattr(self, "words"):
            if self.words.member(self.rank).pid == os.getpid():
                self.words.set_state(self.rank, MemberState.LEFT)
            self.words.end()
            alone = not any(self.words.member(rank).alive for rank in self.info.ranks)
            for part in (self.words, self.board, self.live):
                if alone:
                    part.segment.unlink()
                part.close()
            del self.words, self.board, self.live
        for segment in self.own:
            segment.unlink()
            segment.close()
        self.own = []

    def _enter(self, placement_LP: IntArray) -> None:
        words = self._usable()
        if words is None:
            self._remove_group()
            incarnation = self._agreed or time.time_ns()
            self.board = PlanBoard.create(self.info.group, self.info.spec, incarnation)
            try:
                self.live = LivePlacement.create(self.info.group, self.info.spec, placement_LP, incarnation)
                # last, since the group segment is what others look for
                self.words = AgreementWords.create(self.info, incarnation)
            except SegmentError:
                self._remove_group()
                raise
        else:
            self.board = PlanBoard.open(self.info.group, words.incarnation)
            self.live = LivePlacement.open(self.info.group, self.info.spec, words.incarnation)
            self.words = words
        self.words.join(self.rank, os.getpid())

    def _usable(self) -> AgreementWords | None:
        """The incarnation to join, None if a new one is needed."""
        try:
            words = AgreementWords.open(self.info.group)
        except SegmentMissing:
            return None
        except SegmentRefused:
            # only what nobody living made may be replaced
            if _creator_gone(segment_name(self.info.group, "group")):
                return None
            raise
        members = [words.member(rank) for rank in range(words.num_ranks)]
        living = [member for member in members if member.alive]
        if not living:
            return None
        if self._agreed and words.incarnation != self._agreed and (words.ended or not members[self.rank].alive):
            # the ranks of this node have all come to the meeting: none of them serves there
            words.end()
            words.close()
            return None
        differences = self.info.differences(words.info)
        if differences:
            raise SpecMismatch(self.info.group, differences)
        broken = words.ended or any(member.state is MemberState.READY and not member.alive for member in members)
        if members[self.rank].alive and not words.ended:
            raise RankTaken(self.info.group, self.rank, members[self.rank].pid)
        if broken and words.incarnation == self._agreed:
            words.end()
            raise PeerLost(self.info.group, self._gone(words), 0, 0.0, WHY_GONE)
        if broken:
            words.end()
            words.close()
            return None
        return words

    def _wait(self, end: float, deadline_s: float) -> bool:
        """Wait for all; false if the incarnation ended."""
        while True:
            members = {rank: self.words.member(rank) for rank in self.info.ranks}
            if self.words.ended or self.words.segment.replaced:
                return False
            missing = [rank for rank, member in members.items() if member.state is not MemberState.READY]
            if not missing:
                return True
            if time.monotonic() > end:
                raise AttachTimeout(self.info.group, missing, self.words.num_ranks, deadline_s)
            time.sleep(WAIT_S)

    def _gone(self, words: AgreementWords | None = None) -> list[int]:
        """Ranks of this node that left or died, as far as it can be told; else all others."""
        members = {rank: (words or self.words).member(rank) for rank in self.info.ranks}
        gone = [rank for rank, member in members.items() if member.state is not MemberState.FREE and not member.alive]
        return gone or [rank for rank in self.info.ranks if rank != self.rank]

    def _remove_group(self) -> None:
        for name, group, kind in list_segments():
            if group == self.info.group and not kind.startswith("weights."):
                with contextlib.suppress(posix_ipc.ExistentialError):
                    posix_ipc.unlink_shared_memory(name)

    def _remove_own_names(self) -> None:
        """Left behind by a process of this rank that died."""
        for kind in ("ring", "export"):
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_shared_memory(segment_name(self.info.group, f"{kind}.{self.rank}"))


def _creator_gone(name: str) -> bool:
    from eplb_async.shm.gc import stale_segments

    return any(stale.name == name for stale in stale_segments())

"""What is left of a segment's object once its mapping was dropped."""

from collections.abc import Callable

import pytest

from eplb_async.core.errors import InternalError
from eplb_async.core.load import LoadKind, Phase
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.live import LivePlacement
from eplb_async.shm.ring import LoadRing, RingInfo
from eplb_async.shm.words import AgreementWords, GroupInfo


def test_use_after_close_is_an_error_not_a_crash(group: str) -> None:
    """Every kind of segment: an address of a dropped mapping is never followed."""
    spec = MoESpec(num_layers=1, num_experts=2, num_ranks=1)
    info = GroupInfo(group=group, spec=spec, lag=1, history=8, staging_rows=1, slot_bytes=[1], tensors="")
    ring_info = RingInfo(group=group, rank=0, kind=LoadKind.LOGICAL, num_layers=1, width=2, num_records=4)
    words, board = AgreementWords.create(info, 1), PlanBoard.create(group, spec, 1)
    live, ring = LivePlacement.create(group, spec, initial_placement(spec), 1), LoadRing.create(ring_info, 1)
    for part in (words, board, live, ring):
        part.segment.unlink()
        part.close()
        part.close()
    uses: list[Callable[[], object]] = [
        lambda: words.ended,
        lambda: words.publish(0, 0, (0, 0, 0, 0)),
        lambda: words.reduce(0),
        lambda: board.sequence,
        board.read,
        live.read,
        ring.read,
        lambda: ring.begin(0, Phase.DECODE, 0, 0),
    ]
    for use in uses:
        with pytest.raises(InternalError, match="used after it was closed"):
            use()

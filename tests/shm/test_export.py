"""What a rank shows its peers."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from eplb_async.core.errors import SegmentMissing, SegmentRefused
from eplb_async.shm.export import LAYOUT, ExportInfo, RankExport
from eplb_async.shm.layout import segment_name
from eplb_async.shm.segment import Segment
from tests.shm.processes import run_code

INFO = ExportInfo(transfer="shm", exported=bytes(range(256)), shape=(2, 3, 4))
FINGERPRINTS = np.arange(24, dtype=np.int64).reshape(2, 3, 4) - (1 << 62)


def test_a_peer_sees_what_was_shown(group: str) -> None:
    """Backend, its bytes and all fingerprints arrive in another process."""
    export = RankExport.create(group, 1, 3, INFO, FINGERPRINTS)
    code = """
import sys
from eplb_async.shm.export import RankExport
export = RankExport.open(sys.argv[1], 1, 3)
print(export.info.transfer, export.info.exported == bytes(range(256)), export.fingerprints.shape, export.fingerprints.sum())
"""
    assert run_code(code, group) == f"shm True (2, 3, 4) {FINGERPRINTS.sum()}"
    again = RankExport.open(group, 1, 3)
    assert again.fingerprints.tolist() == FINGERPRINTS.tolist()
    again.close()
    assert again.fingerprints.size == 0
    export.segment.unlink()


def test_no_fingerprints(group: str) -> None:
    """A rank whose layers have no tensors shows an empty table."""
    info = msgspec.structs.replace(INFO, shape=(2, 3, 0))
    export = RankExport.create(group, 1, 3, info, np.zeros((2, 3, 0), dtype=np.int64))
    assert RankExport.open(group, 1, 3).fingerprints.shape == (2, 3, 0)
    export.segment.unlink()


def test_what_does_not_fit_is_refused(group: str, make_group: Callable[[str], str]) -> None:
    """Another incarnation, a shape larger than the data, another text, and a name that nobody made."""
    export = RankExport.create(group, 1, 3, INFO, FINGERPRINTS)
    with pytest.raises(SegmentRefused, match="found incarnation 3, needed incarnation 4"):
        RankExport.open(group, 1, 4)
    export.segment.unlink()
    for text in (msgspec.json.encode(msgspec.structs.replace(INFO, shape=(2, 3, 5))), b"[]"):
        segment = Segment.create(segment_name(group, "export.1"), LAYOUT, 192, text=text, incarnation=3).publish()
        with pytest.raises(SegmentRefused):
            RankExport.open(group, 1, 3)
        segment.unlink()
    with pytest.raises(SegmentMissing):
        RankExport.open(make_group("none"), 1, 3)

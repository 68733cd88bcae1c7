"""From the load tensor into the ring."""

import pytest
import torch

from eplb_async.core.errors import SpecError
from eplb_async.core.load import LoadKind, Phase
from eplb_async.core.spec import MoESpec
from eplb_async.rank.recorder import Recorder, check_load
from eplb_async.shm.ring import PHASES, LoadRing

SPEC = MoESpec(num_layers=2, num_experts=4, num_ranks=2, num_redundant=2)


@pytest.mark.parametrize(
    ("load", "text"),
    [
        (torch.zeros(2, 4), "torch.float32"),
        (torch.zeros(2, 4, dtype=torch.int64), "torch.int64"),
        (torch.zeros(4, 2, dtype=torch.int32).T, r"strides \[1, 2\]"),
        (torch.zeros(2, 5, dtype=torch.int32), r"logical \[2, 4\], global_slots \[2, 6\], local_slots \[2, 3\]"),
        (torch.zeros(1, 4, dtype=torch.int32), r"shape \[1, 4\]"),
        (torch.zeros(2, 4, dtype=torch.int32, device="meta"), "on meta"),
    ],
)
def test_a_load_tensor_that_does_not_fit_is_refused(load: torch.Tensor, text: str) -> None:
    """Type, layout, shape and device are checked before anything is shared."""
    with pytest.raises(SpecError, match=text):
        check_load(load, SPEC, None)


def test_the_shape_tells_what_is_counted() -> None:
    """Experts, slots of all ranks, own slots."""
    kinds = [check_load(torch.zeros(2, width, dtype=torch.int32), SPEC, None) for width in (4, 6, 3)]
    assert kinds == [LoadKind.LOGICAL, LoadKind.GLOBAL_SLOTS, LoadKind.LOCAL_SLOTS]


def test_records_hold_what_was_counted(group: str) -> None:
    """Counts of traffic, zeros for dummy steps and failed forwards; the tensor is zeroed each time."""
    load = torch.zeros(2, 4, dtype=torch.int32)
    ring = LoadRing.create(Recorder.ring_info(group, 0, load, LoadKind.LOGICAL, 8), incarnation=1)
    recorder = Recorder(load, ring)
    load += 3
    recorder.record(0, Phase.DECODE, 11, 5, 900, 64)
    assert not load.any()
    load += 4
    recorder.record(1, Phase.DUMMY, 12, 0)
    load += 5
    recorder.discard(2, 13)
    assert not load.any()
    batch = ring.read()
    assert batch.counts.sum(axis=(1, 2)).tolist() == [24, 0, 0]
    assert batch.version.tolist() == [11, 12, 13]
    assert batch.previous_us.tolist() == [900, 0, 0]
    assert batch.pulled.tolist() == [64, 0, 0]
    assert [PHASES[phase] for phase in batch.phase] == [Phase.DECODE, Phase.DUMMY, Phase.DUMMY]
    ring.segment.unlink()
    ring.close()

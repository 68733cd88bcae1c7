"""Which tensors can be served, and by what."""

import pytest
import torch

from eplb_async.core.errors import SpecError
from eplb_async.core.spec import MoESpec
from eplb_async.rank.platform import HostPlatform, choose_platform
from eplb_async.rank.transfer.shm import share_weights
from eplb_async.rank.weights import WeightRows

SPEC = MoESpec(num_layers=1, num_experts=2, num_ranks=1)


def test_shared_weights_are_moved_through_shared_memory(group: str) -> None:
    """The reference backend."""
    weights = share_weights(group, 0, [torch.zeros(2, 4)])
    rows = WeightRows(weights, SPEC)
    platform = choose_platform(rows, torch.zeros(1, 2, dtype=torch.int32))
    assert not platform.capturing()
    transfer = platform.transfer(weights, rows, 2, "stream")
    assert transfer.name == "shm"
    assert transfer.staging.num_rows == 2
    transfer.close()
    weights.close()


def test_weights_that_others_cannot_reach_are_refused() -> None:
    """The message says what to do."""
    weights = [torch.zeros(2, 4)]
    with pytest.raises(SpecError, match="share_weights"):
        HostPlatform().transfer(weights, WeightRows(weights, SPEC), 2, "stream")


@pytest.mark.parametrize(
    ("weights", "load", "text"),
    [
        ("meta", "meta", "weights on meta cannot be moved"),
        ("cpu", "meta", "the load tensor is on meta, the weights on cpu"),
    ],
)
def test_devices_are_checked(weights: str, load: str, text: str) -> None:
    """One device for all, and one that can be served."""
    rows = WeightRows([torch.zeros(2, 4, device=weights)], SPEC)
    with pytest.raises(SpecError, match=text):
        choose_platform(rows, torch.zeros(1, 2, dtype=torch.int32, device=load))

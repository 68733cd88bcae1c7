"""Which weights can be moved, and by what."""

import pytest
import torch

from eplb_async.core.errors import SpecError
from eplb_async.core.spec import MoESpec
from eplb_async.rank.transfer.registry import open_transfer
from eplb_async.rank.transfer.shm import share_weights
from eplb_async.rank.weights import WeightRows

SPEC = MoESpec(num_layers=1, num_experts=2, num_ranks=1)


def test_shared_weights_are_moved_through_shared_memory(group: str) -> None:
    """The reference backend."""
    weights = share_weights(group, 0, [torch.zeros(2, 4)])
    transfer = open_transfer(weights, WeightRows(weights, SPEC), 2, "stream")
    assert transfer.name == "shm"
    assert transfer.staging.num_rows == 2
    transfer.close()
    weights.close()


@pytest.mark.parametrize(("device", "text"), [("cpu", "share_weights"), ("meta", "weights on meta cannot be moved")])
def test_other_weights_are_refused(device: str, text: str) -> None:
    """The message says what to do, or that this version cannot."""
    weights = [torch.zeros(2, 4, device=device)]
    with pytest.raises(SpecError, match=text):
        open_transfer(weights, WeightRows(weights, SPEC), 2, "stream")

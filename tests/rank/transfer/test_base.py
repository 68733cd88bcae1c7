"""Staging rows: each fits a slot of any layer, and no two parts overlap."""

import torch

from eplb_async.core.spec import MoESpec
from eplb_async.rank.transfer.base import ALIGNMENT, StagingRows
from eplb_async.rank.weights import LayerTensors, WeightRows

SPEC = MoESpec(num_layers=2, num_experts=2, num_ranks=1)


def test_rows_hold_the_parts_of_any_layer() -> None:
    """Parts have the sizes of the layer's tensors and are aligned; a row is as long as the longest layer needs."""
    layers: list[LayerTensors] = [[torch.zeros(2, 3), torch.zeros(2, 70, dtype=torch.int8)], torch.zeros(2, 100)]
    weights = WeightRows(layers, SPEC)
    staging = StagingRows(weights, 3)
    assert staging.num_bytes == 3 * 448
    for layer, tensors in enumerate(weights.rows):
        parts = staging.tensors(layer, 1)
        assert [part.numel() for part in parts] == [tensor.shape[1] for tensor in tensors]
        assert all(part.data_ptr() % ALIGNMENT == 0 for part in parts)


def test_parts_do_not_overlap() -> None:
    """Writing one part of one row changes no other."""
    weights = WeightRows([[torch.zeros(2, 3), torch.zeros(2, 5)]] * 2, SPEC)
    staging = StagingRows(weights, 2)
    parts = [part for row in range(2) for part in staging.tensors(0, row)]
    for number, part in enumerate(parts):
        part.fill_(number)
    assert [set(part.tolist()) for part in parts] == [{number} for number in range(4)]

"""Weights as rows of bytes, and everything that is not such."""

import pytest
import torch

from eplb_async.core.errors import SpecError
from eplb_async.core.spec import MoESpec
from eplb_async.rank.weights import WeightRows, named_tensors

SPEC = MoESpec(num_layers=1, num_experts=4, num_ranks=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.bool])
def test_rows_are_views_of_the_engines_memory(dtype: torch.dtype) -> None:
    """Any dtype and shape: what is written through the rows is what the engine computes with."""
    tensor = torch.zeros(2, 3, 5, dtype=torch.uint8).to(dtype)
    rows = WeightRows([tensor], SPEC)
    (found,) = rows.rows[0]
    assert found.shape == (2, 15 * tensor.element_size())
    found[1] = 1
    assert tensor.view(torch.uint8)[1].all()
    assert not tensor.view(torch.uint8)[0].any()
    assert rows.slot_bytes == [15 * tensor.element_size()]


def test_padded_rows_are_fine() -> None:
    """Rows must be contiguous in themselves; between them there may be other memory."""
    memory = torch.zeros(2, 8, dtype=torch.int16)
    (found,) = WeightRows([memory[:, :5]], SPEC).rows[0]
    found[:] = 255
    assert memory.tolist() == [[-1] * 5 + [0] * 3] * 2


def test_one_number_per_slot_is_a_row() -> None:
    """Scales and biases of shape [S]."""
    rows = WeightRows([{"w": torch.zeros(2, 4), "scale": torch.ones(2)}], SPEC)
    assert [tensor.shape for tensor in rows.rows[0]] == [(2, 16), (2, 4)]
    assert rows.slot_bytes == [20]


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([], "weights of 0 layers were given; the spec has 1"),
        ([{}], "layer 0 has no tensors"),
        ([torch.zeros(3, 4)], "the first dimension must be S = 2"),
        ([torch.tensor(1.0)], "the first dimension must be S = 2"),
        ([torch.zeros(2, 0)], "it is empty"),
        ([{"w": torch.zeros(2, 4, 3).transpose(1, 2)}], "layer 0 tensor 'w' .* rows are not contiguous"),
        ([torch.zeros(1, 4).expand(2, 4)], "rows overlap"),
        ([[torch.zeros(2, 4), torch.zeros(2, 4, device="meta")]], "lie on cpu, meta"),
    ],
)
def test_what_is_no_rows_is_refused(weights: list[torch.Tensor], text: str) -> None:
    """The message names layer, tensor, and what was needed."""
    with pytest.raises(SpecError, match=text):
        WeightRows(weights, SPEC)


def test_the_digest_tells_names_types_and_shapes() -> None:
    """Not contents: ranks hold different experts."""
    base = {"w": torch.zeros(2, 4)}
    same = WeightRows([{"w": torch.ones(2, 4)}], SPEC).digest
    others = [{"v": torch.zeros(2, 4)}, {"w": torch.zeros(2, 2, 2)}, {"w": torch.zeros(2, 4, dtype=torch.int32)}]
    assert WeightRows([base], SPEC).digest == same
    assert same not in {WeightRows([other], SPEC).digest for other in others}


def test_layers_may_come_as_tensor_list_or_dict() -> None:
    """Names are made up where there are none."""
    tensor = torch.zeros(2, 4)
    assert list(named_tensors(tensor)) == ["0"]
    assert list(named_tensors([tensor, tensor])) == ["0", "1"]
    assert list(named_tensors({"up": tensor})) == ["up"]

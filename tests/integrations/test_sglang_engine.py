"""Reading SGLang's counts and model, without SGLang."""

from types import SimpleNamespace

import pytest
import torch

from eplb_async.core.errors import EngineDeclined
from eplb_async.integrations.sglang_engine import Counts, SglangModel, expert_weights


@pytest.mark.parametrize(("layer_ids", "shared"), [([2, 3], True), ([1, 3], False), ([1, 2], False)])
def test_counts_are_shared_where_they_can_be(layer_ids: list[int], shared: bool) -> None:
    """Rows of consecutive layers that begin at a multiple of 16 bytes are read in place; others are put together, and cleared."""
    data = torch.arange(4 * 6, dtype=torch.int32).reshape(4, 6)
    wanted = data[layer_ids].clone()
    counts = Counts(data, layer_ids)
    counts.gather()
    assert torch.equal(counts.load, wanted)
    assert (counts.load.data_ptr() == data[layer_ids[0]].data_ptr()) == shared
    assert bool(data.any()) == shared


def test_weights_are_those_that_sglang_moves() -> None:
    """Per MoE layer, in the order of their numbers."""
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    model = SimpleNamespace(routed_experts_weights_of_layer={3: [c], 1: [a, b]})
    assert expert_weights(model, [1, 3]) == [[a, b], [c]]


def test_what_is_not_there_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attribute that SGLang has lost is a reason to decline, and no exception of another kind: other ranks wait for an answer."""
    location = SimpleNamespace(get_global_expert_location_metadata=lambda: SimpleNamespace(num_layers=2))
    monkeypatch.setattr("eplb_async.integrations.sglang_engine.import_module", lambda name: location)
    with pytest.raises(EngineDeclined, match=r"AttributeError: .* no attribute 'routed_experts_weights_of_layer'"):
        SglangModel.read(SimpleNamespace(), None)

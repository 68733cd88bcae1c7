"""The router's tensors: consistent with the placement, rewritten in place, and a snapshot for other threads."""

import numpy as np
import torch

from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.rank.maps import Maps
from eplb_async.rank.plan_reader import PreparedEntry

SPEC = MoESpec(num_layers=2, num_experts=2, num_ranks=2, num_redundant=2, table_length=2)


def entry() -> PreparedEntry:
    """Layer 1 becomes [1, 0, -1, 1]."""
    row_P = np.array([1, 0, -1, 1], dtype=np.int32)
    table_EK, count_E = torch.tensor([[1, -1], [0, 3]]), torch.tensor([1, 2])
    row = torch.from_numpy(row_P.astype(np.int64))
    return PreparedEntry(1, 1, 0, row_P, row, table_EK, count_E, ())


def test_maps_start_with_the_placement() -> None:
    """The placement, and the dispatch table of an even split."""
    maps = Maps(initial_placement(SPEC), SPEC, torch.device("cpu"))
    assert maps.slot_to_expert_LP.tolist() == [[0, 1, 0, 1]] * 2
    assert maps.dispatch_table_LEK.tolist() == [[[0, 2], [1, 3]]] * 2
    assert maps.dispatch_count_LE.tolist() == [[2, 2]] * 2
    assert maps.slot_to_expert_LP.dtype == maps.dispatch_table_LEK.dtype == torch.int64


def test_a_commit_rewrites_one_layer_in_place() -> None:
    """I8: the other layers, addresses and shapes stay."""
    maps = Maps(initial_placement(SPEC), SPEC, torch.device("cpu"))
    tensors = maps.slot_to_expert_LP, maps.dispatch_table_LEK, maps.dispatch_count_LE
    before = [tensor.data_ptr() for tensor in tensors]
    maps.commit(entry(), 77)
    assert [tensor.data_ptr() for tensor in tensors] == before
    assert [tensor.tolist() for tensor in tensors] == [
        [[0, 1, 0, 1], [1, 0, -1, 1]],
        [[[0, 2], [1, 3]], [[1, -1], [0, 3]]],
        [[2, 2], [1, 2]],
    ]
    assert maps.version_L == [0, 77]


def test_a_snapshot_is_one_object_until_the_next_commit() -> None:
    """Plans are checked beside the steps: whether the placement is still the same is told by the snapshot's identity."""
    maps = Maps(initial_placement(SPEC), SPEC, torch.device("cpu"))
    first = maps.snapshot
    assert maps.snapshot is first
    maps.commit(entry(), 77)
    assert first.rows_LP.tolist() == [[0, 1, 0, 1]] * 2
    assert first.versions == (0, 0)
    assert maps.snapshot is not first
    assert maps.snapshot.rows_LP[1].tolist() == [1, 0, -1, 1]
    assert maps.snapshot.versions == (0, 77)

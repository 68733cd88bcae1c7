"""Fingerprints by expert, from the slots of all ranks."""

import numpy as np
import pytest

from eplb_async.core.errors import SpecError
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.rank.fingerprint import fingerprint
from eplb_async.rank.platform import HostPlatform
from eplb_async.rank.verification import ExpertFingerprints
from eplb_async.rank.weights import WeightRows
from tests.rank.harness import make_weights

SPEC = MoESpec(num_layers=2, num_experts=4, num_ranks=2, num_redundant=2)


def slots(
    placement_LP: np.ndarray[tuple[int, int], np.dtype[np.int32]],
) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    """Fingerprints of the slots of both ranks, [L, P, tensors]."""
    ranks = [WeightRows(make_weights(SPEC, placement_LP, rank), SPEC) for rank in range(2)]
    return np.concatenate(
        [HostPlatform().fingerprints(rows, placement_LP, rank) for rank, rows in enumerate(ranks)], axis=1
    )


def test_every_tensor_of_every_slot_has_one() -> None:
    """Per slot and tensor; replicas have the same, an empty slot has zeros."""
    placement_LP = initial_placement(SPEC)
    placement_LP[0, 5] = -1
    found = slots(placement_LP)
    rows = WeightRows(make_weights(SPEC, placement_LP, 0), SPEC).rows
    assert found.shape == (2, 6, 4)
    assert found[1, 2].tolist() == [fingerprint(tensor[2]) for tensor in rows[1]]
    assert (found[1, 0] == found[1, 4]).all()
    assert not found[0, 5].any()


def test_they_are_looked_up_by_expert() -> None:
    """Wherever the expert lies, at attach and later."""
    placement_LP = initial_placement(SPEC)[:, ::-1].copy()
    found = slots(placement_LP)
    experts = ExpertFingerprints(found, placement_LP, SPEC)
    for slot, expert in enumerate(placement_LP[1].tolist()):
        assert tuple(experts.of(1, expert)) == tuple(found[1, slot])


def test_different_replicas_are_refused() -> None:
    """Layer, expert and both slots are named."""
    found = slots(initial_placement(SPEC))
    found[1, 4, 2] += 1
    with pytest.raises(SpecError, match="layer 1: slots 0 and 4 should both hold expert 0"):
        ExpertFingerprints(found, initial_placement(SPEC), SPEC)

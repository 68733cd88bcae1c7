"""The `random` policy: valid, seeded, different from plan to plan."""

import numpy as np
import pytest

from eplb_async.core.errors import PolicyError
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.policies.registry import run_policy
from eplb_async.testing import check_policy

SPEC = MoESpec(num_layers=3, num_experts=32, num_redundant=8, num_ranks=8)
WINDOWS = np.ones((1, 3, 32))


def test_keeps_the_contract() -> None:
    """The contract suite passes, for two seeds."""
    for seed in (0, 7):
        assert check_policy("random", {"seed": seed}) > 200


def test_seed_and_state_decide() -> None:
    """Seed and state give the placement: successive plans and layers differ, a repeated one does not."""
    live = initial_placement(SPEC)
    first, state = run_policy("random", WINDOWS, live, SPEC, {})
    second, _ = run_policy("random", WINDOWS, live, SPEC, {}, state)
    other, _ = run_policy("random", WINDOWS, live, SPEC, {"seed": 1})
    assert (first != second).any()
    assert (first != other).any()
    assert (first[0] != first[1]).any()
    np.testing.assert_array_equal(run_policy("random", WINDOWS, live, SPEC, {})[0], first)
    np.testing.assert_array_equal(run_policy("random", WINDOWS, live, SPEC, {}, state)[0], second)


def test_every_expert_can_be_replicated_anywhere() -> None:
    """Over many draws each expert gets spare slots, and each meets every rank."""
    spec = MoESpec(num_layers=200, num_experts=6, num_redundant=2, num_ranks=4)
    placement, _ = run_policy("random", np.ones((1, 200, 6)), initial_placement(spec), spec, {})
    for expert in range(6):
        assert (placement == expert).sum(axis=0).min() > 0
        assert ((placement == expert).sum(axis=1) > 1).any()


def test_foreign_state_is_refused() -> None:
    """State that is not its own is an error, not a silent restart of the sequence."""
    with pytest.raises(PolicyError, match="raised"):
        run_policy("random", WINDOWS, initial_placement(SPEC), SPEC, {}, b"\xff\xff")

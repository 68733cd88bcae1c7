"""The contract suite passes good policies and names the rule that a bad one breaks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from eplb_async.core.errors import UnknownName
from eplb_async.core.placement import initial_placement, validate_placement
from eplb_async.core.spec import MoESpec
from eplb_async.policies.base import Policy
from eplb_async.policies.default import DefaultOptions, default
from eplb_async.testing import ContractBroken, check_policy, contract_specs, ranks_with_duplicates


class NoOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """None."""


def policy_of(function: Callable[..., Any], **changes: Any) -> Policy:
    """A policy around a function."""
    policy = Policy(name="tested", function=function, options_type=NoOptions, summary="of a test")
    return replace(policy, **changes)


def sound(windows: Any, live: Any, topology: Any, _options: Any, state: bytes) -> Any:
    """What `default` plans."""
    return default(windows, live, topology, DefaultOptions(), state)


def changes_loads(windows: Any, live: Any, topology: Any, options: Any, state: bytes) -> Any:
    """Writes to its loads where it can."""
    result = sound(windows, live, topology, options, state)
    if windows.flags.writeable:
        windows[:] = 1
    return result


def returns_input(_windows: Any, live: Any, *_: Any) -> Any:
    """Gives back the array it was given."""
    return live, b""


def hidden_state() -> Callable[..., Any]:
    """Plans otherwise every fifth time."""
    calls = 0

    def function(windows: Any, live: Any, topology: Any, options: Any, state: bytes) -> Any:
        nonlocal calls
        calls += 1
        placement, _ = sound(windows, live, topology, options, state)
        return (placement[:, ::-1].copy() if calls % 5 == 0 else placement), b""

    return function


def stacks_replicas(windows: Any, live: Any, *_: Any) -> Any:
    """Experts in ascending order, replicas side by side."""
    experts, slots = windows.shape[2], live.shape[1]
    return np.tile(np.sort(np.arange(slots) % experts), (len(live), 1)), b""


def forgets_an_expert(windows: Any, live: Any, *_: Any) -> Any:
    """Puts expert 0 everywhere."""
    return np.zeros_like(live), b""


def needs_state(windows: Any, live: Any, topology: Any, options: Any, state: bytes) -> Any:
    """Cannot read its own state."""
    if state:
        raise ValueError("what is this?")
    return sound(windows, live, topology, options, state)[0], b"state"


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (changes_loads, "it changed its input arrays"),
        (returns_input, "it returned one of its input arrays"),
        (hidden_state(), "the same input gave two different results|hidden state|another result"),
        (stacks_replicas, "holds an expert twice, which can be avoided"),
        (forgets_an_expert, "no slot for expert 1"),
        (needs_state, "raised ValueError: what is this"),
    ],
)
def test_broken_rules_are_named(function: Callable[..., Any], rule: str) -> None:
    """Each kind of bad policy fails with its own message, and that names the input."""
    with pytest.raises(ContractBroken, match=rf"policy 'tested': .*({rule}).*\(load '.*MoESpec\("):
        check_policy(policy_of(function))


def test_a_sound_policy_passes() -> None:
    """An unregistered Policy can be checked; the number of inputs is that of specs, loads and live placements."""
    assert check_policy(policy_of(sound)) == len(contract_specs()) * 8 * 2
    spec = MoESpec(num_layers=1, num_experts=4, num_ranks=2)
    assert check_policy(policy_of(sound), specs=[spec]) == 8 * 2


def test_sharing_a_rank_may_be_allowed() -> None:
    """A policy whose placement is given from outside is not blamed for it."""
    spec = MoESpec(num_layers=1, num_experts=4, num_redundant=4, num_ranks=2)
    assert check_policy(policy_of(stacks_replicas), specs=[spec], may_share_ranks=True) == 16


def test_a_wrong_description_is_named() -> None:
    """Summary of one line, options with defaults."""

    class Needy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        seed: int

    with pytest.raises(ContractBroken, match="its summary must be one line"):
        check_policy(policy_of(sound, summary="two\nlines"))
    with pytest.raises(ContractBroken, match="its options need defaults"):
        check_policy(policy_of(sound, options_type=Needy))
    with pytest.raises(UnknownName):
        check_policy("nobody")


def test_specs_cover_the_corners() -> None:
    """One rank, no redundancy, one layer, one expert, K below R, nodes and groups, ranks with room for all experts."""
    specs = contract_specs()
    assert any(spec.num_ranks == 1 for spec in specs)
    assert any(spec.num_redundant == 0 for spec in specs)
    assert any(spec.num_layers == 1 for spec in specs)
    assert any(spec.num_experts == 1 for spec in specs)
    assert any(0 < spec.table_length < spec.num_ranks for spec in specs)
    assert any(spec.num_nodes > 1 and spec.num_expert_groups % spec.num_nodes == 0 for spec in specs)
    assert any(spec.num_nodes > 1 and spec.num_expert_groups % spec.num_nodes for spec in specs)
    assert any(spec.slots_per_rank > spec.num_experts for spec in specs)
    for spec in specs:
        validate_placement(initial_placement(spec), spec)


def test_ranks_with_duplicates() -> None:
    """Repeats on a rank count, except those that a rank with more slots than experts cannot avoid."""
    spec = MoESpec(num_layers=1, num_experts=4, num_redundant=2, num_ranks=2)
    assert ranks_with_duplicates(np.array([[0, 0, 0, 1, 2, 3]], dtype=np.int32), spec).tolist() == [[2, 0]]
    roomy = MoESpec(num_layers=1, num_experts=2, num_redundant=4, num_ranks=2)
    assert ranks_with_duplicates(np.array([[0, 0, 0, 1, 1, 0]], dtype=np.int32), roomy).tolist() == [[1, 0]]

"""The contract suite for policies: call `check_policy` in the tests of your own policy.

    from eplb_async.testing import check_policy

    def test_my_policy_keeps_the_contract() -> None:
        check_policy("my-policy")

It needs no test framework. Every shape, load and live placement it tries follows from a fixed seed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.errors import EplbError
from eplb_async.core.placement import EMPTY, initial_placement, replica_count
from eplb_async.core.spec import MoESpec
from eplb_async.policies.base import Policy
from eplb_async.policies.registry import decode_options, load_policy, run_loaded

__all__ = ["ContractBroken", "check_policy", "contract_specs", "ranks_with_duplicates"]

Options = Mapping[str, object] | Callable[[MoESpec], Mapping[str, object]]


class ContractBroken(AssertionError):
    """A policy broke its contract; the message says which rule, and for which input."""


@dataclass(frozen=True)
class _Case:
    """One input: what the messages call it, and the arrays."""

    policy: Policy
    spec: MoESpec
    options: Mapping[str, object]
    load: str
    windows_TLE: NDArray[np.float64]

    def broken(self, rule: str) -> ContractBroken:
        return ContractBroken(
            f"policy {self.policy.name!r}: {rule} (load {self.load!r}, {self.windows_TLE.shape[0]} windows, {self.spec})"
        )


def check_policy(
    policy: Policy | str,
    options: Options | None = None,
    *,
    specs: Sequence[MoESpec] | None = None,
    may_share_ranks: bool = False,
    seed: int = 0,
) -> int:
    """Check a policy against the contract of `eplb_async.policies.base` with many shapes, loads and live placements.

    Rules: it plans every valid spec; the placement is valid (each expert in 1..K slots); the same input gives the same
    placement and state, whatever was planned in between; inputs are neither changed nor needed writable; the state is
    bytes that a later call accepts, and may be lost; no rank holds an expert twice unless it has more slots than there
    are experts.

    Args:
        policy: a Policy, or the name of a registered one.
        options: the options to plan with, or a function that makes them for a spec (a file of the right shape, say).
        specs: the shapes to try; `contract_specs()` by default.
        may_share_ranks: leave out the last rule (for a policy whose placement is given from outside).
        seed: of the loads.

    Returns:
        The number of inputs tried: spec, load, and live placement to start from.

    Raises:
        ContractBroken: with the rule and the input.
        UnknownName, PolicyError: the policy could not be loaded.
    """
    loaded = load_policy(policy) if isinstance(policy, str) else policy
    _check_description(loaded)
    loaded.warm_up()
    num_inputs = 0
    for spec in contract_specs() if specs is None else specs:
        spec_options = options(spec) if callable(options) else (options or {})
        for load, windows_TLE in _loads(spec, np.random.default_rng(seed)):
            case = _Case(loaded, spec, spec_options, load, windows_TLE)
            num_inputs += _check_sequence(case, may_share_ranks)
    return num_inputs


def contract_specs() -> list[MoESpec]:
    """Small models that between them have every shape a policy must plan."""
    shapes: list[dict[str, int]] = [
        {"num_experts": 8, "num_redundant": 4, "num_ranks": 4},
        {"num_experts": 8, "num_redundant": 0, "num_ranks": 4},
        {"num_experts": 8, "num_redundant": 3, "num_ranks": 1},
        {"num_experts": 5, "num_redundant": 0, "num_ranks": 1},
        {"num_experts": 1, "num_redundant": 3, "num_ranks": 2},
        {"num_experts": 2, "num_redundant": 6, "num_ranks": 2},
        {"num_experts": 2, "num_redundant": 4, "num_ranks": 2, "table_length": 3},
        {"num_experts": 6, "num_redundant": 2, "num_ranks": 8},
        {"num_experts": 7, "num_redundant": 2, "num_ranks": 3},
        {"num_experts": 16, "num_redundant": 8, "num_ranks": 6, "table_length": 2},
        {"num_experts": 6, "num_redundant": 6, "num_ranks": 6, "table_length": 2},
        {"num_experts": 16, "num_redundant": 8, "num_ranks": 8, "num_nodes": 2, "num_expert_groups": 4},
        {
            "num_experts": 16,
            "num_redundant": 8,
            "num_ranks": 8,
            "num_nodes": 4,
            "num_expert_groups": 4,
            "table_length": 2,
        },
        {"num_experts": 12, "num_redundant": 4, "num_ranks": 4, "num_nodes": 2, "num_expert_groups": 3},
        {"num_experts": 8, "num_redundant": 4, "num_ranks": 4, "num_nodes": 4, "num_expert_groups": 4},
        {"num_experts": 10, "num_redundant": 2, "num_ranks": 4, "num_nodes": 2},
        {"num_experts": 64, "num_redundant": 16, "num_ranks": 16},
    ]
    return [MoESpec(num_layers=1 + index % 3, **shape) for index, shape in enumerate(shapes)]


def ranks_with_duplicates(slot_to_expert_LP: NDArray[np.int32], spec: MoESpec) -> NDArray[np.int64]:
    """Slots per rank that repeat an expert of the same rank beyond what must be: S - E where that is positive.

    Returns:
        int64 [L, R], 0 where nothing could be better.
    """
    num_layers, ranks, per_rank = len(slot_to_expert_LP), spec.num_ranks, spec.slots_per_rank
    rows = slot_to_expert_LP.reshape(num_layers * ranks, per_rank)
    repeated = np.maximum(replica_count(rows, spec.num_experts) - 1, 0).sum(axis=1)
    avoidable = np.maximum(repeated - max(per_rank - spec.num_experts, 0), 0)
    return np.asarray(avoidable, dtype=np.int64).reshape(num_layers, ranks)


def _check_description(policy: Policy) -> None:
    if not policy.summary or "\n" in policy.summary:
        raise ContractBroken(f"policy {policy.name!r}: its summary must be one line, not {policy.summary!r}")
    try:
        decode_options(policy, {})
    except EplbError as error:
        raise ContractBroken(f"policy {policy.name!r}: its options need defaults: {error}") from error


def _check_sequence(case: _Case, may_share_ranks: bool) -> int:
    """Three plans, each from the placement and state of the one before, and the first one again at the end."""
    starts = [initial_placement(case.spec), _with_empty_slots(case.spec)]
    for live_LP in starts:
        first = placement_LP, state = _check_plan(case, live_LP, b"", may_share_ranks)
        for _ in range(2):
            placement_LP, state = _check_plan(case, placement_LP, state, may_share_ranks)
        again = _run(case, live_LP, b"")
        if not np.array_equal(first[0], again[0]) or first[1] != again[1]:
            raise case.broken("other plans in between changed the result: it keeps hidden state")
    return len(starts)


def _check_plan(
    case: _Case, live_LP: NDArray[np.int32], state: bytes, may_share_ranks: bool
) -> tuple[NDArray[np.int32], bytes]:
    placement_LP, next_state = _run(case, live_LP, state)
    _check_untouched(case, live_LP, state, placement_LP)
    again_LP, again_state = _run(case, live_LP, state)
    if not np.array_equal(placement_LP, again_LP) or next_state != again_state:
        raise case.broken("the same input gave two different results")
    if not may_share_ranks:
        duplicates_LR = ranks_with_duplicates(placement_LP, case.spec)
        if duplicates_LR.any():
            layer, rank = np.argwhere(duplicates_LR)[0]
            raise case.broken(f"rank {rank} of layer {layer} holds an expert twice, which can be avoided")
    return placement_LP, next_state


def _run(case: _Case, live_LP: NDArray[np.int32], state: bytes) -> tuple[NDArray[np.int32], bytes]:
    try:
        return run_loaded(case.policy, case.windows_TLE, live_LP, case.spec, case.options, state)
    except EplbError as error:
        raise case.broken(f"it did not plan: {error}") from error


def _check_untouched(case: _Case, live_LP: NDArray[np.int32], state: bytes, expected_LP: NDArray[np.int32]) -> None:
    """Writable inputs come back as they were, and being writable changes nothing."""
    settings: Any = decode_options(case.policy, case.options)
    if case.policy.prepare_options is not None:
        settings = case.policy.prepare_options(settings, case.spec)
    windows_TLE, given_LP = case.windows_TLE.copy(), live_LP.copy()
    result_LP, _ = case.policy.function(windows_TLE, given_LP, case.spec.topology, settings, state)
    if not np.array_equal(windows_TLE, case.windows_TLE) or not np.array_equal(given_LP, live_LP):
        raise case.broken("it changed its input arrays")
    if not np.array_equal(result_LP, expected_LP):
        raise case.broken("writable inputs gave another result than read-only ones")
    if np.shares_memory(result_LP, windows_TLE) or np.shares_memory(result_LP, given_LP):
        raise case.broken("it returned one of its input arrays; return a copy")


def _with_empty_slots(spec: MoESpec) -> NDArray[np.int32]:
    """A live placement whose redundant slots are empty, and whose experts stand in reverse order."""
    live_LP = initial_placement(spec)
    live_LP[:, spec.num_experts :] = EMPTY
    return np.ascontiguousarray(live_LP[:, ::-1])


def _loads(spec: MoESpec, random: np.random.Generator) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Windows [T, L, E] of every kind of traffic, by name."""
    shape = (1, spec.num_layers, spec.num_experts)
    yield "zero", np.zeros(shape)
    yield "uniform", np.full(shape, 7.0)
    one_hot = np.zeros(shape)
    one_hot[:, :, spec.num_experts // 2] = 1000.0
    yield "one hot expert", one_hot
    yield "ties", random.integers(0, 4, size=(2, *shape[1:])).astype(np.float64)
    yield "skewed", random.lognormal(sigma=1.5, size=(4, *shape[1:])) * 100
    yield "huge", random.lognormal(sigma=3.0, size=shape) * 1e15
    yield "tiny", random.random(size=shape) * 1e-12
    idle_layer = random.lognormal(size=shape)
    idle_layer[:, 0] = 0.0
    yield "idle first layer", idle_layer

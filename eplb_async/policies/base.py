"""What a policy is: a pure function from windows of load and the live placement to a new placement.

A policy does no I/O, reads no clock and keeps nothing between calls: what it needs to remember goes out as `state` bytes
and comes back with the next call. So it can run in any process, be killed at any moment, and be tested with arrays alone.
docs/policies.md shows how to write and register one; `eplb_async.testing.check_policy` tests one against this contract.

Shape suffixes: T windows, L MoE layers, E logical experts, P slots of all ranks, S slots per rank, R ranks, K most
replicas of one expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.spec import MoESpec, Topology

__all__ = ["Policy", "PolicyFunction", "no_warm_up"]


class PolicyFunction(Protocol):
    """The planning function itself. Called in a worker process, one call at a time; inputs are read-only copies."""

    def __call__(
        self,
        windows_TLE: NDArray[np.float64],
        slot_to_expert_LP: NDArray[np.int32],
        topology: Topology,
        options: Any,
        state: bytes,
    ) -> tuple[NDArray[np.int32], bytes]:
        """Plan every layer anew.

        Args:
            windows_TLE: tokens per window, layer and logical expert, oldest window first; T >= 1, finite, >= 0. All
                zero for a layer without traffic.
            slot_to_expert_LP: the live placement, valid, -1 for an empty slot.
            topology: R, S, nodes, expert groups, and K (`max_replicas`).
            options: the policy's `options_type`, or what its `prepare_options` made of it.
            state: what the previous call returned, b"" at first (and after a restart: it may be lost).

        Returns:
            The new placement, integers [L, P] with every expert in 1..K slots of each layer, and the next state.
            The same arguments give the same result, bit for bit.

        Raises:
            Exception: anything; the caller turns it into PolicyError and the live placement stays.
        """
        ...


def no_warm_up() -> None:
    """The `warm_up` of a policy that has nothing to compile."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy with what the registry, the CLI and the worker pool need to know of it.

    Fields:
        name: the name it is registered under.
        function: plans; pure.
        options_type: its settings: a msgspec Struct, frozen, kw_only, forbid_unknown_fields, every field documented
            and with a default. A ValueError in its `__post_init__` is reported as a wrong setting.
        summary: one line for the CLI.
        warm_up: compiles and imports whatever the first plan would wait for; called once per worker process.
        prepare_options: reads what the options only name (a file), before each plan and outside the pure function;
            its result is what `function` gets as `options`. Raises ConfigError for a setting that cannot be used.
            None: `function` gets the options as they are.
        within: the options with which a plan fills at most a share of all slots anew, and moves nothing that brings less than a
            price: (options, share, PAR that filling all slots of a layer anew has to bring, windows given). None: the policy knows no bounds; its
            plan is cut to them.
    """

    name: str
    function: PolicyFunction
    options_type: type[msgspec.Struct]
    summary: str
    warm_up: Callable[[], None] = no_warm_up
    prepare_options: Callable[[Any, MoESpec], object] | None = None
    within: Callable[[Any, float, float, int], msgspec.Struct] | None = None

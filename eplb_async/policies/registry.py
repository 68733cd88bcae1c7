"""Policies by name, loaded when first asked for, and the one way to run them.

Built-in policies are listed here; a third party adds one with an entry point of the group `eplb_async.policies` that
names a `Policy` object. A built-in name cannot be taken over. The options of a policy come together with the planning
options that all policies have (`DispatchOptions`); a policy never sees those. Neither this module nor loading a built-in policy imports
numba: that happens when a policy warms up or plans, which is in a worker process.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.errors import ConfigError, EplbError, PlacementError, PolicyError, SpecError, UnknownName
from eplb_async.core.placement import validate_placement
from eplb_async.core.spec import MoESpec
from eplb_async.policies.base import Policy
from eplb_async.policies.dispatch import DispatchOptions, FittedDispatch, fit_dispatch, split_options

__all__ = [
    "ENTRY_POINT_GROUP",
    "check_choice",
    "decode_dispatch",
    "decode_options",
    "load_policy",
    "policy_names",
    "run_dispatch",
    "run_loaded",
    "run_policy",
]

ENTRY_POINT_GROUP = "eplb_async.policies"

BUILT_IN = {
    "default": "eplb_async.policies.default",
    "frontier": "eplb_async.policies.frontier",
    "flashlb": "eplb_async.policies.flashlb",
    "random": "eplb_async.policies.random_placement",
    "static": "eplb_async.policies.static",
    "swift_balancer": "eplb_async.policies.swift_balancer",
}
"""Module of each built-in policy; its `POLICY` is the Policy."""


def policy_names() -> list[str]:
    """Names of all policies, built-in ones first. Imports none of them."""
    third_party = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)} - BUILT_IN.keys()
    return [*sorted(BUILT_IN), *sorted(third_party)]


def load_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        UnknownName: nobody registered it.
        PolicyError: a third party's entry point cannot be imported, is no Policy, or is registered twice.
    """
    if name in BUILT_IN:
        built_in: Policy = import_module(BUILT_IN[name]).POLICY
        return built_in
    points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name]
    if not points:
        raise UnknownName("policy", name, policy_names())
    if len({point.value for point in points}) > 1:
        where = " and ".join(_origin(point) for point in points)
        raise PolicyError(name, f"is registered twice, by {where}; uninstall one")
    return _load_third_party(points[0])


def decode_options(policy: Policy, options: Mapping[str, object]) -> msgspec.Struct:
    """A policy's options as its own type, decoded strictly; those that all policies have are checked and left out.

    Raises:
        ConfigError: an unknown field, or a value of a wrong type or range; the message names the field.
    """
    decode_dispatch(policy.name, options)
    _, own = split_options(options)
    try:
        return msgspec.convert(own, policy.options_type)
    except msgspec.ValidationError as error:
        known = ", ".join(field.name for field in msgspec.structs.fields(policy.options_type)) or "none"
        common = ", ".join(DispatchOptions.__struct_fields__)
        raise ConfigError(
            f"options of policy {policy.name!r}", f"{error} (its options: {known}; of every policy: {common})"
        ) from error


def decode_dispatch(name: str, options: Mapping[str, object]) -> DispatchOptions:
    """The options that all policies have, taken out of the options of the policy of that name.

    Raises:
        ConfigError: a value of a wrong type or range; the message names the field.
    """
    common, _ = split_options(options)
    try:
        return msgspec.convert(common, DispatchOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"options of policy {name!r}", f'{error} (dispatch is "even" or "weighted", dispatch_strength from 0 to 1)'
        ) from error


def check_choice(name: str, options: Mapping[str, object]) -> None:
    """Refuse an unknown policy, and bad options of a built-in one, without importing what third parties wrote.

    Raises:
        UnknownName: nobody registered it; lists the known ones.
        ConfigError: an option of a built-in policy is unknown or bad, or one that all policies have is bad.
    """
    if name not in (known := policy_names()):
        raise UnknownName("policy", name, known)
    decode_dispatch(name, options)
    if name in BUILT_IN:
        decode_options(load_policy(name), options)


def run_policy(
    name: str,
    windows_TLE: NDArray[np.generic],
    slot_to_expert_LP: NDArray[np.int32],
    spec: MoESpec,
    options: Mapping[str, object],
    state: bytes = b"",  # size: bounds belong to a call, not to its settings
    bounds: tuple[float, float] | None = None,
) -> tuple[NDArray[np.int32], bytes]:
    """Plan with a policy: check what goes in, run it on read-only copies, check what comes out.

    Args:
        name: of the policy.
        windows_TLE: tokens per window, [T, L, E], oldest first, any real dtype, finite and >= 0.
        slot_to_expert_LP: the live placement, [L, P].
        spec: the model; the policy sees its topology.
        options: the policy's options as read from settings, and those of every policy.
        state: what its last run returned, b"" at first.
        bounds: share of all slots and price that the plan should keep within; see `Policy.within`.

    Returns:
        The new placement, int32 [L, P], valid, its own memory; and the state for the next run.

    Raises:
        UnknownName, ConfigError: the name or the options are wrong.
        SpecError, PlacementError: the windows or the live placement do not fit the spec.
        PolicyError: the policy raised, or returned something that is not a valid placement and bytes.
    """
    policy = load_policy(name)
    if bounds is not None and policy.within is not None:
        common, _ = split_options(options)
        bounded = policy.within(decode_options(policy, options), *bounds, len(windows_TLE))
        options = {**common, **msgspec.structs.asdict(bounded)}
    return run_loaded(policy, windows_TLE, slot_to_expert_LP, spec, options, state)


def run_loaded(
    policy: Policy,
    windows_TLE: NDArray[np.generic],
    slot_to_expert_LP: NDArray[np.int32],
    spec: MoESpec,
    options: Mapping[str, object],
    state: bytes = b"",
) -> tuple[NDArray[np.int32], bytes]:
    """`run_policy` for a policy that is at hand, registered or not."""
    settings: Any = decode_options(policy, options)
    windows = _checked_windows(windows_TLE, spec)
    live_LP = _checked_live(slot_to_expert_LP, spec)
    try:
        if policy.prepare_options is not None:
            settings = policy.prepare_options(settings, spec)
    except EplbError:
        raise
    except Exception as error:
        raise PolicyError(policy.name, f"cannot prepare its options: {type(error).__name__}: {error}") from error
    try:
        result = policy.function(windows, live_LP, spec.topology, settings, state)
    except Exception as error:
        raise PolicyError(policy.name, f"raised {type(error).__name__}: {error}") from error
    return _checked_result(policy.name, result, spec)


def run_dispatch(
    name: str,
    windows_TLE: NDArray[np.generic],
    slot_to_expert_LP: NDArray[np.int32],
    spec: MoESpec,
    options: Mapping[str, object],
) -> FittedDispatch | None:
    """The dispatch tables that the options ask for, for a placement: a policy's, or the live one that is only refitted.

    Args:
        name: of the policy whose options these are.
        windows_TLE: as for `run_policy`.
        slot_to_expert_LP: the placement, valid, [L, P]; the tables name its slots.
        spec: the model.
        options: as for `run_policy`; its own options are not looked at.

    Returns:
        None if dispatch is even: ranks then split evenly without a table.

    Raises:
        ConfigError: the options are wrong.
        SpecError, PlacementError: the windows or the placement do not fit the spec.
    """
    chosen = decode_dispatch(name, options)
    if chosen.dispatch == "even":
        return None
    windows, rows_LP = _checked_windows(windows_TLE, spec), _checked_live(slot_to_expert_LP, spec)
    return fit_dispatch(windows, rows_LP, spec.topology, chosen.dispatch_strength)


def _checked_windows(windows_TLE: NDArray[np.generic], spec: MoESpec) -> NDArray[np.float64]:
    """A read-only float64 copy of the windows.

    Raises:
        SpecError: not [T, L, E] with T >= 1, not real numbers, negative, not finite, or so large that their sum is not.
    """
    shape = np.shape(windows_TLE)
    if len(shape) != 3 or shape[0] < 1 or shape[1:] != (spec.num_layers, spec.num_experts):
        raise SpecError(
            f"windows of shape {list(shape)} were given; needed [T, L, E] = "
            f"[at least 1, {spec.num_layers}, {spec.num_experts}]"
        )
    if np.asarray(windows_TLE).dtype.kind not in "iuf":
        raise SpecError(f"windows hold token counts, not {np.asarray(windows_TLE).dtype}")
    windows = np.array(windows_TLE, dtype=np.float64, order="C")
    wrong = ~(np.isfinite(windows) & (windows >= 0))
    if wrong.any():
        window, layer, expert = np.argwhere(wrong)[0]
        raise SpecError(
            f"window {window} has load {windows[window, layer, expert]} for layer {layer} expert {expert}; "
            "loads are finite and not negative"
        )
    with np.errstate(over="ignore"):
        if not np.isfinite(windows.sum()):
            raise SpecError("the windows' loads add up to more than a float64 holds")
    windows.setflags(write=False)
    return windows


def _checked_live(slot_to_expert_LP: NDArray[np.int32], spec: MoESpec) -> NDArray[np.int32]:
    live_LP = np.ascontiguousarray(validate_placement(slot_to_expert_LP, spec))
    if len(live_LP) != spec.num_layers:
        raise PlacementError(f"a live placement of {len(live_LP)} layers was given; the spec has {spec.num_layers}")
    live_LP.setflags(write=False)
    return live_LP


def _checked_result(name: str, result: object, spec: MoESpec) -> tuple[NDArray[np.int32], bytes]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise PolicyError(name, f"returned {type(result).__name__}; needed a tuple (placement, state)")
    placement, state = result
    if not isinstance(placement, np.ndarray) or not isinstance(state, bytes):
        raise PolicyError(
            name, f"returned ({type(placement).__name__}, {type(state).__name__}); needed a numpy array and bytes"
        )
    try:
        valid_LP = validate_placement(placement, spec)
    except PlacementError as error:
        raise PolicyError(name, f"returned an invalid placement: {error}") from error
    if len(valid_LP) != spec.num_layers:
        raise PolicyError(name, f"returned a placement of {len(valid_LP)} layers; needed {spec.num_layers}")
    return np.ascontiguousarray(valid_LP), state


def _origin(point: EntryPoint) -> str:
    distribution = point.dist.name if point.dist is not None else "an unnamed distribution"
    return f"{distribution} ({point.value})"


def _load_third_party(point: EntryPoint) -> Policy:
    """Import an entry point and check that it is a policy of that name with usable options."""
    try:
        policy = point.load()
    except Exception as error:
        raise PolicyError(
            point.name, f"of {_origin(point)} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(policy, Policy):
        raise PolicyError(point.name, f"of {_origin(point)} is a {type(policy).__name__}; needed an eplb_async Policy")
    if policy.name != point.name:
        raise PolicyError(point.name, f"of {_origin(point)} calls itself {policy.name!r}; the names must be the same")
    config = getattr(policy.options_type, "__struct_config__", None)
    if config is None or not (config.frozen and config.forbid_unknown_fields):
        raise PolicyError(
            point.name,
            f"of {_origin(point)} has options of type {policy.options_type!r}; "
            "needed a msgspec Struct with frozen=True, kw_only=True, forbid_unknown_fields=True",
        )
    if taken := [name for name in _option_names(policy) if name in DispatchOptions.__struct_fields__]:
        raise PolicyError(
            point.name, f"of {_origin(point)} has an option {taken[0]!r}, which every policy has already; rename it"
        )
    required = [field.name for field in msgspec.structs.fields(policy.options_type) if field.required]
    if required:
        raise PolicyError(point.name, f"of {_origin(point)} has options without a default: {', '.join(required)}")
    return policy


def _option_names(policy: Policy) -> list[str]:
    """The keys under which its options are read."""
    return [field.encode_name for field in msgspec.structs.fields(policy.options_type)]

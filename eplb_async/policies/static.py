"""The `static` policy: a placement from a file, whatever the load.

The file is read by `prepare_options`, before each plan, so a file that was replaced takes effect with the next plan and
the policy function itself stays pure.
"""

import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.errors import ConfigError, PlacementError
from eplb_async.core.placement import validate_placement
from eplb_async.core.spec import MoESpec, Topology
from eplb_async.policies.base import Policy

__all__ = ["DAMAGED", "POLICY", "StaticOptions", "StaticPlacement", "prepare_options", "read_placement", "static"]

DAMAGED = (ValueError, EOFError, OverflowError, RuntimeError, SyntaxError, MemoryError, tokenize.TokenError)
"""What numpy and JSON raise for an array that is cut off, tampered with, or of Python objects."""


class StaticOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `static`.

    Fields:
        path: the file; has to be set. `.json`: nested lists; `.npy`: an integer array. Either [L][P], the expert of each slot in
            each layer (-1: empty), or [P], for all layers alike.
    """

    path: str = ""


@dataclass(frozen=True)
class StaticPlacement:
    """What the policy function gets as its options: the placement of the file, int32 [L, P], valid."""

    slot_to_expert_LP: NDArray[np.int32]


def static(
    windows_TLE: NDArray[np.float64],
    slot_to_expert_LP: NDArray[np.int32],
    topology: Topology,
    options: StaticPlacement,
    state: bytes,
) -> tuple[NDArray[np.int32], bytes]:
    """The placement of the file (see `base.PolicyFunction`)."""
    return options.slot_to_expert_LP.copy(), state


def prepare_options(options: StaticOptions, spec: MoESpec) -> StaticPlacement:
    """Read the file that the options name.

    Raises:
        ConfigError: no path is set, or the file is missing or unreadable, or is not a valid placement for this spec.
    """
    if not options.path:
        raise ConfigError("options of policy 'static'", "path is not set; give a .json or .npy file with a placement")
    return StaticPlacement(read_placement(Path(options.path), spec))


def read_placement(path: Path, spec: MoESpec) -> NDArray[np.int32]:
    """A placement from a `.json` or `.npy` file of [L, P] or [P] integers.

    Returns:
        int32 [L, P].

    Raises:
        ConfigError: as for `prepare_options`; the message names the file.
    """
    if path.suffix not in _READERS:
        raise ConfigError(str(path), f"has the suffix {path.suffix!r}; a placement file is .json or .npy")
    try:
        slots = _READERS[path.suffix](path)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror or error}") from error
    except DAMAGED as error:
        raise ConfigError(str(path), f"is not a placement: {error}") from error
    if slots.ndim == 1:
        slots = np.broadcast_to(slots, (spec.num_layers, len(slots)))
    try:
        placement_LP = validate_placement(slots, spec)
    except PlacementError as error:
        raise ConfigError(str(path), f"is not a placement for this model: {error}") from error
    if len(placement_LP) != spec.num_layers:
        raise ConfigError(str(path), f"has {len(placement_LP)} layers; the model has {spec.num_layers}")
    return placement_LP


def _read_json(path: Path) -> NDArray[Any]:
    # msgspec.DecodeError and numpy's complaint about ragged lists are both ValueErrors
    return np.asarray(msgspec.json.decode(path.read_bytes()))


def _read_npy(path: Path) -> NDArray[Any]:
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError("it is an .npz archive; a single array is needed")
    return array


_READERS = {".json": _read_json, ".npy": _read_npy}

POLICY = Policy(
    name="static",
    function=static,
    options_type=StaticOptions,
    summary="the placement of a file (option path: .json or .npy), whatever the load",
    prepare_options=prepare_options,
)

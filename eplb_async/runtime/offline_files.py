"""Files of offline planning: loads and maps in, maps out. Whatever is wrong with one is a ConfigError that names it.

    loads   .npz with an array `counts`, .npy, or JSON; [E] (one layer), [L, E] (one window) or [T, L, E]. What a file
            is shows in its first bytes, so that standard input can carry all three
    map     a placement as policy `static` reads it: .json or .npy, [L][P], or [P] for all layers alike

Shape suffixes: T windows, L MoE layers, E logical experts, P slots of all ranks.
"""

import contextlib
import io
import json
import os
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.errors import ConfigError
from eplb_async.core.spec import MoESpec
from eplb_async.policies.static import DAMAGED, read_placement

__all__ = ["STANDARD_INPUT", "check_writable", "read_loads", "read_map", "write_map"]

STANDARD_INPUT = "-"
"""The name of loads that come from standard input."""

COUNTS = "counts"
"""The array of an .npz archive that has the loads."""

_NPZ, _NPY = b"PK", b"\x93NUMPY"
_LISTS: dict[int, Any] = {1: list[float], 2: list[list[float]], 3: list[list[list[float]]]}
_DAMAGED = (*DAMAGED, OSError, KeyError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for an archive or array that is cut off, tampered with, or of Python objects."""


def read_loads(source: str) -> NDArray[np.float64]:
    """Loads from a file, or from standard input if `source` is `STANDARD_INPUT`.

    JSON [[3, 1], [2, 2]] is one window of two layers with two experts: shape [1, 2, 2].

    Returns:
        float64 [T, L, E]: tokens per window, layer and expert; T, L, E >= 1, finite, >= 0.

    Raises:
        ConfigError: it cannot be read, is empty or damaged, is no array of one to three dimensions, is ragged, or has
            something else than finite numbers >= 0 in it; the message says which, and where.
    """
    where = "standard input" if source == STANDARD_INPUT else source
    content = _content(source, where)
    if not content.strip():
        raise ConfigError(where, "is empty; needed loads: JSON [E], [L][E] or [T][L][E], .npy, or .npz with 'counts'")
    if content.startswith(_NPZ):
        array = _from_npz(content, where)
    elif content.startswith(_NPY):
        array = _from_npy(content, where)
    elif where.endswith((".npz", ".npy")):
        raise ConfigError(where, f"is not an {Path(where).suffix} file, though its name says so")
    else:
        array = _from_json(content, where)
    return _checked(array, where)


def read_map(path: Path, spec: MoESpec) -> NDArray[np.int32]:
    """A placement from a map file, int32 [L, P].

    Raises:
        ConfigError: it cannot be read, or is not a valid placement for this spec; the message names the file.
    """
    try:
        return read_placement(path, spec)
    except ConfigError:
        raise
    except _DAMAGED as error:
        raise ConfigError(str(path), f"is damaged: {_reason(error)}") from error


def check_writable(path: Path) -> None:
    """Find out before a long plan that a map could not be written.

    Raises:
        ConfigError: the name has another suffix than .json or .npy, or there is no folder to write it in.
    """
    if path.suffix not in (".json", ".npy"):
        raise ConfigError(str(path), f"has the suffix {path.suffix!r}; a map is written as .json or .npy")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise ConfigError(str(path), f"cannot be written: there is no folder {folder}")
    if path.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "it is a folder" if path.is_dir() else f"folder {folder} is not writable"
        raise ConfigError(str(path), f"cannot be written: {what}")


def write_map(path: Path, slot_to_expert_LP: NDArray[np.int32]) -> None:
    """Write a placement so that a reader finds the old file or the whole new one, never a part.

    Raises:
        ConfigError: see `check_writable`; or the disk is full. The old file, if any, is as it was.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(_map_content(path.suffix, slot_to_expert_LP))
            file.flush()
            os.fsync(file.fileno())  # else a crash may leave the new name with no content
        temporary.replace(target)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _map_content(suffix: str, slot_to_expert_LP: NDArray[np.int32]) -> bytes:
    if suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, slot_to_expert_LP)
        return buffer.getvalue()
    rows = ",\n".join(json.dumps(row_P) for row_P in slot_to_expert_LP.tolist())
    return f"[\n{rows}\n]\n".encode()


def _content(source: str, where: str) -> bytes:
    try:
        if source != STANDARD_INPUT:
            return Path(source).read_bytes()
        return sys.stdin.buffer.read() if sys.stdin else b""  # None where the shell closed it
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
        raise ConfigError(where, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _from_npz(content: bytes, where: str) -> NDArray[Any]:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            if COUNTS in archive.files:
                return np.asarray(archive[COUNTS])
            names = ", ".join(archive.files) or "none"
    except _DAMAGED as error:
        raise ConfigError(where, f"is not a usable .npz archive: {_reason(error)}") from error
    raise ConfigError(where, f"has no array {COUNTS!r} [T, L, E]; its arrays: {names}")


def _from_npy(content: bytes, where: str) -> NDArray[Any]:
    try:
        return np.asarray(np.load(io.BytesIO(content), allow_pickle=False))
    except _DAMAGED as error:
        raise ConfigError(where, f"is not a usable .npy array: {_reason(error)}") from error


def _from_json(content: bytes, where: str) -> NDArray[Any]:
    def refuse(constant: str) -> NoReturn:
        raise ConfigError(where, f"holds {constant}; loads are finite and not negative")

    try:
        value = json.loads(content, parse_constant=refuse)
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(where, "is nested too deeply; needed [E], [L][E] or [T][L][E]") from error
    except ValueError as error:
        raise ConfigError(where, f"is not JSON: {_reason(error)}") from error
    depth, inner = 0, value
    while isinstance(inner, list):
        depth, inner = depth + 1, inner[0] if inner else None
    if depth not in _LISTS:
        found = f"an array of {depth} dimensions" if depth else f"a single {type(value).__name__}"
        raise ConfigError(where, f"holds {found}; needed an array of loads, [E], [L][E] or [T][L][E]")
    try:
        return np.array(msgspec.convert(value, _LISTS[depth]), dtype=np.float64)
    except msgspec.ValidationError as error:
        raise ConfigError(where, f"is not an array of loads: {error}") from error
    except ValueError as error:  # numpy's, of lists of different lengths
        raise ConfigError(where, f"is ragged: {_ragged(value, depth)}") from error


def _ragged(value: list[Any], depth: int) -> str:
    """The first list that is not as long as the first one of its depth.

    [[1, 2], [3]]: "$[1] has 1 entry, $[0] has 2".
    """
    level = [("$", value)]
    for _ in range(depth - 1):
        level = [(f"{at}[{index}]", inner) for at, outer in level for index, inner in enumerate(outer)]
        first_at, first = level[0]
        for at, inner in level:
            if len(inner) != len(first):
                return f"{at} has {len(inner)} {'entry' if len(inner) == 1 else 'entries'}, {first_at} has {len(first)}"
    return "its rows have different lengths"


def _checked(array: NDArray[Any], where: str) -> NDArray[np.float64]:
    """The array as float64 [T, L, E], if it holds loads."""
    if array.dtype.kind not in "iuf":
        raise ConfigError(where, f"holds {array.dtype}; loads are integers or floats")
    if not 1 <= array.ndim <= 3:
        raise ConfigError(where, f"has shape {list(array.shape)}; needed [E], [L, E] or [T, L, E]")
    if not array.size:
        raise ConfigError(where, f"has shape {list(array.shape)}: there are no loads in it")
    loads_TLE = np.ascontiguousarray(array, dtype=np.float64).reshape((1,) * (3 - array.ndim) + array.shape)
    wrong = ~(np.isfinite(loads_TLE) & (loads_TLE >= 0))
    if wrong.any():
        window, layer, expert = np.argwhere(wrong)[0]
        load = loads_TLE[window, layer, expert]
        raise ConfigError(
            where,
            f"has load {load:g} for window {window} layer {layer} expert {expert}; loads are finite and not negative",
        )
    with np.errstate(over="ignore"):
        if not np.isfinite(loads_TLE.sum()):
            raise ConfigError(where, "has loads that add up to more than a float64 holds")
    return loads_TLE


def _reason(error: BaseException) -> str:
    """The error's text in one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__

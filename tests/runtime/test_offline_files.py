"""Loads of every form are read alike, what is no load is refused with its place, and maps are written whole or not at all."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_async.core.errors import ConfigError
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.policies.registry import run_policy
from eplb_async.runtime.offline_files import check_writable, read_loads, read_map, write_map

__all__: list[str] = []

SPEC = MoESpec(num_layers=2, num_experts=4, num_redundant=2, num_ranks=2)
COUNTS = np.arange(16, dtype=np.int32).reshape(2, 2, 4)
NAN, INF = float("nan"), float("inf")


def npy(array: Any, **options: Any) -> bytes:
    """What np.save writes."""
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    """What np.savez writes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def as_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Let standard input hold that."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize("array", [COUNTS, COUNTS[0], COUNTS[0, 0]])
def test_every_form_and_dimension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: np.ndarray[Any, Any]) -> None:
    """[E], [L, E] and [T, L, E] as .npz, .npy and JSON, from a file or standard input, are the same float64 [T, L, E]."""
    expected = COUNTS[:1, :1] if array.ndim == 1 else COUNTS[:1] if array.ndim == 2 else COUNTS
    contents = {
        "a.npz": npz(counts=array, model="m"),
        "a.npy": npy(array),
        "a.json": json.dumps(array.tolist()).encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        as_input(monkeypatch, content)
        for loads in (read_loads(str(tmp_path / name)), read_loads("-")):
            np.testing.assert_array_equal(loads, expected)
            assert loads.dtype == np.float64
            assert loads.flags.c_contiguous


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "is empty; needed loads"),
        ("a.json", b" \n", "is empty; needed loads"),
        ("a.json", b"[1, 2", "is not JSON: "),
        ("a.json", b"\xff\xfe\xfd", "is not JSON: "),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b"7", "holds a single int; needed an array of loads"),
        ("a.json", b'{"counts": [1]}', "holds a single dict; needed"),
        ("a.json", b"[[[[1]]]]", "an array of 4 dimensions; needed"),
        ("a.json", b"[]", r"shape \[0\]: there are no loads"),
        ("a.json", b"[[], []]", r"shape \[2, 0\]: there are no loads"),
        ("a.json", b"[[1, 2], [3]]", r"is ragged: \$\[1\] has 1 entry, \$\[0\] has 2$"),
        ("a.json", b"[[[1], [2]], [[1], [2], [3]]]", r"is ragged: \$\[1\] has 3 entries, \$\[0\] has 2$"),
        ("a.json", b"[[[1], [2]], [[1], [2, 3]]]", r"is ragged: \$\[1\]\[1\] has 2 entries, \$\[0\]\[0\] has 1$"),
        ("a.json", b"[[1, 2], 3]", r"Expected `array`, got `int` - at `\$\[1\]`"),
        ("a.json", b"[1, [2]]", r"Expected `float`, got `array` - at `\$\[1\]`"),
        ("a.json", b"[1, null]", r"Expected `float`, got `null` - at `\$\[1\]`"),
        ("a.json", b"[1, true]", r"Expected `float`, got `bool`"),
        ("a.json", b'["1"]', "Expected `float`, got `str`"),
        ("a.json", b"[1, NaN]", "holds NaN; loads are finite"),
        ("a.json", b"[1, -Infinity]", "holds -Infinity; loads are finite"),
        ("a.json", b"[1, 1e999]", "has load inf for window 0 layer 0 expert 1"),
        ("a.json", b"[1" + b"0" * 400 + b"]", "out of range"),
        ("a.json", b"[[[1, 2]], [[3, -4]]]", "has load -4 for window 1 layer 0 expert 1; loads are finite and not neg"),
        ("a.json", b"[1e308, 1e308]", "add up to more than a float64 holds"),
        ("a.npy", npy(np.array([[1.0, NAN]])), "has load nan for window 0 layer 0 expert 1"),
        ("a.npy", npy(np.array([[1.0, INF]])), "has load inf"),
        ("a.npy", npy(np.array(["a"])), "holds <U1; loads are integers or floats"),
        ("a.npy", npy(np.array([True])), "holds bool; loads"),
        ("a.npy", npy(np.array([1j])), "holds complex128; loads"),
        ("a.npy", npy(np.array(3)), r"has shape \[\]; needed"),
        ("a.npy", npy(np.ones((1, 1, 1, 2))), r"has shape \[1, 1, 1, 2\]; needed"),
        ("a.npy", npy(np.ones((0, 1, 2))), r"has shape \[0, 1, 2\]: there are no loads"),
        ("a.npy", npy(np.array([None]), allow_pickle=True), "is not a usable .npy array: Object arrays"),
        ("a.npy", npy(COUNTS)[:-9], "is not a usable .npy array: "),
        ("a.npy", npy(COUNTS)[:40], "is not a usable .npy array: "),
        ("a.npy", npy(COUNTS).replace(b"}", b"("), "is not a usable .npy array: "),
        ("a.npy", npy(COUNTS).replace(b"(3,", b"(9" + b"9" * 29 + b",")[:128], "is not a usable .npy array: "),
        ("a.npz", npz(counts=COUNTS).replace(b"\0\0\0\0\0\0!\0", b"\1\0\0\0\0\0!\0"), "is not a usable .npz archive: "),
        ("a.npy", b"[1, 2]", "is not an .npy file, though its name says so"),
        ("a.npz", b"[1, 2]", "is not an .npz file, though its name says so"),
        ("a.npz", npz(loads=COUNTS, model="m"), r"has no array 'counts' \[T, L, E\]; its arrays: loads, model"),
        ("a.npz", npz(), "has no array 'counts'.*: none"),
        ("a.npz", npz(counts=COUNTS)[:60], "is not a usable .npz archive: "),
        ("a.npz", npz(counts=COUNTS).replace(b"NUMPY", b"XXXXX"), "is not a usable .npz archive: "),
        ("a.npz", npz(counts=np.array([None])), "is not a usable .npz archive: Object arrays"),
    ],
)
def test_what_is_no_load_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """One line that names the file and says what is wrong, and where in it."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_loads(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file, a folder, a name that is none, and a standard input that is empty or closed."""
    for source, why in ((tmp_path / "no", "No such file"), (tmp_path, "Is a directory"), ("a\0b", "null byte")):
        with pytest.raises(ConfigError, match=f"cannot be read: .*{why}"):
            read_loads(str(source))
    as_input(monkeypatch, b"")
    with pytest.raises(ConfigError, match=r"^standard input: is empty"):
        read_loads("-")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ConfigError, match=r"^standard input: is empty"):
        read_loads("-")


@pytest.mark.parametrize("name", ["map.json", "map.npy"])
def test_a_written_map_is_read_back_and_static_plans_it(tmp_path: Path, name: str) -> None:
    """What is written can be read here, and by the policy `static`, empty slots included; it replaces what was there."""
    path = tmp_path / name
    placement = initial_placement(SPEC)[:, ::-1].copy()
    placement[1, 0] = -1
    write_map(path, initial_placement(SPEC))
    write_map(path, placement)
    np.testing.assert_array_equal(read_map(path, SPEC), placement)
    windows, live = np.ones((1, 2, 4)), initial_placement(SPEC)
    np.testing.assert_array_equal(run_policy("static", windows, live, SPEC, {"path": str(path)})[0], placement)
    assert os.listdir(tmp_path) == [name]


def test_a_map_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the middle: the old map is whole, no part of the new one is left, and the error says why."""
    path = tmp_path / "map.json"
    write_map(path, initial_placement(SPEC))
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=f"^{path}: cannot be written: No space left"):
        write_map(path, initial_placement(SPEC)[:, ::-1])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["map.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """A map is written to where a link points."""
    (tmp_path / "link.json").symlink_to(tmp_path / "map.json")
    write_map(tmp_path / "link.json", initial_placement(SPEC))
    assert (tmp_path / "link.json").is_symlink()
    np.testing.assert_array_equal(read_map(tmp_path / "map.json", SPEC), initial_placement(SPEC))


def test_where_a_map_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before planning: a name of another kind, no such folder, a folder of that name, a folder that is read-only."""
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    for name, why in {
        "map.txt": "has the suffix '.txt'",
        "map": "has the suffix ''",
        "no/map.json": "there is no folder",
        "file/map.json": "there is no folder",
        "folder.json": "it is a folder",
    }.items():
        with pytest.raises(ConfigError, match=why):
            check_writable(tmp_path / name)
    check_writable(tmp_path / "map.json")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match=f"folder {tmp_path} is not writable"):
        check_writable(tmp_path / "map.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.json", b"[0, 1, 2]", r"shape \[2, 3\] was given; needed"),
        ("m.json", b"[[0, 1, 2, 3, 0, 1]]", "has 1 layers; the model has 2"),
        ("m.json", b"[0, 1, 2, 2, 0, 1]", "no slot for expert 3"),
        ("m.json", b"[0, 1, 2, 4, 0, 1]", "names expert 4"),
        ("m.json", b"[0.5, 1, 2, 3, 0, 1]", "holds integers"),
        ("m.json", b"{", "is not a placement"),
        ("m.yaml", b"", "a placement file is .json or .npy"),
    ],
)
def test_a_map_that_is_none_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """One line that names the file; a map of one row is meant for all layers."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_map(tmp_path / name, SPEC)
    assert str(tmp_path / name) in str(caught.value)
    (tmp_path / "row.json").write_text("[0, 1, 2, 3, 0, -1]")
    assert read_map(tmp_path / "row.json", SPEC).tolist() == [[0, 1, 2, 3, 0, -1]] * 2


def test_whatever_a_damaged_map_raises_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy has more exceptions for a damaged file than a reader expects; none of them gets through."""

    def damaged(path: Path, spec: MoESpec) -> None:
        raise zipfile.BadZipFile("File is not a zip file")

    monkeypatch.setattr("eplb_async.runtime.offline_files.read_placement", damaged)
    with pytest.raises(ConfigError, match=f"^{tmp_path}/m.npy: is damaged: File is not a zip file$"):
        read_map(tmp_path / "m.npy", SPEC)

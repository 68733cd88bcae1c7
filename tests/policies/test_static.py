"""The `static` policy: the placement of a file, or an error that names the file."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from eplb_async.core.errors import ConfigError
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.policies.registry import run_policy
from eplb_async.testing import check_policy

SPEC = MoESpec(num_layers=2, num_experts=4, num_redundant=2, num_ranks=2)
ROW = [3, 2, 1, 0, 0, 1]


def plan(path: Path | str) -> NDArray[np.int32]:
    """What `static` plans with that file."""
    return run_policy("static", np.ones((1, 2, 4)), initial_placement(SPEC), SPEC, {"path": str(path)})[0]


def test_keeps_the_contract(tmp_path: Path) -> None:
    """The contract suite passes with a file of the right shape for each spec."""

    def file_for(spec: MoESpec) -> dict[str, object]:
        path = tmp_path / f"{spec.digest()}.npy"
        np.save(path, initial_placement(spec)[:, ::-1])
        return {"path": str(path)}

    assert check_policy("static", file_for) > 200


@pytest.mark.parametrize("rows", [ROW, [ROW, ROW[::-1]]])
def test_both_formats_and_both_shapes(tmp_path: Path, rows: list[int] | list[list[int]]) -> None:
    """[P] is meant for all layers, [L][P] as it stands; .json and .npy say the same."""
    expected = np.broadcast_to(np.array(rows), (2, 6))
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    np.save(tmp_path / "rows.npy", np.array(rows))
    np.testing.assert_array_equal(plan(tmp_path / "rows.json"), expected)
    np.testing.assert_array_equal(plan(tmp_path / "rows.npy"), expected)


def test_a_replaced_file_takes_effect(tmp_path: Path) -> None:
    """The file is read for each plan."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROW), encoding="utf-8")
    plan(path)
    path.write_text(json.dumps(ROW[::-1]), encoding="utf-8")
    assert plan(path)[0].tolist() == ROW[::-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[0, 1", "is not a placement: Input data was truncated"),
        ("a.json", b"[[0, 1], [2]]", "is not a placement: "),
        ("a.json", b'"text"', "is not a placement for this model: a placement of shape"),
        ("a.json", b"[0, 1, 2, 3, 0, 1.5]", "integers, not float64"),
        ("a.json", b"[0, 1, 2, 3, 0, 4]", "layer 0 slot 5 names expert 4"),
        ("a.json", b"[0, 1, 2, 3, 0, 18446744073709551615]", "is not a placement for this model"),
        ("a.json", b"[0, 1, 2, 2, 0, 1]", "no slot for expert 3"),
        ("a.json", b"[0, 1, 2, 3]", r"shape \[2, 4\] was given; needed \[L, P=6\]"),
        ("a.json", b"[[0, 1, 2, 3, 0, 1]]", "has 1 layers; the model has 2"),
        ("a.json", b"[]", "is not a placement for this model"),
        ("a.json", b"\xff", "is not a placement: "),
        ("a.npy", b"not an array", "is not a placement: "),
        ("a.npy", b"", "is not a placement: "),
        ("a.txt", b"0 1 2 3 0 1", r"suffix '\.txt'; a placement file is \.json or \.npy"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Each wrong file is a ConfigError with its path and what is wrong with it."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        plan(path)
    assert str(path) in str(caught.value)


def test_pickles_and_archives_are_refused(tmp_path: Path) -> None:
    """An .npy that would have to be unpickled is not, and an .npz by another name is named as one."""
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="allow_pickle=False"):
        plan(tmp_path / "objects.npy")
    with (tmp_path / "archive.npy").open("wb") as file:
        np.savez(file, row=np.array(ROW))
    with pytest.raises(ConfigError, match=r"it is an \.npz archive"):
        plan(tmp_path / "archive.npy")


def test_missing_files(tmp_path: Path) -> None:
    """No path, a path to nothing, and a path to a folder."""
    with pytest.raises(ConfigError, match="path is not set"):
        plan("")
    with pytest.raises(ConfigError, match=r"absent\.json: cannot be read: No such file"):
        plan(tmp_path / "absent.json")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        plan(tmp_path / "folder.npy")

"""`plan` and `policies`: JSON with what was promised, tables, and one line with status 1 for whatever a user gets wrong."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_async.core.config import policy_cache
from eplb_async.runtime import cli
from tests.policies.third_party import install

__all__: list[str] = []

Run = Callable[..., tuple[int, str, str]]
LOADS = [[9, 2, 1, 4], [3, 3, 3, 3]]
SMALL = ("--ranks", "2", "--slots", "6", "--policy", "random")

MODULE = """
import msgspec
from eplb_async.policies import Policy
class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    factor: float = float("inf")
def loud(windows_TLE, slot_to_expert_LP, topology, options, state):
    print("printed by a policy")
    if options.factor == 0:
        raise ValueError("first line\\nsecond line")
    return slot_to_expert_LP.copy(), state
POLICY = Policy(name="loud", function=loud, options_type=Options, summary="prints")
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process, with text for its standard input: status, standard output, standard error."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the command sets them where they are not
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/nonexistent")
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str, text: str = json.dumps(LOADS)) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["eplb-async", *arguments])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else int(code is not None)), out, err

    return call


def test_json_has_what_was_promised(run: Run) -> None:
    """One object with balance, bound, moves, time and placement, of sensible types and values."""
    status, out, err = run("plan", "-", *SMALL, "--json", "--slot-bytes", "100")
    assert (status, err, out.count("\n")) == (0, "", 1)
    found = json.loads(out)
    assert set(found) >= {"par", "par_max", "max_load", "bound", "gap", "moved", "ms", "slot_to_expert", "par_before"}
    assert np.shape(found["slot_to_expert"]) == (2, 6)
    assert found["par_max"] == max(found["par_L"]) >= found["par"] >= 1
    assert found["max_load"] == max(found["max_load_L"]) >= found["bound"] == max(found["bound_L"])
    assert found["transfer_bytes"] == 100 * found["moved"]
    assert (found["ms"] > 0, found["next_windows"]) == (True, None)


def test_one_layer_and_tables(run: Run) -> None:
    """Loads [E] are one layer: the placement is still [L][P]; without --json there are tables for people."""
    status, out, _ = run("plan", "-", *SMALL, "--json", text="[9, 2, 1, 4]")
    assert (status, np.shape(json.loads(out)["slot_to_expert"])) == (0, (1, 6))
    status, out, err = run("plan", "-", *SMALL, text="[9, 2, 1, 4]")
    assert (status, err) == (0, "")
    assert "busiest rank" in out
    assert "PAR before" in out


def test_out_is_current_and_static(run: Run, tmp_path: Path) -> None:
    """The map that one run writes is where another starts, and a file for `static`; both know that nothing moves."""
    for name in ("map.json", "map.npy"):
        path = str(tmp_path / name)
        _, out, _ = run("plan", "-", *SMALL, "--option", "seed=7", "--out", path, "--json")
        written = json.loads(out)["slot_to_expert"]
        static = ("--policy", "static", "--option", f"path={path}", "--current", path)
        status, out, _ = run("plan", "-", "--ranks", "2", "--slots", "6", *static, "--json")
        found = json.loads(out)
        assert (status, found["slot_to_expert"], found["moved"], found["slots_changed"]) == (0, written, 0, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.json", "map.npy"]


def test_windows_next_and_options(run: Run, tmp_path: Path) -> None:
    """Parts of a trace, options as JSON or text, the table's length and repeats come through."""
    np.savez(tmp_path / "t.npz", counts=np.arange(1, 41).reshape(5, 2, 4))
    loads = str(tmp_path / "t.npz")
    _, out, _ = run("plan", loads, *SMALL, "--windows", ":-3", "--json", "--table-length", "2", "--repeat", "1")
    found = json.loads(out)
    assert (found["windows"], found["next_windows"], found["num_windows"]) == ([0, 2], [2, 4], 5)
    assert (found["table_length"], found["repeats"], found["options"]["seed"]) == (2, 1, 0)
    _, out, _ = run("plan", loads, *SMALL, "--windows", "-1:", "--next", "0:3", "--json", "--option", "seed=4")
    found = json.loads(out)
    assert (found["windows"], found["next_windows"], found["options"]["seed"]) == ([4, 5], [0, 3], 4)
    assert len(found["par_next_L"]) == 2


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["/no/such.npz", *SMALL], "", "/no/such.npz: cannot be read: No such file"),
        (["-", *SMALL], "", "standard input: is empty"),
        (["-", *SMALL], "[[1, 2", "standard input: is not JSON"),
        (["-", *SMALL], "[[1, 2], [3]]", "is ragged"),
        (["-", *SMALL], "[1, 2, NaN, 4]", "holds NaN"),
        (["-", *SMALL], "[1, 2, -1, 4]", "has load -1 for window 0 layer 0 expert 2"),
        (["-", *SMALL], "[1, 2, Infinity, 4]", "holds Infinity"),
        (["-", *SMALL], '["1"]', "Expected `float`, got `str`"),
        (["-", *SMALL], "[[[[1]]]]", "4 dimensions"),
        (["-", "--ranks", "4", "--slots", "6"], None, "6 slots do not divide over 4 ranks; use 8 slots or 4"),
        (["-", "--ranks", "1", "--slots", "3"], None, "3 slots are too few for 4 experts"),
        (["-", *SMALL, "--nodes", "3"], None, "2 ranks do not divide over 3 nodes"),
        (["-", *SMALL, "--groups", "3"], None, "4 experts do not divide into 3 expert groups"),
        (["-", *SMALL, "--groups", "8"], None, "4 experts do not divide into 8 expert groups"),
        (["-", *SMALL, "--table-length", "1"], None, "table_length is 1, but 6 slots for 4 experts need 2"),
        (["-", *SMALL, "--policy", "nope"], None, "unknown policy 'nope'; known: default, "),
        (["-", *SMALL, "--option", "sed=1"], None, "unknown field `sed` (its options: seed"),
        (["-", *SMALL, "--option", "seed=x"], None, "Expected `int`, got `str` - at `$.seed`"),
        (["-", *SMALL, "--option", "seed=-1"], None, "seed is -1; it must be at least 0"),
        (["-", *SMALL, "--option", "dispatch=odd"], None, "Invalid enum value 'odd' - at `$.dispatch`"),
        (["-", *SMALL, "--windows", "1:2"], None, "--windows 1:2: does not fit 1 windows"),
        (["-", *SMALL, "--next", "-2:"], None, "--next -2:: does not fit 1 windows"),
        (["-", *SMALL, "--current", "/no/map.json"], None, "/no/map.json: cannot be read"),
        (["-", *SMALL, "--current", "SHORT"], None, "needed [L, P=6]"),
        (["-", *SMALL, "--current", "LOST"], None, "has no slot for expert 3"),
        (["-", *SMALL, "--policy", "static", "--option", "path=SHORT"], None, "needed [L, P=6]"),
        (["-", *SMALL, "--out", "/no/such/map.json"], None, "cannot be written: there is no folder"),
        (["-", *SMALL, "--out", "/proc/map.json"], None, "/proc/map.json: cannot be written"),
        (["-", *SMALL, "--out", "map.txt"], None, "has the suffix '.txt'"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(
    run: Run, tmp_path: Path, arguments: list[str], text: str | None, message: str
) -> None:
    """Status 1, nothing on standard output, exactly one line that says what is wrong, and no file is written."""
    maps = {"SHORT": "[0, 1, 2, 3]", "LOST": "[0, 1, 2, 0, 1, 2]"}
    for name, content in maps.items():
        (tmp_path / f"{name}.json").write_text(content, encoding="utf-8")
        arguments = [argument.replace(name, str(tmp_path / f"{name}.json")) for argument in arguments]
    wanted = [] if "--out" in arguments else ["--out", str(tmp_path / "out.json")]
    status, out, err = run("plan", *arguments, *wanted, text=json.dumps(LOADS) if text is None else text)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["LOST", "SHORT"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-"],
        ["-", "--ranks", "2"],
        ["-", *SMALL, "--ranks", "two"],
        ["-", *SMALL, "--ranks", "0"],
        ["-", *SMALL, "--slots", "99999999999"],
        ["-", *SMALL, "--repeat", "0"],
        ["-", *SMALL, "--windows", "1"],
        ["-", *SMALL, "--next", "a:b"],
        ["-", *SMALL, "--option", "seed"],
        ["-", *SMALL, "--option", "=1"],
        ["-", *SMALL, "--option", "seed=1", "--option", "seed=2"],
        ["-", *SMALL, "--nope"],
        ["-", "-", *SMALL],
    ],
)
def test_wrong_usage_is_status_2(run: Run, arguments: list[str]) -> None:
    """A command line that cannot be understood is a usage error, without a traceback."""
    status, out, err = run("plan", *arguments)
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert "Usage" in err


def test_a_third_partys_policy(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It plans like a built-in one; what it prints stays out of the JSON, and an error of many lines is one line."""
    install(tmp_path, "eplb_async_loud", MODULE, "[eplb_async.policies]\nloud = eplb_async_loud:POLICY\n")
    monkeypatch.syspath_prepend(tmp_path)
    loud = ("plan", "-", "--ranks", "2", "--slots", "6", "--policy", "loud")
    status, out, err = run(*loud, "--json")
    assert (status, json.loads(out)["moved"], json.loads(out)["options"]["factor"]) == (0, 0, None)
    assert "printed by a policy" in err
    status, out, err = run(*loud, "--option", "factor=0")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: policy 'loud' raised ValueError: first line second line")
    _, out, _ = run("policies")
    assert "loud eplb_async_loud 1.0 (eplb_async_loud:POLICY)" in out


def test_policies(run: Run) -> None:
    """Names, summaries and options, for people and as JSON."""
    status, out, err = run("policies", "--json")
    assert (status, err) == (0, "")
    found: dict[str, Any] = {info["name"]: info for info in json.loads(out)["policies"]}
    assert found["static"]["source"] == "built in"
    assert found["random"]["options"][0]["name"] == "seed"
    _, out, _ = run("policies")
    for shown in ("default built in", "relabel_ranks", found["random"]["summary"]):
        assert shown in out


@pytest.mark.parametrize("command", ["plan", "policies"])
def test_help_has_an_example(run: Run, command: str) -> None:
    """Each command's help says what it does and shows how to call it."""
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "Example" in out
    assert f"eplb-async {command}" in out
    assert "[E], [L, E] or [T, L, E]" in out or command == "policies"


def test_where_compiled_policies_are_kept(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the daemon keeps them; and without a folder that is this user's alone, nowhere."""
    import os

    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    for mode, expected in ((0o700, str(policy_cache(tmp_path / "own"))), (0o777, None)):
        monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own").chmod(mode)
        monkeypatch.setenv("EPLB_ASYNC_RUNTIME_DIR", str(tmp_path / "own"))
        status, _, _ = run("plan", "-", *SMALL, "--json")
        assert (status, os.environ.get("NUMBA_CACHE_DIR")) == (0, expected)


def test_a_fresh_interpreter_plans_without_torch(tmp_path: Path) -> None:
    """The whole command loads neither torch nor asyncio (numba it needs: small layers get a proven bound)."""
    (tmp_path / "loads.json").write_text(json.dumps(LOADS), encoding="utf-8")
    arguments = ["eplb-async", "plan", str(tmp_path / "loads.json"), *SMALL, "--json"]
    probe = (
        "import sys\n"
        "from eplb_async.__main__ import main\n"
        f"sys.argv = {arguments!r}\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    print(end.code, *{'torch', 'asyncio'} & set(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.split() == ["0"]
    assert json.loads(done.stdout)["num_layers"] == 2

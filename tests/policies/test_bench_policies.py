"""The policy benchmark runs from the command line, and measures what it says."""

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.bench_policies import moved_share
from eplb_async.core.spec import MoESpec

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The benchmark as a user runs it."""
    command = [sys.executable, "benchmarks/bench_policies.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_table_and_json(tmp_path: Path) -> None:
    """One case: a table with ratios and the machine above it, and the same rows in the file."""
    file = tmp_path / "rows.json"
    done = run(
        "--policy", "random", "--policy", "random:seed=3", "--case", "qwen3-235b", "--repeats", "1", "--json", str(file)
    )
    assert done.returncode == 0, done.stderr
    assert "python benchmarks/bench_policies.py" in done.stdout
    assert "random:seed=3" in done.stdout
    assert "(1.00x)" in done.stdout
    written = msgspec.json.decode(file.read_bytes())
    assert written["header"]["numpy"] == np.__version__
    assert [row["policy"] for row in written["rows"]] == [
        "random",
        "random:seed=3",
        "(initial placement)",
        "(lower bound)",
    ]
    assert all(row["par_planned"] >= 1 for row in written["rows"])


def test_wrong_arguments() -> None:
    """An unknown case, policy or option is an error that lists what there is."""
    for arguments, message in [
        (["--case", "nothing"], "deepseek-v3"),
        (["--policy", "nothing"], "default"),
        (["--policy", "random:sed=1"], "sed"),
    ]:
        done = run(*arguments)
        assert done.returncode == 2
        assert message in done.stderr


def test_moved_share() -> None:
    """Slot order inside a rank costs nothing; an expert new to a rank, or there once more, costs its slot."""
    spec = MoESpec(num_layers=1, num_experts=3, num_redundant=1, num_ranks=2)
    before = np.array([[0, 1, 2, 0]], dtype=np.int32)
    assert moved_share(before, np.array([[1, 0, 0, 2]], dtype=np.int32), spec) == 0
    assert moved_share(before, np.array([[0, 2, 1, 0]], dtype=np.int32), spec) == 0.5

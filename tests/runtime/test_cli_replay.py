"""`eplb-async replay` as a user runs it."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from eplb_async.core.config import DaemonSettings
from eplb_async.core.errors import ConfigError, UnknownName
from eplb_async.runtime.replay_presets import configurations

__all__: list[str] = []

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/replay"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three windows of two layers."""
    path = tmp_path / "trace.npy"
    np.save(path, np.random.default_rng(0).lognormal(5, 1, (3, 2, 8)))
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eplb_async", "replay", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_configurations_side_by_side(trace: Path, tmp_path: Path) -> None:
    """A preset and a file, in JSON, with a picture where matplotlib is; the busier schedule moves more."""
    file, picture = tmp_path / "often.toml", tmp_path / "out.png"
    file.write_text('[daemon]\npolicy = "default"\nwindow_steps = 10\ninterval_steps = 20\nmove_cost = 0\n')
    shape = ["--ranks", "2", "--slots", "10", "--slot-bytes", "1000"]
    steps = ["--steps-per-window", "100", "--tokens-per-step", "1000", "--seed", "3"]
    more = ["--preset", "still", "--config", str(file), "--json", "--plot", str(picture)]
    done = run(str(trace), *shape, *steps, *more)
    assert done.returncode == 0, done.stderr
    still, often = json.loads(done.stdout)["replay"]
    assert [still["name"], often["name"]] == ["still", "often"]
    assert still["bytes_moved"] == 0 < often["bytes_moved"]
    assert often["par_mean"] < still["par_mean"]
    if find_spec("matplotlib") is None:
        assert "matplotlib is not installed" in done.stderr
    else:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_table(trace: Path) -> None:
    """For people: a line for each configuration, and why plans were made."""
    done = run(str(trace), "--ranks", "2", "--slots", "10", "--steps-per-window", "2000")
    assert done.returncode == 0, done.stderr
    assert "vllm" in done.stdout
    assert "ours" in done.stdout
    assert "x PAR > after steps: finished" in done.stdout


@pytest.mark.parametrize("arguments", [["--every", "3"], ["--preset", "vlm"], ["--slots", "9"]])
def test_user_errors_are_one_line(trace: Path, arguments: list[str]) -> None:
    """Spans that do not fit, an unknown preset, slots that do not divide: status 1 and one line."""
    done = run(str(trace), "--ranks", "2", "--slots", "10", "--steps-per-window", "100", *arguments)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1


def test_examples_are_settings() -> None:
    """Every file of examples/replay loads; those named like presets are the presets."""
    files = sorted(EXAMPLES.glob("*.toml"))
    assert len(files) >= 3
    found = dict(configurations(files, []))
    assert found["vllm"] == configurations([], ["vllm"])[0][1]
    assert found["ours"] == configurations([], ["ours"])[0][1]


def test_the_presets_are_what_they_say() -> None:
    """The schedule of vLLM has nothing of ours, whatever our defaults are; ours are the defaults; the still one never decides."""
    presets = {name: settings.daemon for name, settings in configurations([], ["vllm", "ours", "still"])}
    vllm, still = presets["vllm"], presets["still"]
    assert (vllm.policy, vllm.policy_options) == ("default", {})
    assert (vllm.window_steps, vllm.num_windows, vllm.interval_steps) == (1000, 1, 3000)
    assert (vllm.par_threshold, vllm.min_gain, vllm.memory, vllm.bytes_per_step) == (1.0, 0.0, "all", 0)
    assert (vllm.least_change, vllm.confidence, vllm.move_cost, vllm.weigh_time) == (0.0, 0.0, 0.0, False)
    assert min(vllm.par_drift, still.par_threshold) >= 1e9
    assert presets["ours"] == DaemonSettings()


def test_names_are_checked() -> None:
    """Unknown presets name the known ones; two configurations of one name are refused."""
    with pytest.raises(UnknownName, match="still"):
        configurations([], ["other"])
    with pytest.raises(ConfigError, match="two configurations"):
        configurations([EXAMPLES / "vllm.toml"], ["vllm"])

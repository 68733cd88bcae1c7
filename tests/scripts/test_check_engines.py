"""scripts/check_engines: what it downloads, what it keeps, and what it says when it cannot. An interpreter of ours stands in for pip and pytest."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
release="${!#}"
case "$2" in
    pip) [[ $release != *9.9 ]] || { touch "${@: -2:1}/half.whl"; exit 1; }
         touch "${@: -2:1}/${release/==/-}-cp38-abi3-manylinux.whl" ;;
    pytest) echo "tested $(ls "$EPLB_ENGINE_WHEELS" | tr '\\n' ' ')"; exit "${VERDICT:-0}" ;;
esac
"""


@pytest.fixture
def script(tmp_path: Path) -> "Script":
    """The script with the stand-in."""
    return Script(tmp_path)


class Script:
    """Runs the script, and tells how its interpreter was called."""

    def __init__(self, folder: Path) -> None:
        self.wheels, self._calls, python = folder / "wheels", folder / "calls", folder / "python"
        self._calls.touch()
        python.write_text(PYTHON)
        python.chmod(0o755)
        (folder / "tmp").mkdir()
        self.temporary = folder / "tmp"
        self.environ = {"CALLS": str(self._calls), "PYTHON": str(python), "TMPDIR": str(self.temporary)}

    def run(self, *args: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        """With these arguments."""
        return subprocess.run(
            [str(ROOT / "scripts/check_engines"), *args],
            env={**os.environ, **self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def called(self, module: str) -> list[list[str]]:
        """Arguments of each call of pip or pytest."""
        calls = [line.split() for line in self._calls.read_text().splitlines()]
        return [call[2:] for call in calls if call[1] == module]


def test_the_known_releases_go_to_a_folder_that_is_removed(script: Script) -> None:
    """Without arguments; wheels for the Python of the engines, without what they depend on."""
    done = script.run()
    assert done.returncode == 0, done.stderr
    calls = script.called("pip")
    assert [call[-1] for call in calls] == ["vllm==0.26.0", "vllm==0.33.0", "sglang==0.5.23"]
    assert all({"--no-deps", "--only-binary=:all:", "--python-version", "3.12"} <= set(call) for call in calls)
    names = [name for name in done.stdout.split() if name.endswith(".whl")]
    assert [name.partition("-cp")[0] for name in names] == ["sglang-0.5.23", "vllm-0.26.0", "vllm-0.33.0"]
    tests = [name for name in script.called("pytest")[0] if name.endswith(".py")]
    wheel_tests = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/integrations/test_*_wheel.py"))
    assert tests == [*wheel_tests, "tests/integrations/test_vllm_state.py"]
    assert list(script.temporary.iterdir()) == []


def test_wheels_that_are_there_are_kept(script: Script) -> None:
    """Only what is missing is downloaded, and all is tested."""
    script.wheels.mkdir()
    (script.wheels / "vllm-0.34.0-cp38-abi3-manylinux.whl").write_text("as it was")
    done = script.run("--folder", str(script.wheels), "vllm==0.34.0", "sglang==0.5.24")
    assert done.returncode == 0, done.stderr
    assert [call[-1] for call in script.called("pip")] == ["sglang==0.5.24"]
    assert (script.wheels / "vllm-0.34.0-cp38-abi3-manylinux.whl").read_text() == "as it was"
    assert len(list(script.wheels.iterdir())) == 2
    assert "tested sglang-0.5.24-cp38-abi3-manylinux.whl vllm-0.34.0-cp38-abi3-manylinux.whl" in done.stdout


def test_a_download_that_fails_is_named(script: Script) -> None:
    """Nothing is tested then, and what it left is no wheel for the next run."""
    done = script.run("--folder", str(script.wheels), "vllm==9.9")
    assert done.returncode == 2
    assert "check_engines: vllm==9.9 could not be downloaded" in done.stderr
    assert script.called("pytest") == []
    assert list(script.wheels.iterdir()) == []


def test_the_verdict_is_that_of_the_tests(script: Script) -> None:
    """A release that differs makes the command fail."""
    assert script.run("vllm==0.34.0", VERDICT="1").returncode == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [(["--fast"], "unknown option --fast"), (["torch==2.0"], "torch==2.0 is no release"), (["vllm"], "vllm==VERSION")],
)
def test_arguments_that_make_no_sense_are_refused(script: Script, args: list[str], words: str) -> None:
    """Before anything is downloaded."""
    done = script.run(*args)
    assert done.returncode == 2
    assert words in done.stderr
    assert script.called("pip") == []


def test_help_shows_how() -> None:
    """With examples; no interpreter is needed for it."""
    done = subprocess.run([str(ROOT / "scripts/check_engines"), "--help"], capture_output=True, text=True, check=True)
    assert "scripts/check_engines vllm==0.34.0" in done.stdout
    assert "vllm==0.26.0 vllm==0.33.0 sglang==0.5.23" in done.stdout


def test_a_missing_interpreter_is_named(script: Script) -> None:
    """With what to do about it."""
    done = script.run(PYTHON="/nowhere/python")
    assert done.returncode == 2
    assert "there is no /nowhere/python" in done.stderr

"""The entry point of vLLM's plugin, in new processes that find a small package named vllm."""

import contextlib
import io
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from tests.rank.harness import forkserver

EPLB = "vllm.distributed.eplb.eplb_state"
SOURCES = {
    "vllm/__init__.py": "",
    "vllm/distributed/__init__.py": "",
    "vllm/distributed/eplb/__init__.py": "",
    "vllm/distributed/eplb/eplb_state.py": """
class EplbState:
    def __init__(self, parallel_config, device): ...
    def step(self, is_dummy=False): ...
""",
    "vllm/runner.py": "from vllm.distributed.eplb.eplb_state import EplbState\n",
    "vllm/other.py": "EplbState = 3\n",
}
PROBE = """
import logging, sys
from eplb_async.integrations import vllm_plugin
from eplb_async.integrations.source_check import Function

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stdout)

def known():
    vllm_plugin.expectations = lambda: [Function(STATE + ":EplbState.step", ("self, is_dummy=",))]

def tell():
    import vllm.runner, vllm.other
    from vllm.distributed.eplb import eplb_state
    assert vllm.runner.EplbState is eplb_state.EplbState
    assert vllm.other.EplbState == 3
    print("class", eplb_state.EplbState.__module__, eplb_state.EplbState.__name__, len(eplb_state.EplbState.__mro__))

STATE = "vllm/distributed/eplb/eplb_state.py"
"""
THEIRS, OURS = f"class {EPLB} EplbState 2", "class eplb_async.integrations.vllm_state EplbState 3"
TAKEN = "INFO vllm.eplb_async eplb_async takes the place of vLLM's EPLB where --enable-eplb is given"
STAYS = "WARNING vllm.eplb_async eplb_async: vLLM's own EPLB stays: "


class Package:
    """The package, installed in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in SOURCES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        self.release("0.26.0")

    def release(self, text: str) -> None:
        """Say that it is another release; "" makes it a folder of which no package is known."""
        for old in self.folder.glob("*.dist-info"):
            shutil.rmtree(old)
        if text:
            info = self.folder / "vllm.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {text}\n")

    def lines(self, code: str, **environ: str) -> list[str]:
        """What a new process prints and logs that runs this."""
        ours, theirs = forkserver.Pipe()
        process = forkserver.Process(target=_run, args=(theirs, str(self.folder), code, environ))
        process.start()
        theirs.close()
        try:
            assert ours.poll(60), "the process does not answer"
            lines: list[str] = ours.recv()
        finally:
            process.kill()
            process.join()
            process.close()
            ours.close()
        return lines


def _run(pipe: Any, folder: str, code: str, environ: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("EPLB_ASYNC_")]:
        del os.environ[name]
    os.environ.update({f"EPLB_ASYNC_{name}": text for name, text in environ.items()})
    sys.path.insert(0, folder)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            exec(f"{PROBE}\n{code}", {})  # noqa: S102
        except BaseException:  # noqa: BLE001 (sent to the test, whose comparison fails)
            print(traceback.format_exc())  # noqa: T201
    pipe.send(output.getvalue().splitlines())


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """See Package."""
    return Package(tmp_path)


def test_the_class_is_replaced_when_its_module_is_imported(package: Package) -> None:
    """Once, though vLLM loads plugins several times in a process; registering imports nothing of vLLM."""
    code = """
known()
vllm_plugin.register()
vllm_plugin.register()
assert not any(name.split(".")[0] == "vllm" for name in sys.modules)
assert [type(finder).__module__ for finder in sys.meta_path].count("eplb_async.integrations.import_hook") == 1
tell()
vllm_plugin.register()
tell()
"""
    assert package.lines(code) == [TAKEN, OURS, OURS]


def test_the_class_is_replaced_wherever_it_has_been_imported(package: Package) -> None:
    """A plugin that is loaded late finds modules that hold vLLM's class under its name; other things of that name stay."""
    assert package.lines("import vllm.runner, vllm.other\nknown()\nvllm_plugin.register()\ntell()") == [TAKEN, OURS]


@pytest.mark.parametrize(
    ("release", "why"),
    [
        (
            "0.25.1",
            "vLLM 0.25.1 is not one of the releases that this version was checked against (0.26, 0.33); EPLB_ASYNC",
        ),
        ("0.260.0", "vLLM 0.260.0 is not one of the releases"),
        ("1.26.0", "vLLM 1.26.0 is not one of the releases"),
        ("dev", "vLLM dev is not one of the releases"),
        ("", "its release cannot be told"),
    ],
)
def test_another_release_is_left_alone(package: Package, release: str, why: str) -> None:
    """A warning says which are known and how to try it; nothing is raised into vLLM's import."""
    package.release(release)
    log, found = package.lines("known()\nvllm_plugin.register()\ntell()")
    assert log.startswith(STAYS + why)
    assert found == THEIRS


@pytest.mark.parametrize("release", ["0.26.1.dev3+gabc", "0.33.2"])
def test_small_steps_of_a_known_release_are_taken(package: Package, release: str) -> None:
    """Their sources are looked at all the same."""
    package.release(release)
    assert package.lines("known()\nvllm_plugin.register()\ntell()") == [TAKEN, OURS]


def test_any_version_is_tried_when_asked_for(package: Package) -> None:
    """Then the number does not matter; the source does."""
    package.release("0.99.0")
    code = "vllm_plugin.register()\ntell()"
    assert package.lines(f"known()\n{code}", INTEGRATION_ANY_VERSION="1") == [TAKEN, OURS]
    log, found = package.lines(code, INTEGRATION_ANY_VERSION="1")
    assert log.startswith(f"{STAYS}vLLM 0.99.0 differs from what this version knows: ")
    assert found == THEIRS


def test_a_source_that_differs_is_left_alone(package: Package) -> None:
    """One parameter more is enough; the warning names it."""
    path = package.folder / "vllm/distributed/eplb/eplb_state.py"
    path.write_text(path.read_text().replace("is_dummy=False", "is_dummy=False, tag=0"))
    log, found = package.lines("known()\nvllm_plugin.register()\ntell()")
    assert log.startswith(f"{STAYS}vLLM 0.26.0 differs from what this version knows: ")
    assert "EplbState.step takes (self, is_dummy=, tag=); known: (self, is_dummy=)" in log
    assert found == THEIRS


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"INTEGRATION_DAEMON": "maybe"}, "EPLB_ASYNC_INTEGRATION_DAEMON"),
        ({"NO_SUCH_THING": "1"}, "EPLB_ASYNC_NO_SUCH_THING"),
        ({"CONFIG": "/nowhere.toml"}, "/nowhere.toml"),
    ],
)
def test_a_bad_setting_leaves_vllms_own(package: Package, environ: dict[str, str], words: str) -> None:
    """It is named in a warning; vLLM starts."""
    log, found = package.lines("known()\nvllm_plugin.register()\ntell()", **environ)
    assert log.startswith(STAYS)
    assert words in log
    assert found == THEIRS


def test_it_can_be_switched_off(package: Package) -> None:
    """No warning: that is what was asked for."""
    log, found = package.lines("known()\nvllm_plugin.register()\ntell()", INTEGRATION_ENABLED="0")
    assert log.startswith("INFO vllm.eplb_async eplb_async is switched off (EPLB_ASYNC_INTEGRATION_ENABLED)")
    assert found == THEIRS

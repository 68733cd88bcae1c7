"""Expectations on sources: what holds is silent, what does not is named with its place."""

import zipfile
from pathlib import Path

import pytest

from eplb_async.integrations.source_check import (
    Calls,
    Constant,
    Expectation,
    Fields,
    Function,
    Instance,
    SourceTree,
    Uses,
    problems,
)

STATE = """
import sys
GROUP = "engine.plugins"
MADE = str(3)
TYPED: int = 3
if sys.platform == "linux":
    def pinned(a, /, b, c=1, *, d, e=2, **rest): ...
else:
    def pinned(): ...
try:
    class Fast: ...
except ImportError:
    pass
class State:
    limit: int = 3
    other = 4
    def __init__(self, config, device=None):
        self.config = config
        self.a, (self.b, self.c) = 1, (2, 3)
        self.model = config.pick(  config.name )
    async def run(self, *args, flag): return self.read
    @property
    def size(self): return 1
"""
RUNNER = """
class Runner:
    def go(self):
        self.state.step()
        self.state.other.step(1)
        other.state.rearrange()
"""
SOURCES = {
    "engine/__init__.py": "",
    "engine/state.py": STATE,
    "engine/run/runner.py": RUNNER,
    "engine/broken.py": "def f(:",
    "engine/elastic/loop.py": "self.state.pause()",
}
PLACE = "engine/state.py"
HOLDS: list[Expectation] = [
    Function(f"{PLACE}:State.__init__", ("self", "self, config, device=")),
    Function(f"{PLACE}:State.run", ("self, *args, flag",)),
    Function(f"{PLACE}:pinned", ("a, b, c=, *, d, e=, **rest",)),
    Fields(f"{PLACE}:State", ("limit", "other", "run", "size")),
    Fields(f"{PLACE}:Fast", ()),
    Instance(f"{PLACE}:State", ("config", "a", "b", "c", "model")),
    Constant(f"{PLACE}:GROUP", "engine.plugins"),
    Uses(f"{PLACE}:State", ("config.pick(config.name)", "self.read")),
    Calls("engine/", ("self.state",), frozenset({"step", "other"}), ignored=("engine/elastic/",)),
]
FAILS: list[tuple[Expectation, list[str]]] = [
    (Function(f"{PLACE}:State.__init__", ("self",)), ["State.__init__ takes (self, config, device=)", "known: (self)"]),
    (Function(f"{PLACE}:State", ("self",)), [f"{PLACE}:State is a class"]),
    (Function(f"{PLACE}:State.gone", ("self",)), [f"{PLACE} has no State.gone"]),
    (Function(f"{PLACE}:Gone.run", ("self",)), [f"{PLACE} has no Gone.run"]),
    (Function("engine/gone.py:f", ("",)), ["engine/gone.py cannot be read"]),
    (Function("engine/broken.py:f", ("",)), ["engine/broken.py cannot be parsed"]),
    (Fields(f"{PLACE}:State", ("limit", "config", "gone")), [f"{PLACE}:State has no config, gone"]),
    (Instance(f"{PLACE}:State", ("read", "a", "limit")), [f"{PLACE}:State has no read, limit"]),
    (Constant(f"{PLACE}:GROUP", "others"), ["GROUP is 'engine.plugins'", "known: 'others'"]),
    (Constant(f"{PLACE}:MADE", "3"), ["MADE is not a plain value"]),
    (Constant(f"{PLACE}:GONE", 1), [f"{PLACE} does not define GONE"]),
    (Uses(f"{PLACE}:State.run", ("config.pick(config.name)",)), ["State.run has no config.pick(config.name)"]),
    (
        Calls("engine/", ("self.state", "other.state"), frozenset({"step", "other", "pause"})),
        ["engine/run/runner.py:6 uses other.state.rearrange"],
    ),
    (Calls("engine/", ("self.state",), frozenset()), ["engine/run/runner.py:4 uses self.state.step", "loop.py:1 uses"]),
]


@pytest.fixture(params=["folder", "wheel"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> SourceTree:
    """The sources, as an installed package and as a wheel."""
    if request.param == "folder":
        for name, text in SOURCES.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "engine" / "notes.txt").write_text("self.state.gone()")
        return SourceTree.of_folder(tmp_path / "engine")
    path = tmp_path / "engine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in SOURCES.items():
            archive.writestr(name, text)
        archive.writestr("engine/notes.txt", "self.state.gone()")
    return SourceTree.of_wheel(path)


def test_what_holds_is_silent(tree: SourceTree) -> None:
    """All kinds of expectation, for definitions at the top, in classes, and under `if` and `try`."""
    assert problems(tree, HOLDS) == []


@pytest.mark.parametrize(("expectation", "words"), FAILS, ids=lambda value: type(value).__name__)
def test_what_does_not_hold_is_named(tree: SourceTree, expectation: Expectation, words: list[str]) -> None:
    """One sentence, which says where, and what was found."""
    found = problems(tree, [*HOLDS, expectation, *HOLDS])
    assert len(found) == 1
    assert [word for word in words if word not in found[0]] == []


def test_calls_are_searched_in_every_file_of_the_package(tree: SourceTree) -> None:
    """Names are those of Python sources, in order for a folder; a place narrows the search."""
    assert set(tree.names()) == set(SOURCES)
    assert not Calls("engine/run/", ("self.state",), frozenset({"step", "other"})).problem(tree)
    assert Calls("engine/", ("self.state",), frozenset({"step", "other"})).problem(tree).startswith("engine/elastic/")


def test_sources_that_cannot_be_decoded_are_problems(tmp_path: Path) -> None:
    """They are named, and do not raise into the engine's start."""
    package = tmp_path / "engine"
    package.mkdir()
    (package / "state.py").write_bytes(b"# \xff\nself.state.step()\n")
    found = problems(SourceTree.of_folder(package), [Calls("engine/", ("self.state",), frozenset())])
    assert found == ["engine/state.py cannot be read"]


def test_an_expectation_without_a_definition_is_our_mistake() -> None:
    """It is reported as a problem, never taken for granted."""
    tree = SourceTree(lambda name: "x = 1", lambda: ["a.py"])
    assert problems(tree, [Instance("a.py:", ("x",))]) == ["a.py has no "]

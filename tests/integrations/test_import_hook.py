"""Acting on a module when it is imported, however and whenever that happens."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from eplb_async.integrations.import_hook import when_imported

NAME = "engine_for_import_hook"
INNER = f"{NAME}.inner.state"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a module two folders down, which can be imported until the test ends."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    inner = tmp_path / NAME / "inner"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").touch()
    (inner / "state.py").write_text("VALUE = 1\n")
    yield inner
    for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
        del sys.modules[name]


def test_nothing_is_imported_before_its_time(package: Path) -> None:
    """Neither the module nor its package is loaded by the hook; it acts once, behind the module's own code."""
    seen: list[int] = []
    when_imported(INNER, lambda module: seen.append(module.VALUE))
    assert not any(name.split(".")[0] == NAME for name in sys.modules)
    importlib.import_module(f"{NAME}.inner")
    assert seen == []
    importlib.import_module(INNER)
    importlib.reload(sys.modules[INNER])
    assert seen == [1]


def test_a_module_that_is_there_is_acted_on_at_once(package: Path) -> None:
    """Without another import, and without anything that stays behind."""
    module, finders, seen = importlib.import_module(INNER), list(sys.meta_path), list[ModuleType]()
    when_imported(INNER, seen.append)
    assert seen == [module]
    assert sys.meta_path == finders


def test_the_module_keeps_no_trace(package: Path) -> None:
    """Its loader is what it would have been, so that its resources and source are found; no finder is left."""
    finders = list(sys.meta_path)
    when_imported(INNER, lambda module: None)
    module = importlib.import_module(INNER)
    assert module.__spec__ is not None
    assert module.__loader__ is module.__spec__.loader
    assert type(module.__loader__).__module__.startswith(("importlib", "_frozen_importlib"))
    assert sys.meta_path == finders


def test_who_only_asks_does_not_use_the_hook_up(package: Path) -> None:
    """Looking whether a module exists, which engines do for optional parts, is no import of it."""
    seen: list[ModuleType] = []
    when_imported(INNER, seen.append)
    assert importlib.util.find_spec(INNER) is not None
    assert seen == []
    module = importlib.import_module(INNER)
    assert seen == [module]


def test_a_module_that_fails_can_be_tried_again(package: Path) -> None:
    """An import that raises is not acted on; one that then succeeds is."""
    seen: list[ModuleType] = []
    when_imported(INNER, seen.append)
    (package / "state.py").write_text("raise RuntimeError('no device')\n")
    with pytest.raises(RuntimeError, match="no device"):
        importlib.import_module(INNER)
    assert seen == []
    (package / "state.py").write_text("VALUE = 'another length'\n")
    importlib.invalidate_caches()
    assert importlib.import_module(INNER).VALUE == "another length"
    assert [module.__name__ for module in seen] == [INNER]


def test_a_module_that_does_not_exist_stays_missing(package: Path) -> None:
    """The hook changes nothing about the error."""
    when_imported(f"{NAME}.nothing", lambda module: pytest.fail("there is no such module"))
    with pytest.raises(ModuleNotFoundError, match=f"{NAME}.nothing"):
        importlib.import_module(f"{NAME}.nothing")


def test_two_can_wait_for_one_module(package: Path) -> None:
    """Both act, and one does not hide the other."""
    seen: list[str] = []
    when_imported(INNER, lambda module: seen.append("first"))
    when_imported(INNER, lambda module: seen.append("second"))
    importlib.import_module(INNER)
    assert sorted(seen) == ["first", "second"]


def test_what_the_act_raises_reaches_the_importer(package: Path) -> None:
    """It is not swallowed, and the module is not left half there."""

    def act(module: ModuleType) -> None:
        raise LookupError("act")

    when_imported(INNER, act)
    with pytest.raises(LookupError, match="act"):
        importlib.import_module(INNER)
    assert INNER not in sys.modules

"""`__all__` says what is public, in every module and at the root."""

import ast
from pathlib import Path

import pytest

import eplb_async
from scripts import house_rules

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "eplb_async").rglob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_all_is_what_the_module_defines(name: str) -> None:
    """Each module's `__all__` lists names that it defines, and all its public classes and functions."""
    findings = house_rules.check_file((ROOT / name).read_text(encoding="utf-8"), name)
    assert [finding for finding in findings if ": public: " in finding] == []


def test_root_names_resolve() -> None:
    """Every name that the root lists can be had from it, lazy ones too, and dir() shows it."""
    listed = house_rules.public_names(ast.parse((ROOT / "eplb_async/__init__.py").read_text(encoding="utf-8")))
    assert listed == list(eplb_async.__all__)
    for name in eplb_async.__all__:
        assert getattr(eplb_async, name) is not None
        assert name in dir(eplb_async)


@pytest.mark.parametrize("name", ["no_such_name", "RankHok"])
def test_unknown_root_name_is_an_attribute_error(name: str) -> None:
    """Lazy names do not swallow typing errors."""
    with pytest.raises(AttributeError, match=name):
        getattr(eplb_async, name)

"""Released engines to compare the plugins' expectations with: EPLB_ENGINE_WHEELS names a folder that holds their wheels."""

import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from eplb_async.integrations.source_check import SourceTree

__all__ = ["changed", "execute", "needs", "of_engine"]

FOLDER = os.environ.get("EPLB_ENGINE_WHEELS", "")


def of_engine(pattern: str) -> list[Path]:
    """The wheels whose names match, such as "vllm-*.whl", oldest name first; none where the variable is not set."""
    return sorted(Path(FOLDER).glob(pattern)) if FOLDER else []


def needs(pattern: str) -> pytest.MarkDecorator:
    """Skips a module's tests where there is no such wheel."""
    return pytest.mark.skipif(
        not of_engine(pattern), reason=f"EPLB_ENGINE_WHEELS names no folder with {pattern} (scripts/check_engines)"
    )


def changed(wheel: Path, name: str, old: str, new: str) -> SourceTree:
    """The sources of a wheel with one text changed, as if a release had done so."""
    archive = zipfile.ZipFile(wheel)

    def read(path: str) -> str:
        text = archive.read(path).decode()
        if path == name:
            assert old in text, f"{wheel.name}: {name} has no {old!r}"
            return text.replace(old, new)
        return text

    return SourceTree(read, lambda: (path for path in archive.namelist() if path.endswith(".py")))


def execute(wheel: Path, name: str) -> ModuleType:
    """A module of a wheel, executed here and kept in sys.modules; what it imports must be there."""
    module = ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    sys.modules[name] = module
    source = zipfile.ZipFile(wheel).read(f"{name.replace('.', '/')}.py")
    exec(compile(source, name, "exec"), module.__dict__)  # noqa: S102
    return module

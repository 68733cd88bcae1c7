"""Which releases of SGLang the plugin takes."""

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from eplb_async.integrations import registration, sglang_plugin


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty package named sglang."""
    (tmp_path / "sglang").mkdir()
    init = tmp_path / "sglang" / "__init__.py"
    init.touch()
    monkeypatch.setattr(registration, "import_module", lambda name: SimpleNamespace(__file__=str(init)))


def found(monkeypatch: pytest.MonkeyPatch, release: str) -> str:
    """What speaks against a release."""
    monkeypatch.setattr(metadata, "version", lambda name: release)
    return sglang_plugin._misfit()


def test_another_release_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which are known, and how to try it."""
    why = found(monkeypatch, "0.5.24")
    assert why.startswith("SGLang 0.5.24 is not one of the releases")
    assert "0.5.23" in why
    assert "EPLB_ASYNC_INTEGRATION_ANY_VERSION=1" in why


@pytest.mark.parametrize("release", ["0.5.23", "0.5.23+cu129"])
def test_the_source_of_a_known_release_is_looked_at(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    """A known number is not enough: this package has none of what is needed."""
    assert "eplb_manager.py cannot be read" in found(monkeypatch, release)


def test_any_version_is_looked_at_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number does not matter then; the source does."""
    monkeypatch.setenv("EPLB_ASYNC_INTEGRATION_ANY_VERSION", "1")
    assert "eplb_manager.py cannot be read" in found(monkeypatch, "0.6.0")


def test_an_engine_that_is_no_installed_package_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is raised into the engine's import."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert "cannot be told" in sglang_plugin._misfit()

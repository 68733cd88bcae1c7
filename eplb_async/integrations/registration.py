"""How a plugin gets into an engine's processes: asked for once, only where it is wanted, only in a release that is known.

engine loads its plugins  ->  register_once  ->  the engine imports its balancer  ->  misfit?  ->  the plugin puts its own there
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

from eplb_async.core.errors import EplbError
from eplb_async.integrations.engine_group import engine_settings
from eplb_async.integrations.import_hook import when_imported
from eplb_async.integrations.source_check import Expectation, SourceTree, problems

__all__ = ["Engine", "misfit", "register_once"]

_registered: set[str] = set()
"""Packages whose plugin has done its work in this process."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine, and what of it was looked at.

    Attributes:
        name: for people.
        package: of Python, and the distribution's name.
        releases: known ones, each as `release_of` gives it.
        release_of: the part of a version that tells a release.
    """

    name: str
    package: str
    releases: tuple[str, ...]
    release_of: Callable[[str], str]

    @property
    def logger(self) -> logging.Logger:
        """A child of the engine's logger: its handlers and level are what the operator reads."""
        return logging.getLogger(f"{self.package}.eplb_async")

    def stays(self, why: object) -> None:
        """Warn that the engine is left alone."""
        self.logger.warning("eplb_async: %s's own EPLB stays: %s", self.name, why)

    def taken(self) -> None:
        """Say that our class is in its place."""
        self.logger.info("eplb_async takes the place of %s's EPLB where --enable-eplb is given", self.name)


def register_once(engine: Engine, module: str, install: Callable[[ModuleType], None]) -> None:
    """Have `install` called when the engine imports the module. Called any number of times, it does so once. Never raises."""
    if engine.package in _registered:
        return
    _registered.add(engine.package)
    try:
        settings = engine_settings()
    except EplbError as error:
        engine.stays(error)
        return
    if not settings.integration.enabled:
        engine.logger.info(
            "eplb_async is switched off (EPLB_ASYNC_INTEGRATION_ENABLED); %s's own EPLB stays", engine.name
        )
        return
    when_imported(module, install)


def misfit(engine: Engine, expectations: Iterable[Expectation]) -> str:
    """Why the installed engine is left alone, or ""."""
    try:
        release = metadata.version(engine.package)
    except metadata.PackageNotFoundError:
        return "its release cannot be told, since it is not installed as a package"
    if not engine_settings().integration.any_version and engine.release_of(release) not in engine.releases:
        return (
            f"{engine.name} {release} is not one of the releases that this version was checked against "
            f"({', '.join(engine.releases)}); EPLB_ASYNC_INTEGRATION_ANY_VERSION=1 tries it all the same"
        )
    package = Path(str(import_module(engine.package).__file__)).parent
    found = problems(SourceTree.of_folder(package), expectations)
    return f"{engine.name} {release} differs from what this version knows: {'; '.join(found)}" if found else ""

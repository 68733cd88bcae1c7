"""Do something when a module is imported, without importing it: most processes of an engine that load a plugin never do."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["when_imported"]


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call `act` with the module once it has been executed; at once if it has been already.

    An exception of `act` reaches whoever imports the module.
    """
    if name in sys.modules:
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, act))


class _Finder(MetaPathFinder):
    """Finds one module by asking all others, and wraps its loader, until the module has been executed."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self._name, self._act = name, act
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See MetaPathFinder."""
        if fullname != self._name or self._asking:
            return None
        self._asking = True  # else find_spec would come back here
        try:
            spec = find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._executed)
        return spec

    def _executed(self, module: ModuleType) -> None:
        # only now: who merely asks for a spec must not use the hook up
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._act(module)


class _Loader(Loader):
    def __init__(self, loader: Loader, executed: Callable[[ModuleType], None]) -> None:
        self._loader, self._executed = loader, executed

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = module.__loader__ = self._loader  # what others see is the module's own
        self._loader.exec_module(module)
        self._executed(module)

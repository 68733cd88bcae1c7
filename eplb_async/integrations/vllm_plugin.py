"""vLLM balances with us: `pip install eplb-async`, `--enable-eplb`, nothing else.

vLLM loads this in each of its processes (entry point group vllm.general_plugins). In those that import its EplbState, a subclass takes
the place of the class. Its instances attach to our group when a model is added, on all ranks or on none; see vllm_state.py.

If anything does not fit, a warning says what, and vLLM's own EPLB stays: all of it, or nothing of it.
"""

import logging
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

from eplb_async.core.errors import EplbError
from eplb_async.integrations.engine_group import engine_settings
from eplb_async.integrations.import_hook import when_imported
from eplb_async.integrations.source_check import SourceTree, problems
from eplb_async.integrations.vllm_surface import KNOWN_RELEASES, expectations

__all__ = ["register"]

STATE_MODULE = "vllm.distributed.eplb.eplb_state"
# a child of vLLM's logger: its handlers and level are what the operator reads
logger = logging.getLogger("vllm.eplb_async")
_registered = False


def register() -> None:
    """The entry point. Called any number of times, it does its work once for each process. Never raises."""
    global _registered  # noqa: PLW0603
    if _registered:
        return
    _registered = True
    try:
        settings = engine_settings()
    except EplbError as error:
        logger.warning("eplb_async: vLLM's own EPLB stays: %s", error)
        return
    if not settings.integration.enabled:
        logger.info("eplb_async is switched off (EPLB_ASYNC_INTEGRATION_ENABLED); vLLM's own EPLB stays")
        return
    when_imported(STATE_MODULE, _replace)


def _replace(module: ModuleType) -> None:
    """Put our class where vLLM's is, in its own module and wherever its name has been imported from there."""
    if why := _misfit():
        logger.warning("eplb_async: vLLM's own EPLB stays: %s", why)
        return
    from eplb_async.integrations.vllm_state import state_class

    theirs = module.EplbState
    ours = state_class(theirs)
    for other in list(sys.modules.values()):
        if getattr(other, "__dict__", {}).get("EplbState") is theirs:
            setattr(other, "EplbState", ours)  # noqa: B010
    logger.info("eplb_async takes the place of vLLM's EPLB where --enable-eplb is given")


def _misfit() -> str:
    """Why this vLLM is left alone, or ""."""
    import vllm

    try:
        release = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return "its release cannot be told, since it is not installed as a package"
    known = ", ".join(f"{major}.{minor}" for major, minor in KNOWN_RELEASES)
    if not engine_settings().integration.any_version and _release(release) not in KNOWN_RELEASES:
        return (
            f"vLLM {release} is not one of the releases that this version was checked against ({known}); "
            "EPLB_ASYNC_INTEGRATION_ANY_VERSION=1 tries it all the same"
        )
    found = problems(SourceTree.of_folder(Path(str(vllm.__file__)).parent), expectations())
    return f"vLLM {release} differs from what this version knows: {'; '.join(found)}" if found else ""


def _release(text: str) -> tuple[int, ...]:
    """(0, 26) of "0.26.0" and "0.26.1.dev3+gabc"."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())

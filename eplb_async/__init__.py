"""eplb_async: expert-parallel load balancing for Mixture-of-Experts inference, without stopping it.

    from eplb_async import MoESpec, RankHook, share_weights

The names below are loaded at first use, so that the daemon, which needs neither, does not load torch or numba.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eplb_async.core.errors import EplbError
    from eplb_async.core.spec import MoESpec
    from eplb_async.rank.dispatch import map_and_count
    from eplb_async.rank.hook import RankHook
    from eplb_async.rank.transfer.shm import share_weights

__all__ = ["EplbError", "MoESpec", "RankHook", "__version__", "map_and_count", "share_weights"]

__version__ = "0.1.0"

_HOMES = {
    "EplbError": "eplb_async.core.errors",
    "MoESpec": "eplb_async.core.spec",
    "RankHook": "eplb_async.rank.hook",
    "map_and_count": "eplb_async.rank.dispatch",
    "share_weights": "eplb_async.rank.transfer.shm",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)

"""Configurations of a replay: settings files, and some that have names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eplb_async.core.config import Settings, load_settings
from eplb_async.core.daemon_settings import EAGER
from eplb_async.core.errors import ConfigError, UnknownName

__all__ = ["PRESETS", "configurations"]

PRESETS: dict[str, Mapping[str, Any]] = {
    # vLLM's defaults: the load of 1000 steps, every 3000 steps, all layers, whatever that gains
    "vllm": {
        **EAGER,
        "window_steps": 1000,
        "num_windows": 1,
        "interval_steps": 3000,
        "par_threshold": 1.0,
        "min_gain": 0.0,
        "regret_windows": 0,
    },
    # the settings as they are by default
    "ours": {},
    "still": {**EAGER, "par_threshold": 1e9},
}
"""Settings of the table `daemon` by name: vLLM's schedule, what we recommend, and a daemon that never moves anything."""


def configurations(files: Sequence[Path], presets: Sequence[str]) -> list[tuple[str, Settings]]:
    """Name and settings of each, presets first; without any, vLLM's schedule and ours. Variables EPLB_ASYNC_* are not read.

    Raises:
        UnknownName: no such preset.
        ConfigError: a file is bad, or two configurations have one name.
    """
    if not files and not presets:
        presets = ["vllm", "ours"]
    found = []
    for name in presets:
        if name not in PRESETS:
            raise UnknownName("preset", name, list(PRESETS))
        found.append((name, load_settings(environ={}, overrides={"daemon": PRESETS[name]})))
    found += [(path.stem, load_settings(path, environ={})) for path in files]
    names = [name for name, _ in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(name, "is the name of two configurations; a file is named by its stem")
    return found

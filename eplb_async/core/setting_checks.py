"""Checks of settings, for `__post_init__`: a ValueError names the field and what it must be."""

from typing import Any

import msgspec

__all__ = ["at_least", "plain", "positive"]


def at_least(settings: msgspec.Struct, least: float, *names: str) -> None:
    """Each of the fields is a number of at least so much."""
    for name in names:
        if not getattr(settings, name) >= least:  # nan is not
            raise ValueError(f"`{name}` is {getattr(settings, name)}; it must be at least {least}")


def plain(options: dict[str, Any]) -> None:
    """They reach children and workers as JSON, which has no inf, nan or dates."""
    if msgspec.json.decode(msgspec.json.encode(options)) != options:
        raise ValueError("`policy_options` holds a number or date that JSON cannot hold (such as inf)")


def positive(settings: msgspec.Struct, *names: str) -> None:
    """Each of the fields is more than 0."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"`{name}` is {getattr(settings, name)}; it must be more than 0")

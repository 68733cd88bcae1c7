"""What tests of a real daemon wait for."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

from eplb_async.runtime.client import ControlClient
from eplb_async.runtime.messages import GroupStatus

__all__ = ["DEADLINE_S", "Start", "group_of", "until", "with_windows"]

Start = Callable[..., subprocess.Popen[Any]]
DEADLINE_S = 30.0


def until(condition: Callable[[], Any], what: str) -> Any:
    """The condition's first true value, waited for in the other processes."""
    end = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(0.01)
    return found


def group_of(client: ControlClient, group: str, state: str = "serving") -> GroupStatus | None:
    """The group's status if it is in that state."""
    return next((g for g in client.status().groups if g.group == group and g.state == state), None)


def with_windows(client: ControlClient, group: str) -> GroupStatus | None:
    """The group's status once it has windows."""
    found = group_of(client, group)
    return found if found is not None and found.windows == 3 else None

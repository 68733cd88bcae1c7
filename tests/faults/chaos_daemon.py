"""Daemons of the chaos harness: the real one on a clock that can be made to jump, and one of another version.

    python -m tests.faults.chaos_daemon KIND JUMPS READY_FD

KIND `normal`; `layout`: a release whose shared memory has another layout version; `plans`: one whose plans have a field
that these ranks do not know. JUMPS is a file with two numbers: seconds that the monotonic and the wall clock are ahead.
"""

import struct
import sys
from pathlib import Path
from typing import Any

import msgspec

from eplb_async.core import clock
from eplb_async.core.config import load_settings
from eplb_async.core.plan import Plan
from eplb_async.runtime import daemon, publisher, serve
from eplb_async.shm import layout

__all__ = ["JUMPS", "KINDS", "main"]

KINDS = ("normal", "layout", "plans")
JUMPS = struct.Struct("<2d")


class _JumpingClock(clock.SystemClock):
    """The machine's clocks, ahead by what the file says now."""

    path: Path

    def monotonic_s(self) -> float:
        """As after a suspend: only ever forward."""
        return super().monotonic_s() + self._ahead()[0]

    def unix_s(self) -> float:
        """As after somebody has set it: either way."""
        return super().unix_s() + self._ahead()[1]

    def _ahead(self) -> tuple[float, float]:
        monotonic_s, unix_s = JUMPS.unpack(self.path.read_bytes())
        return monotonic_s, unix_s


class _LaterPlan(Plan, frozen=True, kw_only=True):
    colour: str = "red"


def _later_plan(plan: Plan) -> bytes:
    fields: dict[str, Any] = {name: getattr(plan, name) for name in plan.__struct_fields__}
    return msgspec.msgpack.encode(_LaterPlan(**fields))


def main(kind: str, jumps: str, ready_fd: int) -> None:
    """Serve."""
    _JumpingClock.path = Path(jumps)
    setattr(daemon, "SystemClock", _JumpingClock)  # noqa: B010 (the daemon has no setting for its clock)
    if kind == "layout":
        layout.VERSION += 1
    elif kind == "plans":
        setattr(publisher, "encode_plan", _later_plan)  # noqa: B010
    serve.run_daemon(load_settings, ready_fd)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

"""Messages between the daemon and its policy workers: a length, then MessagePack. Never pickle.

    u32 little-endian length | body

A request is WarmUp or Plan, its answer WarmedUp, Planned or Refused; one at a time, in order.
"""

import struct

import msgspec

from eplb_async.runtime.planner import PlanProposal, PlanRequest

__all__ = ["HEADER", "MAX_FRAME", "Answer", "Planned", "Refused", "Request", "RunPlan", "WarmUp", "WarmedUp", "frame"]

HEADER = struct.Struct("<I")
MAX_FRAME = 1 << 30
"""Longer frames are nonsense: 8 windows of 94 layers and 512 experts are 3 MB."""


class WarmUp(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Import and compile a policy; `weighted`: also what fits dispatch tables."""

    policy: str
    weighted: bool = False


class RunPlan(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Make a plan."""

    request: PlanRequest


class WarmedUp(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The policy is ready; `seconds` it took."""

    seconds: float


class Planned(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The proposal."""

    proposal: PlanProposal


class Refused(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """It raised: `kind` is the class of core/errors.py, or of our bug, `message` its text."""

    kind: str
    message: str


Request = WarmUp | RunPlan
Answer = WarmedUp | Planned | Refused


def frame(message: Request | Answer) -> bytes:
    """The bytes of one message."""
    body = msgspec.msgpack.encode(message)
    return HEADER.pack(len(body)) + body

"""A worker process for policies: `python -m eplb_async.runtime.pool_worker`, started by pool.py and by nobody else.

It reads requests from its standard input and answers on what was its standard output; whatever a policy prints goes to
standard error instead, so that it cannot break the protocol. It ends when its input does, and the kernel kills it when
the daemon dies, even in the middle of a policy that never returns.
"""

import ctypes
import os
import signal
import sys
import time
from typing import BinaryIO

import msgspec

from eplb_async.core.clock import SystemClock
from eplb_async.core.errors import EplbError, PolicyError
from eplb_async.runtime.frames import HEADER, Answer, Planned, Refused, Request, WarmedUp, WarmUp, frame
from eplb_async.runtime.planner import make_plan

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
NICENESS = 10


def main() -> None:
    """Serve requests until the input ends."""
    parent = int(sys.argv[1])
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it died before we asked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the daemon's to handle
    os.nice(NICENESS)
    # the answers get a descriptor of their own; 1 becomes standard error for everybody else, native code included
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    decoder = msgspec.msgpack.Decoder(Request)
    while body := _read(requests):
        answers.write(frame(_answer(decoder.decode(body))))
        answers.flush()


def _read(file: BinaryIO) -> bytes:
    """The body of the next frame; empty at the end of the input."""
    head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        return b""
    (length,) = HEADER.unpack(head)
    body = file.read(length)
    return body if len(body) == length else b""


def _answer(request: Request) -> Answer:
    try:
        if isinstance(request, WarmUp):
            return _warm_up(request.policy, request.weighted)
        return Planned(make_plan(request.request, SystemClock()))
    except PolicyError as error:
        return Refused("PolicyError", error.why)
    except EplbError as error:
        return Refused(type(error).__name__, str(error))
    except Exception as error:  # noqa: BLE001 - told to the daemon, which fails the decision with it
        return Refused(type(error).__name__, f"{type(error).__name__}: {error}")


def _warm_up(policy: str, weighted: bool) -> WarmedUp:
    from eplb_async.policies import dispatch
    from eplb_async.policies.registry import load_policy

    start = time.perf_counter()
    load_policy(policy).warm_up()
    if weighted:
        dispatch.warm_up()
    return WarmedUp(time.perf_counter() - start)


if __name__ == "__main__":
    main()

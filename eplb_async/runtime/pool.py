"""The process pool that runs policies: fresh interpreters, warmed up, each with a deadline, killed and replaced if stuck.

    STARTING -> warm-up -> idle <-> busy -> (answer) idle
                                     `----> (deadline, crash) killed; another one starts

A policy is somebody's code: it may raise, print, crash the interpreter or never return. None of that reaches the daemon:
it gets a proposal or a PolicyError. Numerics are single-threaded, at low priority: the ranks' processes need the cores.
"""

import asyncio
import contextlib
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import msgspec

import eplb_async
from eplb_async.core import errors
from eplb_async.core.config import child_environment
from eplb_async.core.errors import EplbError, InternalError, PolicyError
from eplb_async.policies.dispatch import wants_weights
from eplb_async.runtime.frames import HEADER, MAX_FRAME, Answer, Planned, Refused, Request, RunPlan, WarmUp, frame
from eplb_async.runtime.planner import PlanProposal, PlanRequest

__all__ = ["PolicyPool", "PoolStatistics"]

logger = logging.getLogger(__name__)

WARM_UP_DEADLINE_S = 180.0
"""numba compiles for tens of seconds on a busy machine when its cache is cold."""
END_S = 2.0
"""How long a worker whose pipe has ended may take to end."""
RETRY_S = 1.0
"""Pause before a worker that died while idle or starting is replaced: no spinning on a broken interpreter."""
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


class PoolStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Workers that are alive, their process ids, plans made, policies refused, and workers killed or lost."""

    pids: list[int]
    num_idle: int
    num_plans: int
    num_refused: int
    num_replaced: int


class _WorkerDied(Exception):
    """The worker's pipe ended, or what it sent is no answer."""


class _Worker:
    """One process. `warm`: the policy that it has warmed up, and whether weighted dispatch too."""

    def __init__(self, process: Process) -> None:
        self.process, self.warm = process, ("", False)
        self._decoder = msgspec.msgpack.Decoder(Answer)

    @classmethod
    async def start(cls, cache: Path) -> "_Worker":
        root = str(Path(eplb_async.__path__[0]).parent)
        command = (sys.executable, "-m", "eplb_async.runtime.pool_worker", str(os.getpid()))
        environment = child_environment(_ENVIRONMENT | {"NUMBA_CACHE_DIR": str(cache)}, python_path=root)
        return cls(await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=environment))

    async def call(self, message: Request, deadline_s: float) -> Answer:
        """Send a request and wait for its answer.

        Raises:
            TimeoutError: none came in time; the worker must be killed.
            _WorkerDied: it ended, or broke the protocol.
        """
        requests, answers = self.process.stdin, self.process.stdout
        if requests is None or answers is None:
            raise InternalError("a policy worker was started without pipes")
        try:
            async with asyncio.timeout(deadline_s):
                requests.write(frame(message))
                await requests.drain()
                (length,) = HEADER.unpack(await answers.readexactly(HEADER.size))
                if length > MAX_FRAME:
                    raise _WorkerDied(f"it sent a frame of {length} bytes")
                answer: Answer = self._decoder.decode(await answers.readexactly(length))
                return answer
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError) as error:
            raise _WorkerDied(str(error)) from error

    async def warm_up(self, policy: str, *, weighted: bool = False) -> None:
        """Warm a policy up, and weighted dispatch if asked; a policy that cannot be warmed up says so again when it plans."""
        weighted = weighted or self.warm[1]
        if self.warm == (policy, weighted):
            return
        answer = await self.call(WarmUp(policy, weighted), WARM_UP_DEADLINE_S)
        self.warm = policy, weighted
        if isinstance(answer, Refused):
            logger.error("policy %r cannot be warmed up: %s", policy, answer.message)

    async def ended(self) -> int:
        """Exit status of a process whose pipe has ended; killed if it does not end by itself."""
        # a kill would poll, and may reap the process before the loop's own watcher does, who then knows no status
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                return await self.process.wait()
        return await self.kill()

    async def kill(self) -> int:
        """End the process; returns its exit status."""
        if self.process.returncode is None:
            self.process.kill()
        if self.process.stdin is not None:
            self.process.stdin.close()
        return await self.process.wait()


class PolicyPool:
    """Workers for one daemon, owned by `run`. `plan` may be called by any number of tasks of the same loop."""

    def __init__(self, num_workers: int, policy: str, cache: Path) -> None:
        """`cache`: a folder for compiled policies, this host's and user's alone; made when needed."""
        self._num_workers, self._policy, self._cache = num_workers, policy, cache
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._alive: set[_Worker] = set()
        self._missing = asyncio.Semaphore(num_workers)
        self._plans = self._refused = self._replaced = 0

    async def run(self) -> None:
        """Keep the workers running until cancelled, then kill them all. Run it in the daemon's TaskGroup."""
        try:
            while True:
                await self._missing.acquire()
                try:
                    await self._start_one()
                except (_WorkerDied, TimeoutError, OSError) as error:
                    logger.warning("a policy worker did not start (%s); another one follows", str(error) or "too slow")
                    self._replaced += 1
                    self._missing.release()
                    await asyncio.sleep(RETRY_S)
        finally:
            for worker in list(self._alive):
                await worker.kill()
            self._alive.clear()

    @property
    def ready(self) -> bool:
        """True if a worker is idle and warmed up, so that a plan would begin at once."""
        return not self._idle.empty()

    def warm_up_next(self, policy: str) -> None:
        """Start new workers with this policy from now on; others warm it up when they first need it."""
        self._policy = policy

    async def plan(self, request: PlanRequest, deadline_s: float) -> PlanProposal:
        """Make a plan in a worker; the deadline counts from when one is free.

        Raises:
            PolicyError: the policy raised, its result was invalid, it took too long, or its process died.
            EplbError: the request was refused for another reason, such as an unknown policy.
        """
        worker, done = await self._living_worker(), False
        try:
            await worker.warm_up(request.policy, weighted=wants_weights(request.options))
            answer = await worker.call(RunPlan(request), deadline_s)
            done = True
        except TimeoutError as error:
            raise PolicyError(request.policy, f"did not answer within {deadline_s:g} s and was killed") from error
        except _WorkerDied as error:
            status = await worker.ended()
            raise PolicyError(request.policy, f"ended its worker process (exit status {status})") from error
        finally:
            if done:
                self._idle.put_nowait(worker)
            else:
                await asyncio.shield(self._discard(worker))
        return self._result(request, answer)

    def statistics(self) -> PoolStatistics:
        """See PoolStatistics."""
        return PoolStatistics(
            pids=sorted(worker.process.pid for worker in self._alive),
            num_idle=self._idle.qsize(),
            num_plans=self._plans,
            num_refused=self._refused,
            num_replaced=self._replaced,
        )

    async def _living_worker(self) -> _Worker:
        """An idle worker; those that died while idle are replaced."""
        while True:
            worker = await self._idle.get()
            if worker.process.returncode is None:
                return worker
            logger.error(
                "policy worker %d died while idle (exit status %s)", worker.process.pid, worker.process.returncode
            )
            await self._discard(worker)

    async def _start_one(self) -> None:
        worker = await _Worker.start(self._cache)
        self._alive.add(worker)
        try:
            await worker.warm_up(self._policy)
        except (_WorkerDied, TimeoutError):
            self._alive.discard(worker)
            await worker.kill()
            raise
        self._idle.put_nowait(worker)

    async def _discard(self, worker: _Worker) -> None:
        self._alive.discard(worker)
        await worker.kill()
        self._replaced += 1
        self._missing.release()

    def _result(self, request: PlanRequest, answer: Answer) -> PlanProposal:
        if isinstance(answer, Planned):
            self._plans += 1
            return answer.proposal
        self._refused += 1
        if not isinstance(answer, Refused):
            raise InternalError(f"a policy worker answered a plan with {type(answer).__name__}")
        kind = getattr(errors, answer.kind, None)
        if isinstance(kind, type) and issubclass(kind, EplbError) and kind is not PolicyError:
            raise EplbError(answer.message)
        raise PolicyError(request.policy, answer.message)

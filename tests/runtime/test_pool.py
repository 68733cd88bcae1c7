"""Whatever a policy does, the daemon gets a proposal or an error in time, and the next request is served."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from eplb_async.core.errors import EplbError, PolicyError
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.runtime.planner import PackedArray, PlanRequest
from eplb_async.runtime.pool import PolicyPool
from eplb_async.shm.layout import process_start

__all__: list[str] = []

SPEC = MoESpec(num_layers=2, num_experts=8, num_ranks=4, num_redundant=4)


def request_for(policy: str, **options: Any) -> PlanRequest:
    """A request with skewed load."""
    windows_TLE = np.tile(np.arange(8.0, 0.0, -1.0) ** 3, (2, 2, 1))
    return PlanRequest(
        policy=policy,
        options=options,
        state=b"",
        spec=SPEC,
        staging_rows=2,
        slot_bytes=[10, 10],
        generation=1,
        windows=PackedArray.pack(windows_TLE),
        placement=PackedArray.pack(initial_placement(SPEC)),
        versions=[0, 0],
        min_gain=0.0,
        capacity=1 << 16,
    )


@contextlib.asynccontextmanager
async def running(directory: Path, num_workers: int = 1) -> AsyncIterator[PolicyPool]:
    """A pool for the length of a block."""
    pool = PolicyPool(num_workers, "t-greedy", directory / "cache")
    task = asyncio.create_task(pool.run())
    try:
        yield pool
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_plan_comes_back_whole(policies_path: Path) -> None:
    """A policy in a worker gives entries, the policy's state, and numbers; its time is measured."""
    async with running(policies_path) as pool:
        proposal = await pool.plan(request_for("t-greedy"), 30)
    assert proposal.entries
    assert proposal.state == b"seen"
    assert proposal.par_after < proposal.par_before
    assert proposal.policy_s > 0


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("t-raises", "raised RuntimeError: boom"),
        ("t-invalid", "returned an invalid placement"),
        ("t-crashes", r"ended its worker process \(exit status 3\)"),
        ("t-hangs", "did not answer within 0.5 s and was killed"),
    ],
)
async def test_bad_policy_is_an_error_and_the_next_plan_works(policies_path: Path, policy: str, message: str) -> None:
    """A policy that raises, returns nonsense, crashes or hangs is a PolicyError; a fresh worker serves the next one."""
    async with running(policies_path) as pool:
        with pytest.raises(PolicyError, match=message):
            await pool.plan(request_for(policy), 0.5)
        before = pool.statistics()
        assert (await pool.plan(request_for("t-greedy"), 30)).entries
        assert before.num_replaced == (policy in ("t-crashes", "t-hangs"))


async def test_stuck_worker_is_killed(policies_path: Path) -> None:
    """After the deadline the process of a policy that never returns is gone."""
    async with running(policies_path) as pool:
        await pool.plan(request_for("t-greedy"), 30)
        (pid,) = pool.statistics().pids
        with pytest.raises(PolicyError):
            await pool.plan(request_for("t-hangs"), 0.2)
        assert process_start(pid) == 0


async def test_prints_do_not_break_the_protocol(policies_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a policy prints, from Python or native code, goes to standard error."""
    async with running(policies_path) as pool:
        proposal = await pool.plan(request_for("t-prints"), 30)
    assert proposal.entries == []
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "noise" in captured.err
    assert "native noise" in captured.err


@pytest.mark.parametrize(
    ("change", "message"), [({"policy": "no-such"}, "unknown policy"), ({"options": {"x": 1}}, "x")]
)
async def test_wrong_settings_are_named(policies_path: Path, change: dict[str, Any], message: str) -> None:
    """An unknown policy or option is an error that names it, not a PolicyError of a broken policy."""
    async with running(policies_path) as pool:
        with pytest.raises(EplbError, match=message):
            await pool.plan(msgspec.structs.replace(request_for("t-greedy"), **change), 30)


async def test_worker_killed_while_idle_is_replaced(policies_path: Path) -> None:
    """Somebody kills an idle worker: the next plan is made by another one."""
    async with running(policies_path) as pool:
        await pool.plan(request_for("t-greedy"), 30)
        (pid,) = pool.statistics().pids
        os.kill(pid, signal.SIGKILL)
        try:
            proposal = await pool.plan(request_for("t-greedy"), 30)
        except PolicyError:
            # its death was not known yet when the request went out
            proposal = await pool.plan(request_for("t-greedy"), 30)
        assert proposal.entries
        assert pool.statistics().pids != [pid]


async def test_no_worker_outlives_the_pool(policies_path: Path) -> None:
    """Ending the pool ends its processes, a busy one too."""
    async with running(policies_path, 2) as pool:
        await pool.plan(request_for("t-greedy"), 30)
        busy = asyncio.create_task(pool.plan(request_for("t-hangs"), 60))
        # a second one is answered only by the other worker
        await pool.plan(request_for("t-greedy"), 30)
        pids = pool.statistics().pids
        busy.cancel()
        await asyncio.wait([busy])
    assert [process_start(pid) for pid in pids] == [0, 0]

"""Shadow mode: decisions as ever, nothing moved, and what would have been gained is what a real run gains."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eplb_async.core.config import Settings
from eplb_async.core.spec import MoESpec
from eplb_async.observability.history import Outcome
from eplb_async.runtime.client import ControlClient
from eplb_async.runtime.messages import ShadowStatus
from eplb_async.shm.live import LivePlacement
from tests.runtime.watching import group_of, until, with_windows

__all__: list[str] = []

Start = Callable[..., subprocess.Popen[Any]]


def write_settings(path: Path, *, shadow: bool) -> None:
    """A file of settings; variables of the test go before it."""
    path.write_text(f"[daemon]\nshadow = {str(shadow).lower()}\n")


def versions(group: str, spec: MoESpec) -> list[int]:
    """Of the live placement that the ranks have."""
    live = LivePlacement.open(group, spec, 1)
    snapshot = live.read()
    live.close()
    assert snapshot is not None
    return list(map(int, snapshot[1]))


def test_plans_are_made_and_not_applied_and_promise_what_a_real_run_gains(
    start_daemon: Start,
    start_ranks: Start,
    daemon_settings: Settings,
    group: str,
    spec: MoESpec,
    tmp_path: Path,
) -> None:
    """A shadow's plan is committed by no rank; the second finds nothing more to gain; the real plan then gains the same."""
    config = tmp_path / "shadow.toml"
    write_settings(config, shadow=True)
    start_daemon("--config", str(config))
    start_ranks()
    with ControlClient(daemon_settings) as client:
        before = until(lambda: with_windows(client, group), "windows")
        planned = client.rebalance(group)
        assert (planned.outcome, planned.shadow) == (Outcome.FINISHED, True)
        assert planned.num_committed == planned.num_entries > 0
        assert versions(group, spec) == [0] * spec.num_layers
        again = client.rebalance(group)
        assert again.outcome is Outcome.NOTHING_PAYS

        def counted() -> ShadowStatus | None:
            status = group_of(client, group)
            shadow = status.shadow if status is not None else None
            return shadow if shadow is not None and shadow.windows >= 40 else None

        shadow = until(counted, "windows of the shadow")
        assert (shadow.plans, shadow.moves, shadow.bytes_moved) == (1, planned.num_moves, planned.bytes_moved)
        assert shadow.par_live == pytest.approx(before.par_live, abs=0.02)
        assert shadow.par_shadow is not None
        assert shadow.par_shadow < shadow.par_live - 0.1

        write_settings(config, shadow=False)
        client.reload()
        applied = client.rebalance(group)
        assert (applied.outcome, applied.shadow) == (Outcome.FINISHED, False)
        assert all(versions(group, spec))
        assert applied.num_moves == planned.num_moves
        assert applied.par_predicted == pytest.approx(planned.par_predicted, abs=0.02)
        status = group_of(client, group)
        assert status is not None
        assert status.shadow is None


def test_status_tells_of_a_shadow(
    start_daemon: Start, start_ranks: Start, group: str, daemon_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For people: what was served, what would have been, and which decisions are the shadow's."""
    monkeypatch.setenv("EPLB_ASYNC_DAEMON_SHADOW", "1")
    start_daemon()
    start_ranks()
    with ControlClient(daemon_settings) as client:
        until(lambda: with_windows(client, group), "windows")
        client.rebalance(group)
    shown = subprocess.run(
        [sys.executable, "-m", "eplb_async", "status"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "shadow: PAR" in shown.stdout
    assert "had plans been applied" in shown.stdout
    assert "(shadow)" in shown.stdout

"""The daemon in a process of its own, with ranks in others: it finds, follows, tells, and never gets in the way."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from eplb_async.core.config import Settings
from eplb_async.core.errors import ControlError
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.observability.history import Decision, Outcome
from eplb_async.runtime.client import ControlClient
from eplb_async.shm.launch import daemon_running, group_lock_path, socket_path
from eplb_async.shm.live import LivePlacement
from tests.runtime.stand_in import StandInGroup, StandInOptions, group_info
from tests.runtime.watching import DEADLINE_S, Start, group_of, until, with_windows

__all__: list[str] = []


def test_rebalance_from_load_to_realised_par(
    start_daemon: Start, start_ranks: Start, daemon_settings: Settings, group: str, spec: MoESpec
) -> None:
    """Found, watched, rebalanced on request, committed by all ranks, measured, and written down; nothing is lost."""
    start_daemon()
    start_ranks()
    with ControlClient(daemon_settings) as client:
        before = until(lambda: with_windows(client, group), "windows")
        assert before.par_live is not None
        predicted = client.rebalance(group, dry_run=True)
        assert predicted.outcome is Outcome.DRY_RUN
        decision = client.rebalance(group)
        assert decision.outcome is Outcome.FINISHED
        assert decision.num_committed == decision.num_entries > 0
        assert decision.par_predicted is not None
        assert decision.par_predicted < before.par_live - 0.1
        assert decision.trigger_to_last_commit_s is not None
        assert decision.publish_to_first_stage_s is not None

        def realised() -> Decision | None:
            kept = client.history(group)[group][-1]
            return kept if kept.par_realised is not None else None

        assert until(realised, "realised PAR").par_realised == pytest.approx(decision.par_predicted, abs=0.02)
        assert client.rebalance(group).outcome is Outcome.NOTHING_PAYS
        after = until(lambda: with_windows(client, group), "windows after")
        assert after.par_live == pytest.approx(decision.par_predicted, abs=0.02)
        assert after.lost_records == 0
        assert after.phases.keys() == {"decode"}
        assert after.phases["decode"] > 30 * spec.num_ranks
        assert (after.serves, after.generation) == ("all", 2)
        assert until(lambda: (g := group_of(client, group)) and g.cost, "step times").step_ms >= 2
        assert client.status().loop_lag_worst_s < 2


def test_trigger_fires_by_itself_and_pause_stops_it(
    start_daemon: Start, start_ranks: Start, daemon_settings: Settings, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With PAR above the threshold a plan comes after the interval; while paused none does."""
    monkeypatch.setenv("EPLB_ASYNC_DAEMON_INTERVAL_STEPS", "50")
    start_daemon()
    start_ranks()
    with ControlClient(daemon_settings) as client:

        def finished() -> list[Decision]:
            return [d for d in client.history().get(group, []) if d.outcome is Outcome.FINISHED]

        assert "PAR" in until(finished, "a plan")[0].trigger
        assert client.pause() == [group]
        assert group_of(client, group, "paused") is not None
        assert client.resume(group) == [group]


def test_a_harmful_plan_is_taken_back(
    start_daemon: Start, start_ranks: Start, daemon_settings: Settings, group: str, spec: MoESpec
) -> None:
    """Traffic turns against the plan as soon as it is committed: it is judged, its layers go back to their rows, once, and the history says why."""
    start_daemon()
    start_ranks(spites=True)
    with ControlClient(daemon_settings) as client:
        until(lambda: with_windows(client, group), "windows")
        harmful = client.rebalance(group)
        assert harmful.outcome is Outcome.FINISHED

        def reverted() -> Decision | None:
            last = client.history(group)[group][-1]
            return last if last.reverts == harmful.number and last.verdict else None

        back = until(reverted, "the plan back")
        assert back.outcome is Outcome.FINISHED
        assert back.trigger.startswith(f"decision {harmful.number} harmed {len(harmful.layers)} layers")
        assert set(back.layers) == set(harmful.layers)
        assert back.par_live is not None
        assert back.par_realised is not None
        assert back.par_realised < back.par_live - 0.05
        assert back.verdict.startswith("paid")
        judged = client.history(group)[group][0]
        assert judged.verdict.startswith("harmed")
        assert judged.gain_realised is not None
        assert judged.gain_predicted is not None
        assert judged.gain_realised < 0 < judged.gain_predicted
        assert judged.trust_after is not None
        assert judged.trust_after < judged.trust == 1.0
        assert len(client.history(group)[group]) == 2
    live = LivePlacement.open(group, spec, 1)
    snapshot = live.read()
    live.close()
    assert snapshot is not None
    shape = (spec.num_layers, spec.num_ranks, spec.slots_per_rank)
    on_ranks, at_first = (np.sort(rows.reshape(shape), axis=2) for rows in (snapshot[0], initial_placement(spec)))
    assert np.array_equal(on_ranks, at_first)


def test_late_plan_is_aborted(
    start_daemon: Start, start_ranks: Start, daemon_settings: Settings, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that do not stage within the deadline are asked to drop the plan, and that is what the operator is told."""
    monkeypatch.setenv("EPLB_ASYNC_DAEMON_PLAN_DEADLINE_S", "0.2")
    start_daemon()
    start_ranks(stuck=True)
    with ControlClient(daemon_settings) as client:
        until(lambda: with_windows(client, group), "windows")
        decision = client.rebalance(group)
    assert decision.outcome is Outcome.DROPPED
    assert "not done after 0.2 s" in decision.why
    assert decision.num_committed == 0


@pytest.mark.parametrize("policy", ["t-raises", "t-hangs"])
def test_bad_policy_fails_its_decision_only(
    start_daemon: Start,
    start_ranks: Start,
    daemon_settings: Settings,
    group: str,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
) -> None:
    """A policy's error is in the decision; the daemon goes on, and the event loop was not held by it."""
    monkeypatch.setenv("EPLB_ASYNC_DAEMON_POLICY", policy)
    monkeypatch.setenv("EPLB_ASYNC_DAEMON_POLICY_DEADLINE_S", "0.3")
    start_daemon()
    start_ranks()
    with ControlClient(daemon_settings) as client:
        until(lambda: with_windows(client, group), "windows")
        decision = client.rebalance(group)
        assert decision.outcome is Outcome.FAILED
        assert policy in decision.why
        assert client.rebalance(group).outcome is Outcome.FAILED


def test_killed_daemon_is_succeeded(
    start_daemon: Start, start_ranks: Start, daemon_settings: Settings, group: str
) -> None:
    """After kill -9 the workers are gone too, and the next daemon takes the socket and the group over and rebalances."""
    first = start_daemon()
    start_ranks()
    with ControlClient(daemon_settings) as client:
        until(lambda: with_windows(client, group), "windows")
        pool = client.status().pool["pids"]
        first.kill()
        first.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pool), "the end of the pool's workers")
    start_daemon()
    with ControlClient(daemon_settings) as client:
        until(lambda: with_windows(client, group), "windows")
        assert client.rebalance(group).outcome is Outcome.FINISHED


def test_dead_ranks_end_the_group_and_are_named(
    start_daemon: Start, start_ranks: Start, daemon_settings: Settings, group: str
) -> None:
    """When the ranks' process is killed, status says which pids are gone; a request for the group is refused."""
    from eplb_async.shm.gc import collect_garbage

    start_daemon()
    ranks = start_ranks()
    with ControlClient(daemon_settings) as client:
        until(lambda: with_windows(client, group), "windows")
        ranks.kill()
        ranks.wait()
        ended = until(lambda: group_of(client, group, "ended"), "the end of the group")
        assert ended.problems == tuple(f"rank {rank} (pid {ranks.pid}) is gone" for rank in range(4))
        with pytest.raises(ControlError, match="is not served"):
            client.rebalance(group)
    assert len(collect_garbage(group)) == 7


def test_next_incarnation_is_picked_up(
    start_daemon: Start, start_ranks: Start, daemon_settings: Settings, group: str
) -> None:
    """After the ranks left, a new incarnation of the same group is served; its history goes on."""
    start_daemon()
    with ControlClient(daemon_settings) as client:
        ranks = start_ranks(incarnation=1)
        until(lambda: with_windows(client, group), "windows")
        client.rebalance(group)
        ranks.communicate()
        start_ranks(incarnation=2)
        until(lambda: (g := with_windows(client, group)) and g.incarnation == 2, "the next incarnation")
        client.rebalance(group)
        assert [(d.number, d.incarnation) for d in client.history(group)[group]] == [(1, 1), (2, 2)]


def test_sigterm_leaves_no_socket_and_status_0(
    start_daemon: Start, start_ranks: Start, daemon_settings: Settings
) -> None:
    """SIGTERM stops in order, also while ranks are served: no socket, a free lock, no worker, exit status 0."""
    daemon = start_daemon()
    start_ranks()
    with ControlClient(daemon_settings) as client:
        pool = client.status().pool["pids"]
    daemon.send_signal(signal.SIGTERM)
    _, log = daemon.communicate(timeout=DEADLINE_S)
    assert daemon.returncode == 0, log
    assert "Traceback" not in log
    assert not socket_path(daemon_settings.directory).exists()
    assert not daemon_running(daemon_settings)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pool)


def test_stopping_daemon_does_not_serve_groups_anew(
    start_daemon: Start, start_ranks: Start, daemon_settings: Settings, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Discovery, however often it looks, does not open a session for the group whose session was just closed."""
    monkeypatch.setenv("EPLB_ASYNC_DAEMON_DISCOVERY_INTERVAL_S", "1e-6")
    daemon = start_daemon()
    start_ranks()
    with ControlClient(daemon_settings) as client:
        until(lambda: group_of(client, group), "the group")
    daemon.send_signal(signal.SIGTERM)
    _, log = daemon.communicate(timeout=DEADLINE_S)
    assert daemon.returncode == 0
    assert log.count("incarnation 1 of 4 ranks") == 1


def test_second_daemon_is_refused(start_daemon: Start, daemon_settings: Settings) -> None:
    """One daemon per runtime directory; the second says so in one line and status 1."""
    start_daemon()
    second = start_daemon()
    _, log = second.communicate(timeout=DEADLINE_S)
    assert second.returncode == 1
    assert f"a daemon serves {daemon_settings.directory} already" in log
    assert "Traceback" not in log


def test_sighup_reads_settings_and_keeps_old_ones_if_bad(
    start_daemon: Start, daemon_settings: Settings, tmp_path: Path
) -> None:
    """SIGHUP takes a changed file; a wrong one is refused with its reason, and the daemon goes on as it was."""
    config = tmp_path / "eplb_async.toml"
    config.write_text("[daemon]\nmin_gain = 0.5\n")
    daemon = start_daemon("--config", str(config))
    with ControlClient(daemon_settings) as client:
        config.write_text("[daemon]\nno_such = 1\n")
        with pytest.raises(ControlError, match="no_such"):
            client.reload()
        daemon.send_signal(signal.SIGHUP)
        config.write_text("[daemon]\nmin_gain = 0.25\n")
        client.reload()
        assert client.status().pid == daemon.pid
    daemon.send_signal(signal.SIGTERM)
    _, log = daemon.communicate(timeout=DEADLINE_S)
    assert "the old ones stay" in log
    assert '"min_gain":0.25' in log


def test_systemd_is_told(start_daemon: Start, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """READY=1 once the socket answers, RELOADING=1 and READY=1 around SIGHUP, STOPPING=1 at the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(runtime_dir / "notify"))
        notify.settimeout(DEADLINE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(runtime_dir / "notify"))
        daemon = start_daemon()
        assert notify.recv(100) == b"READY=1"
        daemon.send_signal(signal.SIGHUP)
        assert [notify.recv(100), notify.recv(100)] == [b"RELOADING=1", b"READY=1"]
        daemon.send_signal(signal.SIGTERM)
        assert notify.recv(100) == b"STOPPING=1"


def test_idle_daemon_stops_by_itself(start_daemon: Start, daemon_settings: Settings) -> None:
    """Without a group for the given time it ends, with status 0."""
    daemon = start_daemon("--exit-when-idle", "0.1")
    assert daemon.wait(DEADLINE_S) == 0
    assert not daemon_running(daemon_settings)


def test_only_groups_of_the_runtime_directory_are_served(
    start_daemon: Start,
    start_ranks: Start,
    daemon_settings: Settings,
    make_group: Callable[[str], str],
    runtime_dir: Path,
) -> None:
    """Groups whose ranks use another runtime directory belong to another daemon."""
    start_ranks(group=make_group("theirs"))
    (runtime_dir / f"{make_group('theirs')}.lock").unlink()
    start_daemon()
    start_ranks(group=make_group("ours"))
    with ControlClient(daemon_settings) as client:
        until(lambda: group_of(client, make_group("ours")), "the group")
        assert [g.group for g in client.status().groups] == [make_group("ours")]


def test_worker_process_is_no_secret(start_daemon: Start, daemon_settings: Settings) -> None:
    """Policies run in processes of their own, at low priority."""
    start_daemon()
    with ControlClient(daemon_settings) as client:
        pids = until(lambda: client.status().pool["pids"], "a worker")
        until(lambda: client.status().pool["num_idle"], "its warm-up")
    assert os.getpriority(os.PRIO_PROCESS, pids[0]) >= 10


def test_groups_on_several_nodes_are_left_alone(
    start_daemon: Start,
    start_ranks: Start,
    daemon_settings: Settings,
    group: str,
    make_group: Callable[[str], str],
    spec: MoESpec,
) -> None:
    """A node's part of a group is named once in the log, not served; other groups are."""
    part = make_group("main.node0")
    ranks = StandInGroup(msgspec.structs.replace(group_info(part, spec), num_nodes=2), StandInOptions())
    group_lock_path(daemon_settings.directory, part).touch()
    try:
        daemon = start_daemon()
        start_ranks()
        with ControlClient(daemon_settings) as client:
            until(lambda: group_of(client, group), "the other group")
            assert part not in [found.group for found in client.status().groups]
        daemon.send_signal(signal.SIGTERM)
        _, log = daemon.communicate(timeout=DEADLINE_S)
    finally:
        ranks.close()
    assert log.count("it is a group's part on one of 2 nodes") == 1

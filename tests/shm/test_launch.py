"""Many ranks that ask for a daemon at once get one; it outlives them, and its death is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eplb_async.core.config import Settings, load_settings
from eplb_async.core.errors import DaemonUnavailable
from eplb_async.runtime.client import ControlClient
from eplb_async.shm import launch
from eplb_async.shm.launch import daemon_running, ensure_daemon, log_path

__all__: list[str] = []

ROOT = Path(__file__).resolve().parent.parent.parent
ASK = (
    "from eplb_async.core.config import load_settings; from eplb_async.shm.launch import ensure_daemon; "
    "print(ensure_daemon(load_settings(), 60))"
)


@pytest.fixture
def settings(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of the test's runtime directory, which children read from the environment."""
    monkeypatch.setenv("EPLB_ASYNC_RUNTIME_DIR", str(runtime_dir))
    monkeypatch.setenv("EPLB_ASYNC_DAEMON_POLICY", "random")
    return load_settings()


def test_eight_processes_at_once_start_one_daemon(settings: Settings) -> None:
    """Exactly one of them starts it, all find it ready, and it runs on when they have ended."""
    assert not daemon_running(settings)
    askers = [
        subprocess.Popen([sys.executable, "-c", ASK], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(8)
    ]
    answers = [asker.communicate(timeout=100)[0].strip() for asker in askers]
    assert sorted(answers) == ["False"] * 7 + ["True"]
    with ControlClient(settings) as client:
        pid = client.status().pid
        # it is nobody's child here and in a session of its own, so that no rank's end or signal reaches it
        assert os.getsid(pid) not in {os.getsid(0), *(asker.pid for asker in askers)}
        assert not ensure_daemon(settings)
        client.stop_daemon()
    assert not daemon_running(settings)


def test_settings_reach_the_daemon(settings: Settings) -> None:
    """A daemon that a rank starts has the rank's settings, those made in code too."""
    import msgspec

    changed = msgspec.structs.replace(settings.daemon, history_length=77, policy_options={"seed": 5})
    settings = msgspec.structs.replace(settings, daemon=changed)
    assert ensure_daemon(settings, 60)
    with ControlClient(settings) as client:
        client.stop_daemon()
    log = log_path(settings.directory).read_text()
    assert '"history_length":77' in log
    assert '"policy_options":{"seed":5}' in log
    assert f'"exit_when_idle_s":{launch.IDLE_S}' in log


def test_daemon_that_cannot_start_is_told_with_its_log(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the process ends before it is ready, the error names the log, and the log has the reason."""
    monkeypatch.setenv("EPLB_ASYNC_DAEMON_NO_SUCH", "1")
    monkeypatch.setattr(launch, "settings_environment", lambda settings: {})
    with pytest.raises(DaemonUnavailable, match=r"has ended; see .*daemon\.log"):
        ensure_daemon(settings, 60)
    assert "EPLB_ASYNC_DAEMON_NO_SUCH" in log_path(settings.directory).read_text()


def test_daemon_that_is_not_ready_in_time_is_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that never says it is ready costs no more than the deadline."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(launch, "_DETACH", "sleep 2 &")
    with pytest.raises(DaemonUnavailable, match="not ready in time"):
        ensure_daemon(settings, 0.2)

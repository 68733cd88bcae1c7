"""The sd_notify protocol, against real sockets."""

import socket
from pathlib import Path
from uuid import uuid4

import pytest

from eplb_async.runtime.systemd import notify

__all__: list[str] = []


@pytest.mark.parametrize("abstract", [False, True])
def test_state_arrives(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    """A state is one datagram, to a path or to a name in the abstract namespace."""
    name = f"eplb-{uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}" if abstract else str(runtime_dir / name))
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else str(runtime_dir / name))
        assert notify("READY=1")
        assert receiver.recv(100) == b"READY=1"


def test_nobody_to_tell(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without NOTIFY_SOCKET, or with one that nobody serves, nothing happens."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(runtime_dir / "none"))
    assert not notify("READY=1")

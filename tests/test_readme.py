"""The README's example is the file in examples/, and runs."""

import multiprocessing
import os
from pathlib import Path

import pytest

from eplb_async.core.config import load_settings
from eplb_async.runtime.client import ControlClient
from examples.your_engine import serve

__all__: list[str] = []

ROOT = Path(__file__).resolve().parents[1]


def test_readme_shows_the_example_as_it_is() -> None:
    """What a reader copies from the README is what the tests run."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start = readme.index("```python\n", readme.index("<!-- example: examples/your_engine.py -->")) + len("```python\n")
    shown = readme[start : readme.index("```", start)]
    assert (ROOT / "examples" / "your_engine.py").read_text(encoding="utf-8").endswith(shown)
    assert len(shown.splitlines()) < 40


def test_example_serves_and_leaves_nothing(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks run the example, start the daemon themselves, and end without an error."""
    monkeypatch.setenv("EPLB_ASYNC_RUNTIME_DIR", str(runtime_dir))
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=serve, args=(rank, 2, 200)) for rank in range(2)]
    client = ControlClient(load_settings())
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [0, 0]
        assert client.status().pid > 0
        left = [name for name in os.listdir("/dev/shm") if f"eplb_async.{os.getuid()}.my-model." in name]
        assert not left
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
        client.stop_daemon()
        client.close()

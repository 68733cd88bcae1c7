"""Fixtures of all tests: groups and runtime directories of their own, and a watch over /dev/shm after each test."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from eplb_async.core.config import policy_cache

__all__ = ["group", "group_prefix", "make_group", "pytest_collection_modifyitems", "runtime_dir", "segments_left"]

SHM = Path("/dev/shm")

# before any test module imports numba: policies are compiled once for all tests, runs and daemons; children inherit the variable
os.environ["NUMBA_CACHE_DIR"] = str(policy_cache(Path(__file__).parents[1] / ".pytest_cache"))


def segments_left(group_prefix: str) -> list[str]:
    """Names of this user's segments (`eplb_async.<uid>.<group>.<kind>`) whose group starts with `group_prefix`."""
    start = f"eplb_async.{os.getuid()}.{group_prefix}"
    return sorted(path.name for path in SHM.iterdir() if path.name.startswith(start))


@pytest.fixture(autouse=True)
def group_prefix() -> Iterator[str]:
    """What the names of all groups of this test start with; afterwards no segment of such a group may be left.

    What a failing test left is removed, so that it cannot fail the next one.
    """
    prefix = f"t{uuid4().hex[:10]}"
    yield prefix
    left = segments_left(prefix)
    for name in left:
        (SHM / name).unlink(missing_ok=True)
    assert not left, f"the test left segments in {SHM}: {left}"


@pytest.fixture
def make_group(group_prefix: str) -> Callable[[str], str]:
    """A function that makes a group name that no other test uses: `make_group("draft")`."""
    return lambda name: f"{group_prefix}-{name}"


@pytest.fixture
def group(make_group: Callable[[str], str]) -> str:
    """A group name that no other test uses."""
    return make_group("main")


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """An empty directory of mode 0700 for a daemon's socket and lock.

    Not below tmp_path: a Unix socket's path may have at most 107 bytes.
    """
    path = Path(tempfile.mkdtemp(prefix="eplb-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need devices this machine lacks; torch is loaded only if there is such a test."""
    marked = [(item, 2 if item.get_closest_marker("multi_gpu") else 1) for item in items if _needs_gpu(item)]
    found = _num_devices() if marked else 0
    for item, needed in marked:
        if found < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices, found {found}"))


def _needs_gpu(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("gpu", "multi_gpu"))


def _num_devices() -> int:
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0

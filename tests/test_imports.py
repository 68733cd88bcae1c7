"""What an import loads, seen from a fresh interpreter."""

import subprocess
import sys

import pytest

PROBE = "import sys, {module}; print(*sorted({{'torch', 'numba'}} & set(sys.modules)))"


@pytest.mark.parametrize("module", ["eplb_async", "eplb_async.runtime.daemon", "eplb_async.runtime.cli"])
def test_import_loads_neither_torch_nor_numba(module: str) -> None:
    """The root, the daemon and the command line load neither torch nor numba: a daemon starts at once and stays small."""
    probe = [sys.executable, "-c", PROBE.format(module=module)]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []

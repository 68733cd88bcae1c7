"""Fuzzing of what people write: settings in files and variables, recorded loads, and map files."""

import json
import math
import shutil
import tempfile
import warnings
from io import BytesIO
from pathlib import Path
from random import Random

import msgspec
import numpy as np

from eplb_async.core.config import TABLES, Settings, load_settings, settings_environment
from eplb_async.core.errors import ConfigError
from eplb_async.core.spec import MoESpec
from eplb_async.runtime.offline_files import read_loads, read_map
from tests.faults.mutation import EDGES, Mutator, random_json, random_text

__all__ = ["SettingsFuzz", "TracesFuzz"]

TOML = (
    'runtime_dir = "/run/eplb_async"\n[hook]\nlag = 2\nhistory = 64\nverify = "sample"\n[daemon]\npolicy = "default"\n',
    "[daemon]\nwindow_steps = 10\npar_threshold = 1.5\nmin_gain = 1e-3\n[daemon.policy_options]\nnested = [1, {a = 2}]\n",
    '[hook]\npeer_deadline_s = inf\nstaging_rows = 0x10\n[integration]\nenabled = true\ngroup = "main"\ndaemon = "auto"\n',
    "# a comment\nhook.lag = 1\ndaemon = {log_level = 'DEBUG', pool_workers = 2}\n",
    "[daemon]\npolicy = '''\nx'''\n[hook]\nslow_step_ratio = 1_000.5\n",
)
VARIABLES = [
    f"EPLB_ASYNC_{table.upper()}_{name.upper()}" for table in TABLES for name in TABLES[table].__struct_fields__
]
VARIABLES += ["EPLB_ASYNC_RUNTIME_DIR", "EPLB_ASYNC_HOOK_", "EPLB_ASYNC_NOTHING", "OTHER"]
VALUES = (
    "1",
    "0",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "true",
    "0x10",
    "",
    " 3",
    "auto",
    "all",
    "{}",
    '{"a": [1]}',
    "DEBUG",
    "9" * 400,
)
BETWEEN = b"\0VARIABLES\0"

SPEC = MoESpec(num_layers=2, num_experts=4, num_ranks=2)


class _Files:
    """A folder to write inputs to."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="eplb-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

    def close(self) -> str:
        """Remove it."""
        shutil.rmtree(self.folder)
        return ""


class SettingsFuzz(_Files):
    """The target `settings`: a TOML file and variables, which give settings or a ConfigError."""

    name = "settings"

    def __init__(self) -> None:
        super().__init__()
        self._mutator = Mutator([text.encode() for text in TOML])
        self._path = self.folder / "settings.toml"

    def make(self, rng: Random) -> bytes:
        """A damaged file, and a few variables."""
        variables = {}
        for _ in range(rng.choice((0, 0, 1, 2, 4))):
            value = rng.choice(VALUES) if rng.random() < 0.7 else rng.choice((random_text(rng), str(rng.choice(EDGES))))
            variables[rng.choice(VARIABLES)] = value
        file = rng.choice(TOML).encode() if rng.random() < 0.3 else self._mutator.damaged(rng)
        return file + BETWEEN + json.dumps(variables).encode()

    def check(self, data: bytes) -> str:
        """`settings` or `refused`.

        Raises:
            AssertionError, or any other error: settings that a child would read otherwise, or that are no numbers.
        """
        file, _, variables = data.partition(BETWEEN)
        self._path.write_bytes(file)
        try:
            settings = load_settings(self._path, environ=json.loads(variables or b"{}"))
        except ConfigError as error:
            assert str(error)
            return "refused"
        for table in (settings.hook, settings.daemon):
            numbers = [getattr(table, name) for name in table.__struct_fields__]
            assert not any(isinstance(number, float) and math.isnan(number) for number in numbers)
        self._check_child(settings)
        return "settings"

    @staticmethod
    def _check_child(settings: Settings) -> None:
        """A child that gets these settings in its environment has the same."""
        child = load_settings(environ=settings_environment(settings))
        assert child == msgspec.structs.replace(settings, runtime_dir=str(settings.directory))


class TracesFuzz(_Files):
    """The target `traces`: recorded loads and maps, which give arrays of what they must hold, or a ConfigError."""

    name = "traces"

    def __init__(self) -> None:
        super().__init__()
        loads = np.arange(24).reshape(3, 2, 4)
        corpora: dict[str, list[bytes]] = {".npz": [], ".npy": [], ".json": []}
        for array in (loads, loads[0].astype(np.float32), loads[0, 0], loads.astype(">i8")):
            archive, plain, packed = BytesIO(), BytesIO(), BytesIO()
            np.savez(archive, counts=array)
            np.savez_compressed(packed, counts=array, other=array)
            np.save(plain, array)
            corpora[".npz"] += [archive.getvalue(), packed.getvalue()]
            corpora[".npy"].append(plain.getvalue())
            corpora[".json"].append(json.dumps(array.tolist()).encode())
        maps = [[0, 1, 2, 3], [[0, 1, 2, 3], [3, 2, 1, 0]]]
        corpora[".json"] += [json.dumps(each).encode() for each in maps]
        plain = BytesIO()
        np.save(plain, np.array(maps[1]))
        corpora[".npy"].append(plain.getvalue())
        self._mutators = {suffix: Mutator(corpus) for suffix, corpus in corpora.items()}

    def make(self, rng: Random) -> bytes:
        """A suffix, then the file."""
        suffix = rng.choice(list(self._mutators))
        if suffix == ".json" and rng.random() < 0.3:
            return b".json " + json.dumps(random_json(rng, 4)).encode()
        return suffix.encode().ljust(6) + self._mutators[suffix].damaged(rng)

    def check(self, data: bytes) -> str:
        """`loads`, `a map`, or `refused`.

        Raises:
            AssertionError, or any other error: arrays of another kind, or a file that is not refused as it must be.
        """
        path = self.folder / f"input{data[:6].decode('latin-1').strip()}"
        path.write_bytes(data[6:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # numpy's, of files that look as if Python 2 had written them
            return self._read(path)

    @staticmethod
    def _read(path: Path) -> str:
        found = "refused"
        try:
            loads_TLE = read_loads(str(path))
            assert loads_TLE.dtype == np.float64 and loads_TLE.ndim == 3 and loads_TLE.size
            assert np.isfinite(loads_TLE).all() and (loads_TLE >= 0).all()
            found = "loads"
        except ConfigError as error:
            assert str(error)
        try:
            placement_LP = read_map(path, SPEC)
            assert placement_LP.shape == (2, 4) and all(set(row) == {0, 1, 2, 3} for row in placement_LP.tolist())
            found = "a map"
        except ConfigError as error:
            assert str(error)
        return found

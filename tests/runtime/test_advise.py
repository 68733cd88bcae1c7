"""The advisor: what it finds on traffic of which the answer is known, and what it says."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from eplb_async.core.config import DaemonSettings, Settings, load_settings
from eplb_async.core.errors import SpecError
from eplb_async.observability.advice import settings_text
from eplb_async.runtime.advise import AdviceRequest, advise, redundancies
from eplb_async.runtime.replay import ReplayCosts

__all__: list[str] = []

COSTS = ReplayCosts(token_us=1.0, fixed_us=1000.0, bytes_per_us=50_000.0, stall_us=50.0, decide_us=1000.0)


def request(
    tmp_path: Path, trace_TLE: NDArray[np.float64], costs: ReplayCosts = COSTS, slot_us: float = 0.0
) -> AdviceRequest:
    """Four windows of 500 steps, on four ranks."""
    path = tmp_path / "trace.npy"
    np.save(path, trace_TLE)
    return AdviceRequest(
        loads=str(path),
        num_ranks=4,
        slot_bytes=1 << 20,
        costs=costs,
        slot_us=slot_us,
        steps_per_window=500,
        tokens_per_step=2000,
    )


def hot(num_windows: int = 4) -> NDArray[np.float64]:
    """The last rank's four experts of 16 get four times the load of the others, in each of two layers, all the time."""
    load_E = np.where(np.arange(16) < 12, 1000.0, 4000.0)
    return np.broadcast_to(load_E, (num_windows, 2, 16)).copy()


def test_lasting_skew_is_balanced(tmp_path: Path) -> None:
    """Perfect balance would halve the busiest rank's load; the advice comes close to it, and says how."""
    advice = advise(request(tmp_path, hot()))
    assert advice.rebalance
    assert advice.baseline.par_mean > 2.2
    assert advice.chosen.saving > 0.8 * advice.possible_saving > 0.3
    assert advice.chosen.name.startswith("ours")
    text = settings_text(advice)
    settings = load_settings(_written(tmp_path, text), environ={})
    assert isinstance(settings, Settings)
    assert settings.daemon == DaemonSettings(**advice.chosen.daemon)
    defaults = msgspec.structs.replace(advice, chosen=msgspec.structs.replace(advice.chosen, daemon={}))
    assert "everything else as it is by default\n[daemon]" in settings_text(defaults)
    assert advice.chosen.saving == max(one.saving for one in advice.candidates) or advice.chosen.bytes_per_step == min(
        one.bytes_per_step for one in advice.candidates if one.saving > advice.chosen.saving - 0.002
    )


def test_even_traffic_is_left_alone(tmp_path: Path) -> None:
    """Nothing to gain: the baseline, with the reason, and no settings to run."""
    advice = advise(request(tmp_path, np.full((4, 2, 16), 10_000.0)))
    assert not advice.rebalance
    assert advice.chosen == advice.baseline
    assert "[daemon]" not in settings_text(advice)


def test_a_small_part_of_a_step_is_not_worth_it(tmp_path: Path) -> None:
    """The same skew where experts are a hundredth of a step: PAR would fall, time would not."""
    advice = advise(request(tmp_path, hot(), replace(COSTS, fixed_us=1e6)))
    assert not advice.rebalance
    assert "small part of a step" in advice.reasons[-1]


def test_redundancy_that_costs_more_than_it_brings_is_not_advised(tmp_path: Path) -> None:
    """Each slot's weights take as long to read as half the layer's tokens of a rank: balance without redundant experts wins."""
    free = advise(request(tmp_path, hot()))
    costly = advise(request(tmp_path, hot(), slot_us=250.0))
    assert costly.chosen.redundant == 0
    assert costly.rebalance
    at_most = max(one.saving for one in costly.candidates if one.redundant)
    assert at_most < costly.chosen.saving < free.chosen.saving + 1e-9


@pytest.mark.parametrize(
    ("experts", "ranks", "most", "expected"),
    [(256, 32, 0, [0, 32, 64]), (60, 8, 0, [4, 12]), (8, 8, 0, [0]), (128, 2, 16, [0, 2, 4, 8]), (60, 8, 4, [4])],
)
def test_numbers_of_redundant_experts(experts: int, ranks: int, most: int, expected: list[int]) -> None:
    """All divide over the ranks, the least is first, none is above the limit."""
    assert redundancies(experts, ranks, most) == expected
    assert all((experts + number) % ranks == 0 for number in expected)


def test_a_limit_that_allows_nothing_is_an_error() -> None:
    """60 experts on 8 ranks need 4."""
    with pytest.raises(SpecError, match="need 4 redundant ones"):
        redundancies(60, 8, 3)


def test_command(tmp_path: Path) -> None:
    """As a user runs it: a table with the verdict, JSON with the same."""
    made = request(tmp_path, hot(2))
    arguments = ["--ranks", "4", "--slot-bytes", "1048576", "--steps-per-window", "500", "--tokens-per-step", "2000"]
    arguments += ["--token-us", "1", "--fixed-us", "1000"]
    for_people, for_programs = (run(made.loads, *arguments, *more) for more in ([], ["--json"]))
    assert for_people.returncode == for_programs.returncode == 0, for_people.stderr + for_programs.stderr
    assert "Rebalance: ours" in for_people.stdout
    assert "[daemon]" in for_people.stdout
    assert json.loads(for_programs.stdout)["rebalance"] is True


def test_bad_input_is_one_clear_error(tmp_path: Path) -> None:
    """No such file; a limit that does not fit."""
    missing = run(str(tmp_path / "nothing.npz"), "--ranks", "4", "--slot-bytes", "1")
    assert missing.returncode != 0
    assert "nothing.npz" in missing.stderr
    assert "Traceback" not in missing.stderr
    made = request(tmp_path, np.ones((1, 1, 6)))
    refused = run(made.loads, "--ranks", "4", "--slot-bytes", "1", "--most-redundant", "1")
    assert refused.returncode != 0
    assert "need 2 redundant ones" in refused.stderr


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eplb_async", "advise", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def _written(folder: Path, text: str) -> Path:
    path = folder / "advised.toml"
    path.write_text(text)
    return path

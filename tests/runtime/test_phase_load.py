"""Phases are mixed by weights without losing a token, and without looking surer than they are."""

from typing import Any

import numpy as np
import pytest

from eplb_async.core.daemon_settings import DaemonSettings
from eplb_async.core.load import Phase
from eplb_async.core.spec import MoESpec
from eplb_async.runtime.phase_load import PhaseLoads, weights_of

__all__: list[str] = []

SPEC = MoESpec(num_layers=2, num_experts=8, num_redundant=0, num_ranks=4)


def windows_of(settings: DaemonSettings, loads: dict[Phase, np.ndarray]) -> np.ndarray:
    """Windows of these loads [T, L, E] of each phase."""
    mixed, found = PhaseLoads(SPEC, (5, 4), weights_of(settings)), []
    for window in range(len(next(iter(loads.values())))):
        for phase, load_TLE in loads.items():
            mixed.add(window, phase, load_TLE[window])
        found.append(mixed.close(window))
    return np.array(found)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1, 1, 1)),
        ({"serve": "prefill"}, (1, 0, 1)),
        ({"serve": "decode"}, (0, 1, 1)),
        ({"prefill_weight": 0.1}, (0.1, 1, 1)),
        ({"decode_weight": 0.0}, (1, 0, 1)),
    ],
)
def test_what_a_token_counts(settings: dict[str, Any], expected: tuple[float, ...]) -> None:
    """Of a prefill, a decode and a mixed step; what a step is mixed of counts as what counts more."""
    assert tuple(weights_of(DaemonSettings(**settings)).values()) == expected
    assert tuple(weights_of(DaemonSettings())) == tuple(phase for phase in Phase if phase.counts)


def test_the_worked_example() -> None:
    """Five tokens by 0.3 are 1.5, 3.0 and 4.5 in all: windows of 1, 2 and 1."""
    five = np.full((3, 2, 8), 5)
    assert windows_of(DaemonSettings(prefill_weight=0.3), {Phase.PREFILL: five})[:, 0, 0].tolist() == [1, 2, 1]


def test_nothing_is_lost_where_counts_are_small() -> None:
    """Over many windows less than a token is missing of each expert, also where no window has one by itself; whole weights are exact."""
    rng = np.random.default_rng(1)
    loads = {phase: rng.poisson(2.0, (300, 2, 8)) for phase in (Phase.PREFILL, Phase.DECODE, Phase.MIXED)}
    found = windows_of(DaemonSettings(prefill_weight=0.01), loads)
    exact = 0.01 * loads[Phase.PREFILL] + loads[Phase.DECODE] + loads[Phase.MIXED]
    assert np.abs(found.sum(axis=0) - exact.sum(axis=0)).max() < 1
    assert np.array_equal(windows_of(DaemonSettings(), loads), sum(loads.values()))
    served = windows_of(DaemonSettings(serve="prefill"), loads)
    assert np.array_equal(served, loads[Phase.PREFILL] + loads[Phase.MIXED])


@pytest.mark.parametrize(("prefill", "decode"), [(40.0, 4.0), (1.0, 0.0), (400.0, 40.0), (3.0, 0.2)])
def test_windows_scatter_no_more_than_counts_of_their_size(prefill: float, decode: float) -> None:
    """The noise model takes a window for Poisson counts: the variance of what is weighted is at most its mean."""
    rng = np.random.default_rng(2)
    loads = {Phase.PREFILL: rng.poisson(prefill, (4000, 2, 8)), Phase.DECODE: rng.poisson(decode, (4000, 2, 8))}
    found = windows_of(DaemonSettings(prefill_weight=0.2), loads)
    assert found.var(axis=0).mean() <= 1.05 * found.mean()

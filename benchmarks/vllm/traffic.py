"""The router's bias: what makes some experts hot, the same in every run and mode.

A gate's logits are noise and a bias. With a bias of log w and the noise of a Gumbel variable, expert e is drawn in proportion to w; the
normal noise here has the same deviation and about that effect. What comes out is measured, not assumed.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.engine.config import EngineConfig
from benchmarks.engine.routing import load_shares, race_weights
from benchmarks.vllm.config import Scenario

__all__ = ["LANGUAGES", "router_bias"]

EXPERTS = 128
LANGUAGES = ("zh", "sw")
"""Before and after the change of traffic: of eight languages of the trace the one whose best placement suits Swahili least, and Swahili."""


def router_bias(scenario: Scenario, trace: Path | None, part: int) -> list[list[float]]:
    """Bias [L][E] of the part of the run after change number `part` (0: from the start).

    Args:
        scenario: decode, faults and outputs have normal ones of deviation 1, prefill has those of the trace.
        trace: .npz with counts [T, L', 128] and window_labels; needed for prefill.

    Raises:
        ValueError: there is no trace, or it has other experts or no such window.
    """
    bias_LE: NDArray[np.float64]
    if scenario.kind != "prefill":
        bias_LE = np.random.default_rng([7, part]).normal(size=(scenario.layers, EXPERTS))
    elif trace is None:
        raise ValueError("the prefill scenario needs --trace, an .npz with counts [T, L, 128] and window_labels")
    else:
        shares_TLE = load_shares(EngineConfig(num_layers=scenario.layers, num_experts=EXPERTS, trace=str(trace)))
        with np.load(trace) as file:
            labels = [str(label) for label in file["window_labels"]]
        if LANGUAGES[part] not in labels:
            raise ValueError(f"{trace} has windows {', '.join(labels)}; needed {LANGUAGES[part]}")
        bias_LE = np.log(race_weights(shares_TLE[labels.index(LANGUAGES[part])], scenario.top_k))
    rows: list[list[float]] = np.round(bias_LE, 4).tolist()
    return rows

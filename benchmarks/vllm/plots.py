"""PAR and throughput around a change of traffic, mode by mode; needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.vllm.report import par_series, runs_in

__all__ = ["plot_prefill"]

SMOOTH_S = 1.0
BEFORE_S, AFTER_S = 4.0, 11.5
COLOURS = {"static": "tab:gray", "async": "tab:orange", "ours": "tab:blue"}
LABELS = {"static": "not rebalanced", "async": "vLLM, asynchronous", "ours": "eplb_async"}


def plot_prefill(folder: Path, target: Path) -> None:
    """Draw all prefill runs of a folder into one picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no such runs.
    """
    from matplotlib.figure import Figure

    modes = runs_in(folder).get("prefill")
    if not modes:
        raise ValueError(f"{folder} has no results of prefill")
    figure = Figure(figsize=(9, 6), layout="constrained")
    par_axes, token_axes = figure.subplots(2, 1, sharex=True)
    for mode, runs in modes.items():
        for number, run in enumerate(runs):
            style = {"color": COLOURS.get(mode), "label": LABELS.get(mode, mode) if number == 0 else None, "lw": 1}
            change = run["marks"]["change_0"]
            when, par = par_series(run)
            par_axes.plot(when - change, par, **style)
            token_axes.plot(*_throughput(run, change), **style)
    for axes, label in ((par_axes, "PAR of a step, mean over layers"), (token_axes, "tokens per second, 1 s mean")):
        axes.axvline(0, color="black", lw=0.8, ls=":")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    par_axes.set_xlim(-BEFORE_S, AFTER_S)
    par_axes.legend(loc="upper right")
    token_axes.set_xlabel("seconds from the change of traffic")
    figure.savefig(target, dpi=90)


def _throughput(run: Mapping[str, Any], change: float) -> tuple[Any, Any]:
    worker = run["workers"][0]
    began, tokens = np.array(worker["begin"]), np.cumsum(worker["tokens"])
    middle = np.arange(-BEFORE_S, AFTER_S, 0.1)
    done = [np.interp(change + middle + side * SMOOTH_S / 2, began, tokens) for side in (-1, 1)]
    return middle, (done[1] - done[0]) / SMOOTH_S

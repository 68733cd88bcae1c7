"""Pictures of a run: step times and balance over steps, with marks where experts moved."""

from pathlib import Path

import numpy as np

from benchmarks.engine.results import RunFiles, par_per_step

__all__ = ["plot_runs"]

SMOOTHED = 20


def plot_runs(path: Path, runs: dict[str, RunFiles], skip: int) -> bool:
    """Draw all modes into one picture; False where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(12, 7))
    for index, (mode, run) in enumerate(runs.items()):
        colour = f"C{index}"
        step_ms, balance = run.step_ms_RT.max(axis=0)[skip:], par_per_step(run)[skip:]
        steps = np.arange(skip, skip + len(step_ms))
        above.plot(steps, step_ms, linewidth=0.7, color=colour, label=mode)
        width = max(1, min(SMOOTHED, len(balance)))
        mean = np.convolve(balance, np.ones(width) / width, mode="valid")
        below.plot(steps[len(steps) - len(mean) :], mean, linewidth=1.0, color=colour, label=mode)
        for step in sorted({step for step, _, _ in run.commits if step >= skip}):
            above.axvline(step, color=colour, alpha=0.15, linewidth=0.6)
    above.set_ylabel("step, ms")
    above.set_yscale("log")
    above.legend(loc="upper right")
    above.set_title("Time of each step on its slowest rank; vertical lines: placements changed")
    below.set_ylabel(f"PAR, mean of {SMOOTHED} steps")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True

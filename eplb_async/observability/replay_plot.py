"""A picture of a replay: PAR over the steps, with marks where plans were made, and bytes against PAR. Needs matplotlib, of the extra `bench`."""

from collections.abc import Sequence
from pathlib import Path

from eplb_async.observability.replay_report import MIB, ReplayReport

__all__ = ["MISSING", "draw_replay"]

MISSING = "no picture: matplotlib is not installed (pip install 'eplb-async[bench]')"


def draw_replay(reports: Sequence[ReplayReport], path: Path) -> str:
    """Draw, without a display; returns a line that says what was drawn, or why nothing was.

    Raises:
        OSError, ValueError: the file cannot be written, or its suffix is no format of pictures.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return MISSING
    figure = Figure(figsize=(12, 5), layout="constrained")
    over, pareto = figure.subplots(1, 2, width_ratios=[2, 1])
    for report in reports:
        steps, par = zip(*report.series, strict=True)
        (line,) = over.plot(steps, par, linewidth=1, label=f"{report.name}: mean {report.par_mean:.3f}")
        level = dict(report.series)
        for decision in report.decisions:
            if decision.bytes_moved:
                nearest = min((abs(step - decision.step), step) for step in level)[1]
                over.plot([nearest], [level[nearest]], "v", markersize=4, color=line.get_color())
        pareto.plot([report.bytes_per_step / MIB], [report.par_mean], "o", color=line.get_color())
        pareto.annotate(report.name, (report.bytes_per_step / MIB, report.par_mean), fontsize=8)
    over.set_xlabel("step; triangles: plans")
    over.set_ylabel("PAR, mean over layers")
    over.legend(fontsize=8)
    pareto.set_xlabel("MiB moved per step")
    pareto.set_ylabel("PAR, mean over steps")
    figure.savefig(path)
    return f"drew {path}"

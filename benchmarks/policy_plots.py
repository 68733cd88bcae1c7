"""Pictures of what `bench_policies` measured, one file per case and one of the times: PNG, drawn without a display.

matplotlib is in the `bench` extra only; without it nothing is drawn, and the caller is told.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_cases", "draw_scaling"]

MISSING = "no pictures: matplotlib is not installed (pip install 'eplb-async[bench]')"
REFERENCE_LINES = {"(initial placement)": (0, (1, 1)), "(lower bound)": (0, (5, 2))}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*", "p")
SPLIT = {"par_same": "next interval, same domain", "par_change": "next interval, after a change of domain"}
LEAST_EXCESS = 1e-3
"""PAR - 1 is drawn on a logarithmic axis; whatever is closer to perfect stands at this edge."""

Row = dict[str, Any]


def draw_cases(rows: Sequence[Row], folder: Path) -> list[str]:
    """For each case, the share of experts moved per plan against the PAR planned and against the next interval's.

    Every policy has a marker of its own, the same in all pictures; what one sweep measured is a curve, in its order.

    Returns:
        A line to print for each file, or the one that says why there is none.
    """
    styles = _styles([str(row["sweep"] or row["policy"]) for row in rows if "sweep" in row])
    lines = []
    for case in dict.fromkeys(str(row["case"]) for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        split = all(any(key in row for row in of_case) for key in ("par_same", "par_change"))
        panels = {"par_planned": "planned interval", **(SPLIT if split else {"par_next": "next interval"})}
        figure = _figure(len(panels))
        if figure is None:
            return [MISSING]
        for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            _draw_moves(axes, of_case, key, styles)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("experts moved per plan, share of slots")
        figure.axes[0].set_ylabel("PAR, mean over layers")
        figure.suptitle(case, fontsize=11)
        lines.append(_save(figure, folder / f"{case.partition(':')[0]}.png"))
    return lines


def draw_scaling(rows: Sequence[Row], folder: Path) -> list[str]:
    """CPU time per plan against what grows, one panel for each series, both axes logarithmic.

    Returns:
        As `draw_cases`.
    """
    series = list(dict.fromkeys(str(row["series"]) for row in rows))
    across, down = min(len(series), 3), -(-len(series) // 3)
    figure = _figure(across, down)
    if figure is None:
        return [MISSING]
    styles = _styles([str(row["policy"]) for row in rows])
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axes in panels[len(series) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, series, strict=False):
        points = list(dict.fromkeys(str(row["point"]) for row in rows if row["series"] == name))
        for policy, style in styles.items():
            drawn = [row for row in rows if row["series"] == name and row["policy"] == policy and "cpu_ms" in row]
            places = [points.index(str(row["point"])) for row in drawn]
            axes.plot(places, [row["cpu_ms"] for row in drawn], label=policy, **style)
        axes.set_yscale("log")
        axes.set_xticks(range(len(points)), [point.replace(", ", "\n") for point in points], fontsize=7)
        axes.set_title(name, fontsize=9, wrap=True)
        axes.grid(visible=True, alpha=0.3)
    for axes in panels[::across]:
        axes.set_ylabel("CPU p50 per plan of 8 layers, ms")
    return [_save(figure, folder / "scaling.png")]


def _figure(across: int, down: int = 1) -> Any:
    """An empty figure for so many panels, or None without matplotlib. No pyplot: that would keep figures, and choose a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(2.0 + 3.5 * across, 0.4 + 3.8 * down), dpi=130, layout="constrained")


def _styles(names: Sequence[str]) -> dict[str, dict[str, object]]:
    """Marker and colour by name; hollow, and of three sizes, so that those at the same place are all seen."""
    markers = itertools.cycle(MARKERS)
    return {
        name: {
            "marker": next(markers),
            "color": f"C{index % 10}",
            "markerfacecolor": "none",
            "markersize": 7 + 3 * (index % 3),
            "markeredgewidth": 1.6,
            "linewidth": 1.2,
        }
        for index, name in enumerate(dict.fromkeys(names))
    }


def _draw_moves(axes: Any, rows: Sequence[Row], key: str, styles: dict[str, dict[str, object]]) -> None:
    """One panel: PAR - 1 upwards on a logarithmic axis that is labelled with PAR, as far as the policies reach."""
    heights = []
    for name, places in _curves(rows, key):
        sweep = {"linestyle": "-", "markersize": 5} if len(places) > 1 else {"linestyle": "none"}
        axes.plot(*zip(*places, strict=True), label=name, **{**styles[name], **sweep})
        heights += [height for _, height in places]
    low, high = (min(heights), max(heights)) if heights else (LEAST_EXCESS, 1.0)
    references = {str(row["policy"]): _excess(row[key]) for row in rows if "sweep" not in row and key in row}
    for name, height in references.items():
        if low / 3 <= height <= high * 3:  # one that is far off would squeeze what is compared
            axes.axhline(height, color="0.4", linestyle=REFERENCE_LINES[name], linewidth=1, label=name)
            low, high = min(low, height), max(high, height)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.2, high * 1.2)
    axes.set_xlim(-0.03, 1.03)
    # 1.02 and 1.05 between the decades' 1.01 and 1.1; all nine where less than a decade is in sight
    shown = "23456789" if high < 4 * low else "25"
    axes.yaxis.set_major_formatter(lambda height, _: f"{1 + height:.4g}")
    axes.yaxis.set_minor_formatter(lambda height, _: f"{1 + height:.4g}" if f"{height:e}"[0] in shown else "")
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.grid(visible=True, which="both", alpha=0.2)


def _curves(rows: Sequence[Row], key: str) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """The places of each policy or sweep that has any: [(0.1, 0.02)] for a PAR of 1.02 with a tenth moved."""
    drawn = [row for row in rows if "sweep" in row and key in row]
    for name in dict.fromkeys(str(row["sweep"] or row["policy"]) for row in drawn):
        of_name = [row for row in drawn if (row["sweep"] or row["policy"]) == name]
        yield name, [(row["moved_share"], _excess(row[key])) for row in of_name]


def _excess(par: float) -> float:
    return max(par - 1, LEAST_EXCESS)


def _save(figure: Any, path: Path) -> str:
    """Write the figure with the legend of its first panel at the right, outside; the line that says so."""
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return f"drew {path}"

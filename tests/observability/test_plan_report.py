"""The tables of a plan show each layer and the whole, and nothing where there is nothing to show."""

import json
from pathlib import Path

import numpy as np
from rich.console import Console

from eplb_async.observability.plan_report import PlanReport, plan_tables
from eplb_async.runtime.offline import OfflineRequest, Shape, plan_offline

__all__: list[str] = []


def report_of(folder: Path, slot_bytes: int | None, windows: tuple[int, int]) -> PlanReport:
    """A plan of `random` on three windows of two layers."""
    loads = np.random.default_rng(0).integers(1, 50, size=(3, 2, 4)).tolist()
    (folder / "loads.json").write_text(json.dumps(loads), encoding="utf-8")
    return plan_offline(
        OfflineRequest(
            loads=str(folder / "loads.json"),
            policy="random",
            shape=Shape(num_slots=6, num_ranks=2),
            windows=windows,
            slot_bytes=slot_bytes,
        )
    )


def printed(report: PlanReport) -> str:
    """What a terminal of 120 columns shows."""
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(plan_tables(report))
    return capture.get()


def test_all_that_is_known_is_shown(tmp_path: Path) -> None:
    """A line per layer, and the means and worst of balance, gap, moves, bytes and time; no line is wider than the terminal."""
    report = report_of(tmp_path, 3 << 20, (0, 2))
    text = printed(report)
    lines = text.splitlines()
    titles = "layer PAR before after next before next after busiest rank bound gap moved changed"
    assert " ".join(lines[0].split()) == titles
    assert [line.split()[:3] for line in lines[1:3]] == [
        [str(layer), f"{report.par_before_L[layer]:.3f}", f"{report.par_L[layer]:.3f}"] for layer in (0, 1)
    ]
    for shown in (
        f"{report.par_before:.4f} -> {report.par:.4f} mean over layers",
        f"{report.par_before_max:.4f} -> {report.par_max:.4f} worst",
        f"{report.par_next_before:.4f} -> {report.par_next:.4f} mean over layers",
        f"{report.par_next_before_max:.4f} -> {report.par_next_max:.4f} worst",
        f"bound {report.bound:,.2f}",
        f"{report.gap:.2%} mean over layers, {report.gap_max:.2%} worst",
        f"{report.moved} of 12 slots get an expert new on their rank",
        "random (seed=0",
        "0:2 of 3; next are 2:3",
        f"{3 * report.moved}.0 MiB",
        "median of 3 warm plans",
    ):
        assert shown in text
    assert max(map(len, lines)) <= 120


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    """Without windows that come next and bytes of a slot there are no columns and lines for them."""
    text = printed(report_of(tmp_path, None, (1, 3)))
    assert "none after them" in text
    for absent in ("next before", "PAR next", "transfer", "None"):
        assert absent not in text

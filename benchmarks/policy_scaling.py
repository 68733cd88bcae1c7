"""How the time of a plan grows with experts, ranks, redundant slots and windows, up to 1,024 experts on 1,024 ranks.

Each time is of the second of two plans: from the placement of the first, after the load has drifted. So it is what
planning costs while serving. The load is lognormal, as in the synthetic cases, for `LAYERS` layers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.policy_candidates import Candidate
from benchmarks.policy_cases import KEPT, SIGMA, TOKENS
from benchmarks.policy_measure import Planned, timed
from benchmarks.reporting import Column
from eplb_async.core.errors import EplbError
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec

__all__ = ["SERIES", "Point", "measure_scaling", "scaling_table"]

LAYERS = 8
"""Enough for a plan to take longer than the clock is coarse; policies plan layers one by one."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A shape: E, R, redundant slots and T."""

    experts: int
    ranks: int
    redundant: int
    windows: int = 1

    def __str__(self) -> str:
        return f"E {self.experts}, R {self.ranks}, P {self.experts + self.redundant}, T {self.windows}"

    def at_least(self, other: "Point") -> bool:
        """Whether no size is below the other's."""
        return all(
            mine >= its
            for mine, its in (
                (self.experts, other.experts),
                (self.ranks, other.ranks),
                (self.experts + self.redundant, other.experts + other.redundant),
                (self.windows, other.windows),
            )
        )


SERIES: Mapping[str, Sequence[Point]] = {
    "experts (32 ranks)": [Point(experts, 32, 32) for experts in (128, 256, 512, 1024)],
    "ranks (256 experts, one redundant slot per rank)": [
        Point(256, ranks, ranks) for ranks in (8, 16, 32, 64, 128, 256)
    ],
    "redundant slots (256 experts, 32 ranks)": [Point(256, 32, redundant) for redundant in (0, 32, 64, 128, 256)],
    "experts and ranks": [Point(128, 8, 8), Point(256, 32, 32), Point(512, 128, 128), Point(1024, 1024, 1024)],
    "windows (256 experts, 32 ranks)": [Point(256, 32, 32, windows) for windows in (1, 2, 4, 8, 16, 32, 64)],
}
"""By what grows; each from small to large."""


def measure_scaling(
    candidates: Iterable[Candidate],
    limit_s: float,
    repeats: int,
    progress: Callable[[str], None],
    series: Mapping[str, Sequence[Point]],
) -> list[Row]:
    """Time each policy at each point: one row each.

    Args:
        candidates: the policies.
        limit_s: a policy whose plan took longer at a point is left out of all points that are no smaller in any size.
        repeats: a fifth of the times a plan is timed (there are no other plans to take a median of); once where it takes
            long.
        progress: told each row.
        series: points, by what grows.

    Returns:
        Rows "series", "point", sizes, "policy", and "cpu_ms" and "plan_ms" (medians) or "note": "over" or
        "failed".
    """
    rows: list[Row] = []
    for candidate in candidates:
        measured: dict[Point, Row] = {}
        too_long: list[Point] = []
        for name, points in series.items():
            for point in points:
                if point not in measured:
                    exceeded = next((smaller for smaller in too_long if point.at_least(smaller)), None)
                    measured[point] = (
                        {"note": "over", "exceeded_at": str(exceeded)}
                        if exceeded
                        else _measure_point(candidate, point, repeats)
                    )
                    if measured[point].get("longest_ms", 0.0) > limit_s * 1e3:
                        too_long.append(point)
                    progress(
                        f"{candidate.label}: {point}: {measured[point].get('note', measured[point].get('cpu_ms'))}"
                    )
                sizes = {key: getattr(point, key) for key in ("experts", "ranks", "redundant", "windows")}
                rows.append(
                    {"series": name, "point": str(point), "policy": candidate.label, **sizes, **measured[point]}
                )
    return rows


def scaling_table(rows: Sequence[Row]) -> tuple[list[Column], list[Row]]:
    """The rows with points downwards and policies across: CPU milliseconds per plan, or why there are none."""
    columns = [Column(key="point", title="CPU p50 per plan, ms")]
    columns += [
        Column(key=str(label), title=str(label), digits=2) for label in dict.fromkeys(row["policy"] for row in rows)
    ]
    table: dict[tuple[object, object], Row] = {}
    for row in rows:
        line = table.setdefault((row["series"], row["point"]), {"series": row["series"], "point": row["point"]})
        line[str(row["policy"])] = row["cpu_ms"] if "cpu_ms" in row else row["note"]
    return columns, list(table.values())


def _measure_point(candidate: Candidate, point: Point, repeats: int) -> Row:
    """Medians of the second plan, and the longest CPU time of a plan, the first included."""
    spec = MoESpec(num_layers=LAYERS, num_experts=point.experts, num_ranks=point.ranks, num_redundant=point.redundant)
    first_TLE, second_TLE = _drifting_windows(spec, point.windows)
    try:
        settings = candidate.prepared(spec)
        candidate.warm_up()
        first, first_times = timed(candidate, settings, (first_TLE, Planned(initial_placement(spec)), spec), 1)
        _, times = timed(candidate, settings, (second_TLE, first, spec), 5 * repeats)
    except EplbError as error:
        return {"note": "failed", "error": str(error)}
    return {
        "cpu_ms": float(np.median([cpu for cpu, _ in times])),
        "plan_ms": float(np.median([wall for _, wall in times])),
        "longest_ms": max(cpu for cpu, _ in first_times + times),
    }


def _drifting_windows(spec: MoESpec, windows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two intervals of windows [T, L, E]: the second's expected load has drifted, each window has noise of its own."""
    random = np.random.default_rng(0)
    shape = (spec.num_layers, spec.num_experts)
    log_LE = random.normal(size=shape)
    later_LE = KEPT * log_LE + np.sqrt(1 - KEPT**2) * random.normal(size=shape)
    intervals = []
    for log in (log_LE, later_LE):
        load_LE = np.exp(SIGMA * log)
        share_LE = load_LE / load_LE.sum(axis=1, keepdims=True)
        intervals.append(random.poisson(share_LE * TOKENS, size=(windows, *shape)).astype(np.float64))
    return intervals[0], intervals[1]

"""One policy on one case: its plans made one after the other from its own live placement, timed and scored.

The score of an interval is the mean over its windows of each window's own PAR, every window alike: a step is a step, and
lasts as long as its busiest rank. (`core.score.windows_par` weights windows by their tokens.) With intervals of one window
that is the window's PAR.

With `dispatch="weighted"` dispatch tables are fitted after each plan, to the interval that was planned; that is part of its
time, and the tables hold, like the placement, until the next plan.

A plan that raises or is invalid counts as failed, and the live placement and the state stay, as in the daemon.
"""

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.policy_candidates import Candidate
from benchmarks.policy_cases import Case
from eplb_async.core.errors import EplbError, PolicyError
from eplb_async.core.placement import initial_placement, validate_placement
from eplb_async.core.score import balancedness, par, rank_load
from eplb_async.core.spec import MoESpec, Topology
from eplb_async.policies.bounds import par_lower_bound
from eplb_async.policies.dispatch import fit_dispatch
from eplb_async.runtime.offline_score import moved_slots
from eplb_async.testing import ranks_with_duplicates

__all__ = ["Planned", "interval_bound", "interval_par", "measure", "moved_share", "reference_rows", "timed"]

LONG_MS = 100.0
"""A plan that takes longer is not repeated: it is timed once for each interval anyway."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """What one plan gave.

    Fields:
        slot_to_expert_LP: the placement.
        state: for the next plan.
        share_LP: what part of its expert's tokens each slot gets; None for an even split.
    """

    slot_to_expert_LP: NDArray[np.int32]
    state: bytes = b""
    share_LP: NDArray[np.float64] | None = None


def interval_par(windows_TLE: NDArray[np.float64], placed: Planned, topology: Topology) -> NDArray[np.float64]:
    """Mean over windows of each window's own PAR, per layer, float64 [L].

    Two windows of one layer whose ranks get [3, 1] and [40, 40]: (1.5 + 1) / 2 = 1.25. Weighted by tokens it would be
    (1.5 * 4 + 1 * 80) / 84 = 1.02; their sum has 43 / 42 = 1.02.
    """
    load_TLR = rank_load(windows_TLE, placed.slot_to_expert_LP, topology, placed.share_LP)
    return np.asarray(par(load_TLR).mean(axis=0))


def interval_bound(windows_TLE: NDArray[np.float64], topology: Topology) -> float:
    """Mean over windows and layers of the PAR that no placement can beat: no placement's `interval_par` is lower."""
    return float(np.mean([par_lower_bound(load_LE, topology) for load_LE in windows_TLE]))


def moved_share(before_LP: NDArray[np.int32], after_LP: NDArray[np.int32], spec: MoESpec) -> float:
    """Share of all slots whose expert was not on that rank before: the bytes a change costs, whatever the slot order."""
    return sum(moved_slots(before_LP, after_LP, spec)) / after_LP.size


@dataclass
class _Score:
    """What placements did, one entry per plan."""

    planned: list[float] = field(default_factory=list)
    planned_max: list[float] = field(default_factory=list)
    next: list[float] = field(default_factory=list)
    next_max: list[float] = field(default_factory=list)
    changes: list[bool | None] = field(default_factory=list)
    balanced: list[float] = field(default_factory=list)

    def add(self, case: Case, plan: int, placed: Planned) -> None:
        """Score what holds after plan number `plan`, on the interval of that number and on the next."""
        following, topology = case.windows(plan + 1), case.spec.topology
        planned_L = interval_par(case.windows(plan), placed, topology)
        next_L = interval_par(following, placed, topology)
        self.planned.append(float(planned_L.mean()))
        self.planned_max.append(float(planned_L.max()))
        self.next.append(float(next_L.mean()))
        self.next_max.append(float(next_L.max()))
        self.changes.append(case.changes_after(plan))
        load_TLR = rank_load(following, placed.slot_to_expert_LP, topology, placed.share_LP)
        self.balanced.append(balancedness(load_TLR))

    def row(self) -> dict[str, float]:
        """Means over plans; without a key where there is nothing to take the mean of."""
        split = {
            "par_same": [value for value, changes in zip(self.next, self.changes, strict=True) if changes is False],
            "par_change": [value for value, changes in zip(self.next, self.changes, strict=True) if changes],
        }
        means = {
            "par_planned": self.planned,
            "par_planned_max": self.planned_max,
            "par_next": self.next,
            "par_next_max": self.next_max,
            "balancedness": self.balanced,
            **{key: values for key, values in split.items() if values},
        }
        return {key: float(np.mean(values)) for key, values in means.items()}


def measure(case: Case, candidate: Candidate, repeats: int, bound: float) -> Row:
    """Plan through a case; the row of the table, with the planned intervals' bound that `reference_rows` gives.

    Times are the medians of the policy function alone over all plans that did not fail, warm, in this thread. CPU time
    is what a plan costs on a machine that other work shares; both are equal on a quiet one.
    """
    row: Row = {"case": case.label, "policy": candidate.label, "sweep": candidate.sweep}
    spec, num_plans = case.spec, case.num_intervals - 1
    try:
        settings = candidate.prepared(spec)
        candidate.warm_up()
    except EplbError as error:
        return {**row, "failures": f"{num_plans} of {num_plans}", "error": str(error)}
    live = Planned(initial_placement(spec))
    score, times, moved, errors, duplicates = _Score(), [], [], [], 0
    for plan in range(num_plans):
        try:
            planned, plan_times = timed(candidate, settings, (case.windows(plan), live, spec), repeats)
        except EplbError as error:
            errors.append(str(error))
        else:
            times += plan_times
            moved.append(moved_share(live.slot_to_expert_LP, planned.slot_to_expert_LP, spec))
            duplicates += int(ranks_with_duplicates(planned.slot_to_expert_LP, spec).sum())
            live = planned
        score.add(case, plan, live)
    if errors:
        row |= {"failures": f"{len(errors)} of {num_plans}", "error": errors[0]}
    if not moved:
        return row
    means = score.row()
    if len(moved) > 1:
        row["moved_later"] = float(np.mean(moved[1:]))
    return {
        **row,
        "cpu_ms": float(np.median([cpu for cpu, _ in times])),
        "plan_ms": float(np.median([wall for _, wall in times])),
        **means,
        "moved_share": float(np.mean(moved)),
        "duplicates": duplicates,
        "bound": bound,
        "gap": means["par_planned"] / bound - 1,
    }


def timed(
    candidate: Candidate,
    settings: Any,
    given: tuple[NDArray[np.float64], Planned, MoESpec],
    repeats: int,
) -> tuple[Planned, list[tuple[float, float]]]:
    """Make one plan, several times if it is quick; every repeat gives the same.

    Args:
        candidate: who plans.
        settings: its options, prepared.
        given: windows, what the last plan gave, and the model; the arrays are read-only from here on.
        repeats: at most so often.

    Returns:
        What was planned, valid, and CPU and elapsed milliseconds of each repeat.

    Raises:
        EplbError: the policy raised it, or anything else, which is then a PolicyError; or its placement is not valid.
    """
    windows_TLE, live, spec = given
    windows_TLE.setflags(write=False)
    live.slot_to_expert_LP.setflags(write=False)
    times: list[tuple[float, float]] = []
    while True:
        start, cpu_start = time.perf_counter(), time.thread_time()
        try:
            placement_LP, state = candidate.policy.function(
                windows_TLE, live.slot_to_expert_LP, spec.topology, settings, live.state
            )
        except EplbError:
            raise
        except Exception as error:
            raise PolicyError(candidate.label, f"raised {type(error).__name__}: {error}") from error
        cpu_ms, wall_ms = (time.thread_time() - cpu_start) * 1e3, (time.perf_counter() - start) * 1e3
        planned = Planned(validate_placement(placement_LP, spec), state)
        if candidate.dispatch.dispatch == "weighted":
            start, cpu_start = time.perf_counter(), time.thread_time()
            strength = candidate.dispatch.dispatch_strength
            share_LP = fit_dispatch(windows_TLE, planned.slot_to_expert_LP, spec.topology, strength).share_LP
            cpu_ms, wall_ms = (
                cpu_ms + (time.thread_time() - cpu_start) * 1e3,
                wall_ms + (time.perf_counter() - start) * 1e3,
            )
            planned = replace(planned, share_LP=share_LP)
        times.append((cpu_ms, wall_ms))
        if len(times) >= repeats or cpu_ms > LONG_MS:
            return planned, times


def reference_rows(case: Case) -> list[Row]:
    """The initial placement, which never moves, and the PAR that no placement can beat."""
    num_plans, spec = case.num_intervals - 1, case.spec
    score = _Score()
    for plan in range(num_plans):
        score.add(case, plan, Planned(initial_placement(spec)))
    bound = [interval_bound(case.windows(interval), spec.topology) for interval in range(num_plans + 1)]
    return [
        {"case": case.label, "policy": "(initial placement)", **score.row(), "moved_share": 0.0},
        {
            "case": case.label,
            "policy": "(lower bound)",
            "par_planned": float(np.mean(bound[:-1])),
            "par_next": float(np.mean(bound[1:])),
        },
    ]

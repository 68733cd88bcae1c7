"""When to decide: a pure function of what the session knows."""

import math
from dataclasses import dataclass

__all__ = ["TriggerState", "decide"]


@dataclass(frozen=True, kw_only=True)
class TriggerState:
    """What a decision depends on.

    Fields:
        requested: an operator asks for a rebalance, with these words; "" if none does.
        paused: an operator stopped decisions of the daemon's own.
        steps: steps of the group since the last decision (or since the session began).
        interval_steps: steps between two decisions.
        num_windows: complete windows with traffic.
        par_live: mean PAR of these windows under the live placement, over layers with load.
        par_threshold: PAR above which rebalancing is worth a look.
        min_gap_steps: steps between two decisions, however PAR rises.
        par_newest: mean PAR of the newest window alone.
        par_reached: least of any window since the last decision ended: what the placement can do for the traffic it was made for.
        load_change: how much load has changed since it was last decided on, see load_change.py; inf: it was not decided on yet.
        least_change: below which nothing is decided.
        par_drift: by which share PAR has to rise above that for a decision before the interval is over; inf: never.
    """

    requested: str = ""
    paused: bool = False
    steps: int
    interval_steps: int
    num_windows: int
    par_live: float
    par_threshold: float
    min_gap_steps: int = 0
    par_newest: float = 1.0
    par_reached: float = math.inf
    par_drift: float = math.inf
    load_change: float = math.inf
    least_change: float = 0.0


def decide(state: TriggerState) -> str | None:
    """Why to decide now, for people; None if not. An operator's request always fires."""
    if state.requested:
        return state.requested
    if state.paused or state.num_windows < 1 or state.load_change < state.least_change:
        return None
    if state.steps >= state.interval_steps and state.par_live > state.par_threshold:
        return f"PAR {state.par_live:.3f} > {state.par_threshold:g} after {state.steps} steps"
    drifted = state.par_newest > max(state.par_threshold, state.par_reached * (1 + state.par_drift))
    if drifted and state.steps >= state.min_gap_steps:
        return f"PAR rose from {state.par_reached:.3f} to {state.par_newest:.3f} in {state.steps} steps"
    return None

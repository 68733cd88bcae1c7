"""When to decide: a pure function of what the session knows."""

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
    """

    requested: str = ""
    paused: bool = False
    steps: int
    interval_steps: int
    num_windows: int
    par_live: float
    par_threshold: float


def decide(state: TriggerState) -> str | None:
    """Why to decide now, for people; None if not. An operator's request always fires."""
    if state.requested:
        return state.requested
    if state.paused or state.num_windows < 1 or state.steps < state.interval_steps:
        return None
    if not state.par_live > state.par_threshold:
        return None
    return f"PAR {state.par_live:.3f} > {state.par_threshold:g} after {state.steps} steps"

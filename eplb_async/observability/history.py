"""What was decided, why, and what came of it: one frozen record per decision, the newest few hundred kept.

A record is added when a decision begins to matter (a plan is published, or it is clear that none will be) and replaced,
under the same number, as more becomes known: progress, outcome, realised PAR.
"""

from collections import OrderedDict
from enum import Enum
from typing import Any

import msgspec

__all__ = ["Decision", "DecisionHistory", "Outcome"]


class Outcome(Enum):
    """What came of a decision. PLANNING and PUBLISHED are on the way, the others are final.

    PLANNING -> PUBLISHED -> FINISHED | DROPPED | UNKNOWN, or PLANNING -> NOTHING_PAYS | DRY_RUN | FAILED | UNKNOWN.
    """

    PLANNING = "planning"
    PUBLISHED = "published"
    FINISHED = "finished"
    DROPPED = "dropped"
    UNKNOWN = "unknown"
    """The incarnation ended, or the daemon stopped, before the plan did."""
    NOTHING_PAYS = "nothing pays"
    DRY_RUN = "dry run"
    FAILED = "failed"

    @property
    def final(self) -> bool:
        """True if nothing more will come of it."""
        return self not in (Outcome.PLANNING, Outcome.PUBLISHED)


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One decision, JSON-able.

    Fields:
        number: running number of the daemon's life; newer ones are greater.
        group, incarnation, generation: what it was for; generation of the plan that was or would have been published.
        time_unix_s, step: when it was triggered, and the step that all ranks had reached.
        trigger: why, for people.
        policy: name of the policy.
        shadow: nothing was moved: what follows is what would have come of it.
        outcome: what came of it.
        why: the reason for an outcome without a plan, or the error's text.
        par_live, par_predicted, par_realised: mean PAR over the layers before, as planned, and measured after.
        par_live_L, par_predicted_L, par_realised_L: the same per layer; predicted: with the layers that were chosen.
        layers: that change.
        num_entries, num_committed: commits in the plan, and those that happened.
        num_moves, bytes_moved, bytes_between_ranks: slots filled anew, bytes pulled for them, and those from other ranks.
        trust: factor on predicted gains when it was made; trust_after: since it was judged.
        reverts: number of the decision whose rows are taken back; None for others.
        gain_predicted, gain_realised, gain_noise: by how much the PAR of the changed layers falls, on average: as planned, on the windows after the
            last commit, under the new rows against those before, and the standard deviation of that.
        verdict: what this says of the plan: paid, did not pay, harmed, with numbers; "" until it is known.
        saved_ms_per_step, moving_ms, cost_fit: time that the plan was to save in each step, and that its moves were to take from all steps together, by
            which fit of step times; None and "" where that was not known.
        step_ms_before, step_ms_after: mean time of a step in the windows before the plan, and in those that it is judged by.
        decide_s: from the trigger to the proposal; policy_s: the policy's share of it.
        publish_to_first_stage_s: from publication until some rank has staged an entry.
        publish_to_last_commit_s, trigger_to_last_commit_s: until all ranks have committed the last entry.
    """

    number: int
    group: str
    incarnation: int
    time_unix_s: float
    trigger: str
    policy: str
    outcome: Outcome
    step: int = -1
    generation: int = 0
    shadow: bool = False
    why: str = ""
    par_live: float | None = None
    par_predicted: float | None = None
    par_realised: float | None = None
    par_live_L: tuple[float, ...] = ()
    par_predicted_L: tuple[float, ...] = ()
    par_realised_L: tuple[float, ...] = ()
    layers: tuple[int, ...] = ()
    num_entries: int = 0
    num_committed: int = 0
    num_moves: int = 0
    bytes_moved: int = 0
    bytes_between_ranks: int = 0
    trust: float = 1.0
    trust_after: float | None = None
    reverts: int | None = None
    gain_predicted: float | None = None
    gain_realised: float | None = None
    gain_noise: float | None = None
    verdict: str = ""
    saved_ms_per_step: float | None = None
    moving_ms: float | None = None
    cost_fit: str = ""
    step_ms_before: float | None = None
    step_ms_after: float | None = None
    decide_s: float | None = None
    policy_s: float | None = None
    publish_to_first_stage_s: float | None = None
    publish_to_last_commit_s: float | None = None
    trigger_to_last_commit_s: float | None = None


class DecisionHistory:
    """The newest decisions of one group, over all its incarnations."""

    def __init__(self, length: int) -> None:
        """`length`: decisions kept."""
        self._decisions: OrderedDict[int, Decision] = OrderedDict()
        self._length = length

    def put(self, decision: Decision) -> None:
        """Add a decision, or replace the one of the same number in its place."""
        self._decisions[decision.number] = decision
        while len(self._decisions) > self._length:
            self._decisions.popitem(last=False)

    def change(self, number: int, **fields: Any) -> Decision | None:
        """Replace fields of a decision; None if it is no longer kept."""
        if (old := self._decisions.get(number)) is None:
            return None
        self.put(new := msgspec.structs.replace(old, **fields))
        return new

    def get(self, number: int) -> Decision | None:
        """A decision by its number; None if it is no longer kept."""
        return self._decisions.get(number)

    def newest(self, most: int | None = None) -> list[Decision]:
        """The newest decisions, oldest of them first."""
        decisions = list(self._decisions.values())
        return decisions if most is None else decisions[max(0, len(decisions) - most) :]

    def resize(self, length: int) -> None:
        """Keep another number of decisions from now on."""
        self._length = length
        while len(self._decisions) > length:
            self._decisions.popitem(last=False)

"""Shadow mode: everything but the moves. Plans are made, judged and written down as if they were applied, and no rank is told.

    windows (real)  ->  decisions under the shadow placement  ->  plans  ->  modelled ranks stage and commit them, step by step  ->  shadow placement

The next decision is made from where the plans before it would have led, so the history is that of a daemon that moves. What would have
been gained is the difference between two PARs of the same windows: under the live placement, and under the shadow's.
"""

import logging
from collections.abc import Sequence

import numpy as np

from eplb_async.core.clock import Clock
from eplb_async.core.config import HookSettings
from eplb_async.core.plan import Plan, counter
from eplb_async.runtime.group_view import GroupFacts, LiveView
from eplb_async.runtime.live_par import LivePar, mean_with_load
from eplb_async.runtime.messages import ShadowStatus
from eplb_async.runtime.modelled_live import ModelledLive
from eplb_async.runtime.publisher import PlanEnd
from eplb_async.runtime.replay_ranks import ReplayRanks
from eplb_async.runtime.windows import Window
from eplb_async.shm.words import Word

__all__ = ["BYTES_PER_US", "Shadow"]

logger = logging.getLogger(__name__)

BYTES_PER_US = 50_000.0
"""That a modelled rank receives: 50 GB/s."""
MOST_STEPS = 4096
"""Modelled between two looks; of more, the last ones."""


class Shadow:
    """The publisher of a shadow: the same calls, and ranks that are modelled. Used by the session's task only.

    Attributes:
        live: what all ranks would have.
    """

    def __init__(self, facts: GroupFacts, start: LiveView, hook: HookSettings, clock: Clock) -> None:
        """From the live placement; `hook`: pacing of the ranks, as far as this process knows it."""
        self._facts, self._clock = facts, clock
        self.live = ModelledLive(facts.spec, start.rows_LP.copy())
        self._ranks = ReplayRanks(facts.spec.num_ranks, facts.staging_rows, hook, BYTES_PER_US)
        self._pars = [LivePar(facts.spec.topology, facts.spec.num_layers) for _ in range(2)]
        self._plan: Plan | None = None
        self._position, self._generation, self._step = 0, 1, -1
        self._published_s = self._looked_s = clock.monotonic_s()
        self._sums = np.zeros(2)
        self._num_windows = self._num_plans = self._num_moves = self._num_bytes = 0

    @property
    def committed(self) -> int:
        """Where the modelled ranks stand."""
        return counter(self._generation, self._position)

    def may_publish(self, words: Sequence[Word]) -> int | None:
        """The generation that a plan would have now; None while one is under way."""
        return None if self._plan is not None else self._generation

    def publish(self, plan: Plan, words: Sequence[Word]) -> None:
        """A plan begins."""
        self._plan, self._position, self._published_s = plan, 0, self._clock.monotonic_s()
        self._ranks.publish(plan, self._facts.spec.slots_per_rank, self._facts.slot_bytes)
        logger.info("group %s: shadow plan %d: %d entries", self._facts.group, plan.generation, len(plan.entries))

    def observe(self, words: Sequence[Word]) -> PlanEnd | None:
        """The ranks have made steps: how the plan would have ended, if it has."""
        step, now_s = min(word.step for word in words), self._clock.monotonic_s()
        num = min(MOST_STEPS, step - self._step) if self._step >= 0 else 0
        ended = None
        for index in range(num):
            at_s = self._looked_s + (now_s - self._looked_s) * (index + 1) / num
            if self._plan is not None and self._ranks.step(1e6 * at_s) is not None:
                self._position += 1
                self.live.commit(self._plan, self._position)
                if not self._ranks.busy:
                    ended = self._end(self._plan, at_s)
        self._step, self._looked_s = step, now_s
        return ended

    def count(self, windows: Sequence[Window], live: LiveView) -> None:
        """Windows are complete: what they are worth under the live placement and under the shadow's."""
        for window in windows:
            self._sums += [
                mean_with_load(known.of([window], view.rows_LP, view.dispatch.share_LP))
                for known, view in zip(self._pars, (live, self.live), strict=True)
            ]
            self._num_windows += 1

    def status(self) -> ShadowStatus:
        """What would have been gained so far, and for what."""
        live, shadow = (self._sums / max(1, self._num_windows)).tolist()
        return ShadowStatus(
            windows=self._num_windows,
            par_live=live if self._num_windows else None,
            par_shadow=shadow if self._num_windows else None,
            plans=self._num_plans,
            moves=self._num_moves,
            bytes_moved=self._num_bytes,
        )

    def _end(self, plan: Plan, at_s: float) -> PlanEnd:
        self._plan, self._position = None, 0
        self._generation = plan.generation + 1
        self._num_plans += 1
        self._num_moves += plan.num_moves
        self._num_bytes += plan.bytes_moved
        return PlanEnd(
            plan=plan,
            finished=True,
            num_committed=len(plan.entries),
            publish_to_first_stage_s=None,
            publish_to_end_s=at_s - self._published_s,
            why="",
        )

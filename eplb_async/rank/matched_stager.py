"""Staging of a group on several nodes: entries begin on all ranks at the same step, since what crosses nodes has two ends.

An entry begins at the first step whose reduced words allow it, and that is a function of these words and the plan alone:

    all hold the plan     least and greatest digest are this plan's, once; from then on until it ends
    order                 the entries before it have begun
    sources are live      min(committed) covers the entry before it of the same layer (I12)
    rows are free         on each rank, what it receives in the entries after min(committed) and up to this one fits

All ranks see the same vector at the same step, hold the same bytes of the plan, and so begin the same entries then; a rank
that has failed meanwhile too, until the drop is decided, for its peers begin. Own rows are free then: those in use belong
to entries after the own `committed`, which is not behind the least one. Pulls inside the node have one end, and are
issued from the entries that have begun, within the step's budget.

Two contents of one generation would never begin, and so never meet the rule that drops them by their digests (I2); a rank
that sees in the words that all hold a plan, and not the same one, gives it up by its error word. Words of a time in which
ranks held another generation are no danger: while one of them held plan g - 1, min(committed) was below (g, 0), and with
such words no rank holds plan g (I4).
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from eplb_async.core.config import HookSettings
from eplb_async.core.errors import PlanInvalid
from eplb_async.core.placement import IntArray
from eplb_async.core.plan import NO_PLAN, counter, generation_of, position_of
from eplb_async.core.spec import MoESpec
from eplb_async.rank.plan_reader import PreparedEntry, PreparedPlan
from eplb_async.rank.stager import Incoming, Stager
from eplb_async.rank.transfer.base import Pull, Transfer
from eplb_async.rank.transfer.rounds import Move
from eplb_async.rank.transfer.torch_dist import TorchDistTransfer
from eplb_async.shm.words import Reduced

__all__ = ["MatchedStager", "Ways"]


class Ways(NamedTuple):
    """How experts come to a rank.

    Fields:
        inside: from ranks of its node, and itself; owns the staging rows.
        between: from those of other nodes.
    """

    inside: Transfer
    between: TorchDistTransfer


class MatchedStager(Stager):
    """See the module. Only the thread that steps may call it."""

    def __init__(
        self,
        ways: Ways,
        settings: HookSettings,
        fingerprints: Callable[[int, int], Sequence[int] | None],
        spec: MoESpec,
        rank: int,
    ) -> None:
        super().__init__(ways.inside, settings, fingerprints)
        self._between, self._spec = ways.between, spec
        self._width, self._node = spec.topology.ranks_per_node, rank // spec.topology.ranks_per_node
        self._all_hold = False
        self._conflict: PlanInvalid | None = None
        self._received_KR: IntArray = np.zeros((1, spec.num_ranks), dtype=np.int32)

    def start(self, plan: PreparedPlan) -> None:
        """See Stager; nothing begins before all hold the plan."""
        super().start(plan)
        self._all_hold, self._conflict = False, None
        slots, ranks = self._spec.slots_per_rank, self._spec.num_ranks
        received = [np.bincount(entry.moves_M3[:, 2] // slots, minlength=ranks) for entry in plan.entries]
        # row k: what each rank receives in the first k entries
        self._received_KR = np.concatenate([np.zeros((1, ranks), dtype=np.int64), np.cumsum(received, axis=0)])

    def agree(self, words: Reduced) -> None:
        """See Stager."""
        plan = self._plan
        if plan is None:
            return
        if NO_PLAN != words.least_digest != words.greatest_digest:
            self._conflict = PlanInvalid(f"the nodes hold different plans of generation {plan.generation}")
        self._all_hold |= words.least_digest == words.greatest_digest == plan.digest
        while self._all_hold and self._may_begin(plan, words.committed):
            self._begin(plan.entries[self._next])

    def poll(self) -> tuple[int, Exception | None]:
        """See Stager."""
        position, error = super().poll()
        return position, error or (self._conflict if self._plan is not None else None)

    def close(self) -> None:
        """See Stager."""
        self._between.close()

    def _may_begin(self, plan: PreparedPlan, all_committed: int) -> bool:
        if self._next == plan.length:
            return False
        entry = plan.entries[self._next]
        if entry.previous and all_committed < counter(plan.generation, entry.previous):
            return False
        # before (g, 0) some rank still had the plan before, on its device; its rows are not free
        done = position_of(all_committed) if generation_of(all_committed) == plan.generation else -1
        if done < 0:
            return False
        waiting_R = self._received_KR[entry.position] - self._received_KR[done]
        return int(waiting_R.max()) <= self._transfer.staging.num_rows

    def _begin(self, entry: PreparedEntry) -> None:
        incoming = self._open(entry)
        pulls = incoming.waiting
        incoming.waiting = deque((pull, row) for pull, row in pulls if self._is_inside(pull))
        rows = {pull.slot: row for pull, row in pulls if not self._is_inside(pull)}
        moves = self._moves_between(entry)
        one_peer = self._settings.one_peer_at_a_time
        ended = self._between.begin(entry.layer, moves, rows, self._fingerprints, one_peer)
        if ended is not None:
            incoming.copies.append(ended)
            # counted as one row: what crosses nodes is bounded by the staging rows, not by the budget
            self.bytes_in_flight += incoming.row_bytes
        self.rows_pulled += len(rows)
        self.bytes_pulled += len(rows) * incoming.row_bytes

    def _is_inside(self, pull: Pull) -> bool:
        return pull.source_rank // self._width == self._node

    def _moves_between(self, entry: PreparedEntry) -> list[Move]:
        slots = self._spec.slots_per_rank
        _, source, destination = entry.moves_M3.T
        per_node = slots * self._width
        crossing = entry.moves_M3[source // per_node != destination // per_node]
        return [Move(e, p // slots, p % slots, q // slots, q % slots) for e, p, q in crossing.tolist()]

    def _to_issue(self, plan: PreparedPlan, all_committed: int) -> Incoming | None:
        return next((incoming for incoming in self._incoming if incoming.waiting), None)

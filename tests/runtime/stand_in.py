"""Ranks without a model: they drive the real words, rings, board and live placement as hooks do, in one process.

`StandInGroup` is stepped by hand; `python -m tests.runtime.stand_in JSON` steps one in a process of its own until its
standard input ends. All its ranks share one set of counters, which is what the agreement makes real ranks have.
"""

import json
import os
import select
import sys
import time
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.load import LoadKind, Phase
from eplb_async.core.placement import initial_placement
from eplb_async.core.plan import FIRST_COUNTER, NO_PLAN, Plan, counter, decode_plan, generation_of, position_of
from eplb_async.core.spec import MoESpec
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.live import LivePlacement
from eplb_async.shm.ring import LoadRing, RingInfo
from eplb_async.shm.words import AgreementWords, GroupInfo, MemberState

__all__ = ["StandInGroup", "StandInOptions", "group_info"]


@dataclass(frozen=True, kw_only=True)
class StandInOptions:
    """`stuck`: never stage anything, but obey aborts. `skew`: exponent of the experts' popularity.

    `prefill_times`: tokens of a prefill step over those of others, with the popular experts unpopular and the other way round; 0: as any step.
    `spites`: as soon as a plan is committed, the experts that it has put on rank 0 become the popular ones, for ever.
    """

    kind: LoadKind = LoadKind.LOGICAL
    ring_records: int = 256
    stuck: bool = False
    skew: float = 1.0
    spites: bool = False
    prefill_times: float = 0.0
    incarnation: int = 1


def group_info(group: str, spec: MoESpec, staging_rows: int = 2) -> GroupInfo:
    """A group's description with 100 bytes per slot."""
    return GroupInfo(
        group=group,
        spec=spec,
        lag=2,
        history=64,
        staging_rows=staging_rows,
        slot_bytes=[100] * spec.num_layers,
        tensors="none",
    )


class StandInGroup:
    """All ranks of a group. Attributes are the real shared objects and the counters that all its ranks have."""

    def __init__(self, info: GroupInfo, options: StandInOptions) -> None:
        self.info, self.options, spec = info, options, info.spec
        self.rows_LP = initial_placement(spec)
        self.board = PlanBoard.create(info.group, spec, options.incarnation)
        self.live = LivePlacement.create(info.group, spec, self.rows_LP, options.incarnation)
        width = {
            LoadKind.LOGICAL: spec.num_experts,
            LoadKind.GLOBAL_SLOTS: spec.num_slots,
            LoadKind.LOCAL_SLOTS: spec.slots_per_rank,
        }[options.kind]
        self.rings = [
            LoadRing.create(
                RingInfo(
                    group=info.group,
                    rank=rank,
                    kind=options.kind,
                    num_layers=spec.num_layers,
                    width=width,
                    num_records=options.ring_records,
                ),
                options.incarnation,
            )
            for rank in range(spec.num_ranks)
        ]
        self.words = AgreementWords.create(info, options.incarnation)
        for rank in range(spec.num_ranks):
            self.words.join(rank, os.getpid())
            self.words.set_state(rank, MemberState.READY)
        self.step_number, self.error = 0, 0
        self.staged = self.decided = self.committed = FIRST_COUNTER
        self.plan: Plan | None = None
        self.popularity_E = np.arange(1, spec.num_experts + 1, dtype=np.float64) ** -options.skew

    def load_LE(self, rank: int, tokens: int = 1000, phase: Phase = Phase.DECODE) -> NDArray[np.int64]:
        """Tokens per expert of one rank in one step: popular experts first, the same in every layer."""
        share_E = self.popularity_E / self.popularity_E.sum()
        if phase is Phase.PREFILL and self.options.prefill_times:
            share_E = self.options.prefill_times * share_E[::-1]
        return np.tile((share_E * (tokens + rank)).astype(np.int64), (self.info.spec.num_layers, 1))

    def step(self, phase: Phase = Phase.DECODE, previous_us: int = 0) -> None:
        """One step of all ranks: words, decision, plan, forward, record, which tells what the step before took."""
        for rank in range(self.words.num_ranks):
            digest = NO_PLAN if self.plan is None else 1
            self.words.publish(rank, self.step_number, (self.staged, self.committed, self.error, digest))
        self.committed = self.decided
        self._decide()
        self._adopt()
        for rank, ring in enumerate(self.rings):
            times = self.options.prefill_times if phase is Phase.PREFILL else 0
            tokens = int(1000 * (times or 1))
            ring.begin(self.step_number, phase, self.decided, tokens, previous_us)[:] = self._counts(rank, phase)
            ring.publish()
        self.step_number += 1

    def close(self, *, end: bool = True) -> None:
        """Remove all segments."""
        if end:
            self.words.end()
        parts: list[AgreementWords | PlanBoard | LivePlacement | LoadRing] = [
            self.words,
            self.board,
            self.live,
            *self.rings,
        ]
        for part in parts:
            part.segment.unlink()
            part.close()

    def _decide(self) -> None:
        generation = generation_of(self.decided)
        if self.board.abort >= generation:
            self.error = self.board.abort
        if self.error >= generation:
            self.staged = self.decided = counter(self.error + 1, 0)
            self.plan = None
        elif self.plan is not None and self.staged > self.decided:
            position = position_of(self.decided) + 1
            entry = self.plan.entries[position - 1]
            self.rows_LP[entry.layer] = entry.slot_to_expert_P
            self.live.commit(entry.layer, entry.slot_to_expert_P, counter(generation, position))
            self.decided = self.plan.after(position)
            self.staged = max(self.staged, self.decided)
            if position == len(self.plan.entries):
                self.plan = None
                if self.options.spites and generation == 1:
                    first_P = self.rows_LP[0, : self.info.spec.slots_per_rank]
                    self.popularity_E[:] = 1.0
                    self.popularity_E[first_P[first_P >= 0]] = 20.0

    def _adopt(self) -> None:
        generation = generation_of(self.decided)
        posted = self.board.read()
        quiet = self.plan is None and not position_of(self.decided) and self.committed == self.decided
        if posted is not None and quiet and posted.generation == generation and self.error < generation:
            self.plan = decode_plan(posted.data)
        if self.plan is not None and not self.options.stuck and self.staged == self.decided:
            self.staged = counter(generation, position_of(self.decided) + 1)

    def _counts(self, rank: int, phase: Phase) -> NDArray[np.int64]:
        load_LE, spec = self.load_LE(rank, phase=phase), self.info.spec
        if self.options.kind is LoadKind.LOGICAL:
            return load_LE
        # everything goes to the last slot of its expert: easy to tell which row it was counted under
        counts_LP = np.zeros((spec.num_layers, spec.num_slots), dtype=np.int64)
        for layer, row_P in enumerate(self.rows_LP):
            last_E = {int(expert): slot for slot, expert in enumerate(row_P)}
            for expert, slot in last_E.items():
                counts_LP[layer, slot] = load_LE[layer, expert]
        if self.options.kind is LoadKind.GLOBAL_SLOTS:
            return counts_LP
        return counts_LP[:, rank * spec.slots_per_rank : (rank + 1) * spec.slots_per_rank]


def main() -> None:
    """Serve a group until the input ends: {"group", "spec", "step_s", "phases" of steps, in turn, and fields of StandInOptions}."""
    arguments = json.loads(sys.argv[1])
    spec = MoESpec(**arguments.pop("spec"))
    info, step_s = group_info(arguments.pop("group"), spec), arguments.pop("step_s", 0.002)
    phases = cycle(map(Phase, arguments.pop("phases", ["decode"])))
    arguments["kind"] = LoadKind(arguments.get("kind", "logical"))
    group = StandInGroup(info, StandInOptions(**arguments))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    began = time.monotonic()
    while not select.select([0], [], [], step_s)[0]:
        before, began = began, time.monotonic()
        group.step(next(phases), int(1e6 * (began - before)))
    group.close()


if __name__ == "__main__":
    main()

"""What a daemon does to ranks, done by a test: plans on the board, aborts, and looking at words."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from eplb_async.core.diff import aligned_target, commit_rows, moves_between
from eplb_async.core.placement import IntArray, initial_placement
from eplb_async.core.plan import Plan, PlanEntry, counter, encode_plan, generation_of, plan_digest, position_of
from eplb_async.core.spec import MoESpec
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.words import AgreementWords

__all__ = ["Publisher", "changed_entry", "shuffled"]


def shuffled(row_P: IntArray, random: np.random.Generator, spec: MoESpec) -> IntArray:
    """Another row of the same experts, aligned to this one."""
    target_P = row_P.copy()
    random.shuffle(target_P)
    return aligned_target(row_P, target_P, spec.topology)


class Publisher:
    """The daemon's end of the board of a group that is attached; `trace` records what tests/model can check."""

    def __init__(self, group: str, spec: MoESpec, placement: IntArray | None = None) -> None:
        self.spec, self.words = spec, AgreementWords.open(group)
        self.board = PlanBoard.open(group, self.words.incarnation)
        self.rows_LP = (initial_placement(spec) if placement is None else placement).copy()
        self.versions = [0] * spec.num_layers
        self.trace: list[dict[str, Any]] = []
        self._base: dict[int, list[int]] = {}

    def counters(self) -> list[tuple[int, int]]:
        """(generation, position) of `committed` in the newest word of each rank."""
        words = [self.words.newest(rank) for rank in self.words.info.ranks]
        return [
            (0, 0) if word is None else (generation_of(word.committed), position_of(word.committed)) for word in words
        ]

    @property
    def generation(self) -> int:
        """The number that the ranks' counters give to the next plan."""
        return min(self.counters())[0]

    def done(self, generation: int = 0) -> bool:
        """True if every rank has finished or dropped the plan on the board (or this one)."""
        if not generation:
            posted = self.board.read()
            generation = posted.generation if posted else 0
        return min(self.counters()) >= (generation + 1, 0)

    def plan(self, changes: Sequence[tuple[int, IntArray]], **fields: Any) -> Plan:
        """A plan from the placement that `applied` keeps: (layer, row) one after the other, each split as needed.

        Args:
            changes: the same layer may come several times.
            fields: of Plan, instead of the right ones.
        """
        generation, topology = self.generation, self.spec.topology
        rows, versions = self.rows_LP.copy(), list(self.versions)
        sent_R, entries = np.zeros(self.spec.num_ranks, dtype=np.int64), []
        for layer, target_P in changes:
            for row_P in commit_rows(rows[layer], target_P, topology, self.words.info.staging_rows):
                moves = moves_between(rows[layer], row_P, topology, sent_R)
                entries.append(PlanEntry(layer, versions[layer], row_P.astype("<i4").tobytes(), moves.tobytes()))
                rows[layer], versions[layer] = row_P, counter(generation, len(entries))
        whole = {"incarnation": self.words.incarnation, "generation": generation, "entries": entries, **fields}
        return Plan(**whole)

    def post(self, plan: Plan, generation: int = 0) -> Plan:
        """Put a plan on the board, as `generation` if given."""
        data = encode_plan(plan)
        layers = sorted({entry.layer for entry in plan.entries})
        self.trace.append(
            {
                "event": "board",
                "plan": plan_digest(data),
                "generation": generation or plan.generation,
                "base": [[layer, self.rows_LP[layer].tolist()] for layer in layers],
                "entries": [[entry.layer, entry.slot_to_expert_P.tolist()] for entry in plan.entries],
            }
        )
        self.board.post(generation or plan.generation, data)
        return plan

    def applied(self, plan: Plan, num_entries: int | None = None) -> None:
        """Tell what of a plan the ranks have committed; all of it by default."""
        for position, entry in enumerate(plan.entries[:num_entries], start=1):
            self.rows_LP[entry.layer] = entry.slot_to_expert_P
            self.versions[entry.layer] = counter(plan.generation, position)

    def abort(self, generation: int) -> None:
        """Order an abort."""
        self.trace.append({"event": "abort", "generation": generation})
        self.board.order_abort(generation)

    def close(self) -> None:
        """Drop the mappings."""
        self.board.close()
        self.words.close()


def changed_entry(plan: Plan, position: int, **fields: Any) -> Plan:
    """The plan with other fields in one entry."""
    entries = list(plan.entries)
    entries[position - 1] = msgspec.structs.replace(entries[position - 1], **fields)
    return msgspec.structs.replace(plan, entries=entries)

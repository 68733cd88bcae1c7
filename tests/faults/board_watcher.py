"""What daemons did, read off a board by a thread of the test's process while they do it.

No plan is missed: a plan stays on the board for many steps at least, until every rank is done with it and a new one is due.
"""

import threading
from typing import Any

from eplb_async.core.errors import PlanInvalid
from eplb_async.core.placement import IntArray
from eplb_async.core.plan import Plan, decode_plan, generation_of, position_of
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.words import AgreementWords

__all__ = ["BoardWatcher"]

LOOK_S = 0.002
DAMAGED_GENERATIONS = 40


class BoardWatcher:
    """Watches one incarnation's board from its first step on, in the words of tests/model/trace_events.py.

    Attributes:
        board, words: mapped.
        num_plans, num_aborts: seen.
    """

    def __init__(self, group: str, start_LP: IntArray) -> None:
        self.words = AgreementWords.open(group)
        self.board = PlanBoard.open(group, self.words.incarnation)
        self.num_plans = self.num_aborts = 0
        self._start_LP, self._plans = start_LP, dict[int, Plan]()
        self._trace: list[dict[str, Any]] = []
        self._sequence = self._abort = 0
        self._noted: set[int] = set()
        self._damaged: set[int] = set()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="board watcher", daemon=True)
        self._thread.start()

    def take(self) -> list[dict[str, Any]]:
        """What came since the last call, up to now."""
        with self._lock:
            self._look()
            taken, self._trace = self._trace, []
            return taken

    def note(self, event: str) -> None:
        """A crash or a restart, at this place."""
        with self._lock:
            self._look()
            self._trace.append({"event": event})

    def note_damage(self) -> None:
        """Somebody is about to write to the board. A damaged plan stays there until the next one is posted, and each daemon that
        finds it aborts the generation at hand: any of those that come may suffer."""
        with self._lock:
            self._look()
            first = self.generation
            self._trace += [
                {"event": "damage", "generation": g}
                for g in range(first, first + DAMAGED_GENERATIONS)
                if g not in self._damaged
            ]
            self._damaged |= set(range(first, first + DAMAGED_GENERATIONS))

    @property
    def generation(self) -> int:
        """Of the slowest rank's newest word."""
        words = [self.words.newest(rank) for rank in range(self.words.num_ranks)]
        return min(generation_of(word.committed) if word else 1 for word in words)

    def close(self) -> None:
        """Stop watching, drop the mappings."""
        self._over.set()
        self._thread.join()
        self.board.close()
        self.words.close()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            with self._lock:
                self._look()

    def _look(self) -> None:
        posted, sequence, abort = None, self.board.sequence, self.board.abort
        if sequence != self._sequence and not sequence & 1:
            try:
                posted = self.board.read()
            except PlanInvalid:
                self._sequence = sequence
        # of an older plan: it came before the new one was written
        if abort != self._abort and (posted is None or abort < posted.generation):
            self._note_abort(abort)
        if posted is not None:
            self._sequence = sequence
            try:
                self._note_plan(decode_plan(posted.data), posted.digest)
            except PlanInvalid:
                # of another release: ranks refuse it, and nothing of it can be said
                self._trace.append({"event": "damage", "generation": posted.generation})
        if abort != self._abort:
            self._note_abort(abort)

    def _note_plan(self, plan: Plan, digest: int) -> None:
        if plan.generation in self._plans:
            return  # the sequence was damaged, and the same plan read again
        self._plans[plan.generation] = plan
        self.num_plans += 1
        layers = {entry.layer: entry for entry in reversed(plan.entries)}
        self._trace.append(
            {
                "event": "board",
                "plan": digest,
                "generation": plan.generation,
                "base": [[layer, self._row(layer, entry.base_version)] for layer, entry in sorted(layers.items())],
                "entries": [[entry.layer, entry.slot_to_expert_P.tolist()] for entry in plan.entries],
            }
        )

    def _note_abort(self, abort: int) -> None:
        # words that no daemon wrote are ignored by all, or noted as damage
        self._abort = abort
        if abort in {*self._plans, self.generation} - self._noted:
            self._noted.add(abort)
            self.num_aborts += 1
            self._trace.append({"event": "abort", "generation": abort})

    def _row(self, layer: int, version: int) -> list[int]:
        """The row of that version: of an earlier plan's entry, or the first one."""
        if not version:
            row: list[int] = self._start_LP[layer].tolist()
            return row
        found: list[int] = (
            self._plans[generation_of(version)].entries[position_of(version) - 1].slot_to_expert_P.tolist()
        )
        return found

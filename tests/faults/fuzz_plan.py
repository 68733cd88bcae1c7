"""Fuzzing of plans: bytes on a real board, read, decoded and validated as a rank does it, and adopted as a daemon does it.

Three kinds of input: a plan's bytes damaged under a right checksum (a daemon of another version, or a wrong one), a valid
plan with fields exchanged, and a board whose own bytes were flipped after a right plan was posted. A rank must see a plan
that keeps what plans promise (checked here by other code than the product's), or refuse it; never anything else.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar
from uuid import uuid4

import msgspec
import numpy as np

from eplb_async.core.clock import SystemClock
from eplb_async.core.diff import commit_rows, moves_between
from eplb_async.core.errors import PlanInvalid, SegmentRefused
from eplb_async.core.placement import IntArray, expert_to_slots, initial_placement
from eplb_async.core.plan import FIRST_COUNTER, Plan, PlanEntry, counter, encode_plan, plan_digest
from eplb_async.core.spec import MoESpec
from eplb_async.rank.plan_reader import BadPlan, PlanReader, PreparedPlan, Snapshot
from eplb_async.rank.streams import Completion
from eplb_async.runtime.publisher import Publisher
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.live import LivePlacement
from eplb_async.shm.words import Word
from tests.faults.mutation import EDGES, Mutator
from tests.rank.publisher import shuffled

__all__ = ["PlanFuzz", "group_name"]

SPEC = MoESpec(num_layers=3, num_experts=6, num_ranks=2, num_redundant=2)
STAGING_ROWS = 3
INCARNATION = 7
BOARD_FLIP, BYTES, FIELDS = b"b", b"p", b"f"
"""The first byte of an input: what the rest of it is."""
ADOPT_EVERY = 16

Result = TypeVar("Result")


def group_name() -> str:
    """Of the group whose board it is; tests give it one of theirs."""
    return f"fuzz-{uuid4().hex[:8]}"


class _AtOnce:
    """A stream that runs its jobs where they are submitted."""

    def submit(self, job: Callable[[], Result]) -> Completion[Result]:
        """Errors are the caller's."""
        completion: Completion[Result] = Completion()
        completion.result, completion.done = job(), True
        return completion

    def close(self) -> None:
        """Nothing to end."""


class PlanFuzz:
    """The target `plan`."""

    name = "plan"

    def __init__(self) -> None:
        group = group_name()
        self.base_LP = initial_placement(SPEC)
        self._board = PlanBoard.create(group, SPEC, INCARNATION)
        self._live = LivePlacement.create(group, SPEC, self.base_LP, INCARNATION)
        self._stream, self._clock, self._number = _AtOnce(), SystemClock(), 0
        self._plans = [self._plan(np.random.default_rng(seed), seed % 4) for seed in range(40)]
        self._mutator = Mutator([encode_plan(plan) for plan in self._plans])
        capacity = self._board.capacity
        self._data = self._board.segment.array(np.uint8, (192 + capacity,))
        self._blank = self._data.copy()
        self._snapshot = Snapshot(self.base_LP, (0,) * SPEC.num_layers)

    def make(self, rng: Random) -> bytes:
        """One of the three kinds."""
        kind = rng.random()
        if kind < 0.25:
            flips = [rng.randrange(192 + 600) << 3 | rng.randrange(8) for _ in range(rng.choice((1, 1, 2, 5)))]
            return BOARD_FLIP + bytes([rng.randrange(len(self._plans))]) + b"".join(f.to_bytes(2, "big") for f in flips)
        if kind < 0.5:
            return FIELDS + encode_plan(self._other_fields(rng.choice(self._plans), rng))
        return BYTES + self._mutator.damaged(rng)

    def check(self, data: bytes) -> str:
        """What came of an input: nothing there, refused, or a plan.

        Raises:
            AssertionError, or any other error: a rank would have taken what is no plan, or have died of it.
        """
        self._number += 1
        self._data[:2048] = self._blank[:2048]
        flipped = data[:1] == BOARD_FLIP
        body = encode_plan(self._plans[data[1] % len(self._plans)]) if flipped else data[1:]
        if len(body) > self._board.capacity:
            try:
                self._board.post(1, body)
            except PlanInvalid:
                return "too long for the board"
        self._board.post(1, body)
        if flipped:
            for i in range(2, len(data) - 1, 2):
                place = int.from_bytes(data[i : i + 2], "big")
                self._data[(place >> 3) % len(self._data)] ^= 1 << (place & 7)
            self._read_flipped(body)
        kind = self._as_rank()
        if flipped or self._number % ADOPT_EVERY == 0:
            self._as_daemon()
        self._data[192 : 192 + len(body)] = 0
        return kind

    def close(self) -> str:
        """Remove the segments."""
        self._data = np.empty(0, dtype=np.uint8)
        for part in (self._board, self._live):
            part.segment.unlink()
            part.close()
        return ""

    def _read_flipped(self, body: bytes) -> None:
        try:
            posted = self._board.read()
        except PlanInvalid:
            return
        assert posted is None or (posted.generation, posted.digest, posted.data) == (1, plan_digest(body), body)

    def _as_rank(self) -> str:
        readers = [PlanReader(self._board, SPEC, rank, STAGING_ROWS, self._stream) for rank in range(SPEC.num_ranks)]
        found = [reader.poll(self._snapshot) for reader in readers]
        if found[0] is None:
            assert found[1] is None
            return "nothing there"
        if isinstance(found[0], BadPlan):
            assert isinstance(found[1], BadPlan) and found[0].why and len(found[0].why) < 4096
            return "refused"
        assert all(isinstance(each, PreparedPlan) for each in found)
        self._check_plan([each for each in found if isinstance(each, PreparedPlan)])
        return "a plan"

    def _check_plan(self, prepared: Sequence[PreparedPlan]) -> None:
        """What a plan promises, from the numbers alone."""
        rows = {layer: row.tolist() for layer, row in enumerate(self.base_LP)}
        width = SPEC.slots_per_rank
        for parts in zip(*(each.entries for each in prepared), strict=True):
            layer, new = parts[0].layer, parts[0].slot_to_expert_P.tolist()
            old = rows[layer]
            assert len(new) == SPEC.num_slots and set(new) - {-1} == set(range(SPEC.num_experts))
            filled = []
            for rank, entry in enumerate(parts):
                assert len(entry.pulls) <= STAGING_ROWS
                for pull in entry.pulls:
                    slot = rank * width + pull.slot
                    assert old[pull.source_rank * width + pull.source_slot] == pull.expert == new[slot]
                    filled.append(slot)
            assert sorted(filled) == [p for p in range(SPEC.num_slots) if new[p] not in (-1, old[p])]
            table, count = parts[0].table_EK.tolist(), parts[0].count_E.tolist()
            for expert in range(SPEC.num_experts):
                assert all(new[slot] == expert for slot in table[expert][: count[expert]])
                assert 1 <= count[expert] <= SPEC.max_replicas
            rows[layer] = new

    def _as_daemon(self) -> None:
        """A daemon that comes later adopts the board: as left behind, and as the plan that brought a live row."""
        for version in (0, counter(1, 1)):
            self._live.commit(0, self.base_LP[0], version)
            committed = counter(2, 0) if version else FIRST_COUNTER
            words = [Word(5, committed, committed, 0, 0)] * SPEC.num_ranks
            try:
                publisher = Publisher(self._board, self._live, words, self._clock)
                publisher.may_publish(words)
                publisher.observe(words)
            except SegmentRefused:
                continue

    def _plan(self, random: np.random.Generator, tables: int) -> Plan:
        """A valid plan of one to four entries; every fourth without tables."""
        rows, versions = self.base_LP.copy(), [0] * SPEC.num_layers
        sent_R, entries = np.zeros(SPEC.num_ranks, dtype=np.int64), []
        for layer in random.integers(0, SPEC.num_layers, random.integers(1, 3)).tolist():
            for row_P in commit_rows(rows[layer], shuffled(rows[layer], random, SPEC), SPEC.topology, STAGING_ROWS):
                moves = moves_between(rows[layer], row_P, SPEC.topology, sent_R)
                table_LEK, count_LE = expert_to_slots(row_P[None], SPEC.num_experts, SPEC.max_replicas)
                dispatch = [array[0].astype("<i4").tobytes() for array in (table_LEK, count_LE)] if tables else []
                entries.append(
                    PlanEntry(layer, versions[layer], row_P.astype("<i4").tobytes(), moves.tobytes(), *dispatch)
                )
                rows[layer], versions[layer] = row_P, counter(1, len(entries))
        if not entries:
            row = self.base_LP[0].astype("<i4").tobytes()
            entries.append(PlanEntry(0, 0, row, b""))
        return Plan(incarnation=INCARNATION, generation=1, entries=entries, policy="default", reason="drift")

    def _other_fields(self, plan: Plan, rng: Random) -> Plan:
        """One to three fields replaced by edges, or by damaged arrays."""
        for _ in range(rng.randrange(1, 4)):
            if rng.random() < 0.2:
                changed: dict[str, Any] = {rng.choice(("incarnation", "generation")): _in_64_bits(rng.choice(EDGES))}
                plan = msgspec.structs.replace(plan, **changed)
                continue
            entries = list(plan.entries)
            number = rng.randrange(len(entries))
            entry = entries[number]
            name = rng.choice(("layer", "base_version", "slots", "moves", "table", "count"))
            value = getattr(entry, name)
            new = _in_64_bits(rng.choice(EDGES)) if isinstance(value, int) else _other_array(value, rng)
            entries[number] = msgspec.structs.replace(entry, **{name: new})
            if rng.random() < 0.1:
                entries.append(entries[rng.randrange(len(entries))])
            plan = msgspec.structs.replace(plan, entries=entries)
        return plan


def _in_64_bits(number: int) -> int:
    return max(-(2**63), min(number, 2**64 - 1))


def _other_array(data: bytes, rng: Random) -> bytes:
    """Two numbers exchanged, one replaced, one more, one less, or another length."""
    array: IntArray = np.frombuffer(data[: len(data) // 4 * 4], dtype="<i4").copy()
    kind = rng.randrange(5)
    if kind == 0 and len(array) > 1:
        i, j = rng.randrange(len(array)), rng.randrange(len(array))
        array[i], array[j] = array[j], array[i]
    elif kind == 1 and len(array):
        array[rng.randrange(len(array))] = rng.choice((-1, 0, 1, 5, 6, 7, 8, 2**31 - 1, -(2**31)))
    elif kind == 2:
        return array.tobytes() + rng.randbytes(rng.choice((1, 4, 12)))
    elif kind == 3:
        return array.tobytes()[: -rng.choice((1, 4, 12))]
    else:
        return rng.choice((b"", array.tobytes() * 2, rng.randbytes(len(data))))
    return array.tobytes()

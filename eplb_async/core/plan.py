"""Plans: what a daemon publishes and ranks apply, entry by entry, all at the same step.

A plan is a list of entries. Each replaces the whole row of one layer and is a valid placement by itself; a layer whose
incoming rows exceed the staging rows has several. Progress is one number: the counter (generation, position), positions
from 1, packed into an int64 as `generation << 20 | position`. A finished or dropped plan g reads (g + 1, 0), so nobody
needs its length. The first counter is (1, 0).

On the board a plan is MessagePack: decoding runs no code and checks every type.
"""

import hashlib

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.errors import PlacementError, PlanInvalid
from eplb_async.core.placement import EMPTY, validate_placement
from eplb_async.core.spec import MoESpec

__all__ = [
    "FIRST_COUNTER",
    "NO_PLAN",
    "Plan",
    "PlanEntry",
    "counter",
    "decode_plan",
    "encode_plan",
    "generation_of",
    "plan_digest",
    "position_of",
    "validate_dispatch",
    "validate_entry",
]

POSITION_BITS = 20
MAX_GENERATION = (1 << 62 - POSITION_BITS) - 1
"""So that every counter of a plan, and the one after it, fits an int64."""
NO_PLAN = 0
"""The digest of a rank that holds no plan."""

IntArray = NDArray[np.int32]


def counter(generation: int, position: int) -> int:
    """Pack a counter; order of packed values is order of (generation, position). counter(2, 3) is 2097155."""
    return generation << POSITION_BITS | position


def generation_of(packed: int) -> int:
    """The generation of a packed counter."""
    return packed >> POSITION_BITS


def position_of(packed: int) -> int:
    """The position of a packed counter."""
    return packed & ((1 << POSITION_BITS) - 1)


FIRST_COUNTER = counter(1, 0)


class PlanEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One commit: the new row of one layer.

    Fields:
        layer: index of the MoE layer.
        base_version: packed counter of the layer's row that this entry replaces (0: the initial one).
        slots: the new row, little-endian int32 [P].
        moves: int32 [n, 3] of (expert, source slot, destination slot), in the order in which to pull them.
        table: weighted dispatch rows int32 [E, K]; empty for an even split, which ranks derive from the row.
        count: lengths of these rows int32 [E]; empty with `table`.
    """

    layer: int
    base_version: int
    slots: bytes
    moves: bytes
    table: bytes = b""
    count: bytes = b""

    @property
    def slot_to_expert_P(self) -> IntArray:
        """The new row."""
        return np.frombuffer(self.slots, dtype="<i4")

    @property
    def moves_M3(self) -> IntArray:
        """The moves, one (expert, source slot, destination slot) a row."""
        return np.frombuffer(self.moves, dtype="<i4").reshape(-1, 3)


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to change, why, and what it should bring.

    Fields:
        incarnation: of the group; plans of another one are ignored.
        generation: g; must be the one in the ranks' counters.
        entries: in commit order, at least one.
        policy, reason: who asked for what, for people.
        par_before, par_after: predicted mean PAR over the layers of the model, without and with this plan.
        num_moves, bytes_moved: slots that get another expert, and the bytes pulled for them, of the whole group.
        created_unix_s: wall-clock time of the decision.
    """

    incarnation: int
    generation: int
    entries: list[PlanEntry]
    policy: str = ""
    reason: str = ""
    par_before: float = 1.0
    par_after: float = 1.0
    num_moves: int = 0
    bytes_moved: int = 0
    created_unix_s: float = 0.0

    @property
    def last(self) -> int:
        """Packed counter of the last entry."""
        return counter(self.generation, len(self.entries))

    def after(self, position: int) -> int:
        """Packed `decided` once the entry at `position` is committed: the end of a plan reads (g + 1, 0)."""
        if position < len(self.entries):
            return counter(self.generation, position)
        return counter(self.generation + 1, 0)


_decoder = msgspec.msgpack.Decoder(Plan)


def encode_plan(plan: Plan) -> bytes:
    """The bytes for the board."""
    return msgspec.msgpack.encode(plan)


def decode_plan(data: bytes) -> Plan:
    """Read a plan.

    Raises:
        PlanInvalid: the bytes are not a plan of this version.
    """
    try:
        plan = _decoder.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise PlanInvalid(f"{len(data)} bytes on the board are not a plan: {error}") from error
    if not 1 <= plan.generation <= MAX_GENERATION:
        raise PlanInvalid(f"a plan of generation {plan.generation}; generations are 1..{MAX_GENERATION}")
    if not 1 <= len(plan.entries) < 1 << POSITION_BITS:
        raise PlanInvalid(
            f"plan of generation {plan.generation} has {len(plan.entries)} entries; it needs 1..{(1 << POSITION_BITS) - 1}"
        )
    return plan


def plan_digest(data: bytes) -> int:
    """63 bits that tell two contents of one generation apart; never NO_PLAN."""
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
    return digest or 1


def validate_entry(entry: PlanEntry, base_P: IntArray, spec: MoESpec, staging_rows: int) -> None:
    """Check one entry against the row that it replaces. Runs in the daemon and again on every rank.

    Args:
        entry: the entry.
        base_P: the layer's row before it, int32 [P].
        spec: the model.
        staging_rows: most rows that a rank may have to receive in one entry.

    Raises:
        PlanInvalid: an expert is lost, a move does not match the rows, or a rank receives too much; names the layer.
    """
    where = f"entry for layer {entry.layer}"
    if not 0 <= entry.layer < spec.num_layers:
        raise PlanInvalid(f"{where}: layers are 0..{spec.num_layers - 1}")
    if len(entry.slots) != 4 * spec.num_slots or len(entry.moves) % 12:
        raise PlanInvalid(
            f"{where}: a row of {len(entry.slots)} and moves of {len(entry.moves)} bytes do not fit the model"
        )
    row_P, moves_M3 = entry.slot_to_expert_P, entry.moves_M3
    try:
        validate_placement(row_P[None], spec)
    except PlacementError as error:
        raise PlanInvalid(f"{where}: {error}") from error
    incoming = np.flatnonzero((row_P != base_P) & (row_P != EMPTY))
    expert, source, destination = moves_M3.T
    if not np.array_equal(np.sort(destination), incoming):
        raise PlanInvalid(
            f"{where}: its moves fill slots {np.sort(destination).tolist()}, its row changes {incoming.tolist()}"
        )
    if ((source < 0) | (source >= spec.num_slots)).any():
        raise PlanInvalid(f"{where}: a move's source is not a slot")
    if (base_P[source] != expert).any() or (row_P[destination] != expert).any():
        raise PlanInvalid(f"{where}: a move's source or destination slot does not hold its expert")
    received_R = np.bincount(destination // spec.slots_per_rank, minlength=spec.num_ranks)
    if received_R.max(initial=0) > staging_rows:
        raise PlanInvalid(
            f"{where}: rank {received_R.argmax()} receives {received_R.max()} rows, staging holds {staging_rows}"
        )
    _validate_tables(entry, row_P, spec, where)


def validate_dispatch(entry: PlanEntry, spec: MoESpec) -> None:
    """Check an entry's dispatch rows against its own row: all that can be checked without the row before it.

    Raises:
        PlanInvalid: they do not fit the model or the row; names the layer.
    """
    where = f"entry for layer {entry.layer}"
    if len(entry.slots) != 4 * spec.num_slots:
        raise PlanInvalid(f"{where}: a row of {len(entry.slots)} bytes does not fit the model")
    _validate_tables(entry, entry.slot_to_expert_P, spec, where)


def _validate_tables(entry: PlanEntry, row_P: IntArray, spec: MoESpec, where: str) -> None:
    if not entry.table and not entry.count:
        return
    if len(entry.table) != 4 * spec.num_experts * spec.max_replicas or len(entry.count) != 4 * spec.num_experts:
        raise PlanInvalid(f"{where}: dispatch rows of {len(entry.table)} bytes do not fit the model")
    table_EK = np.frombuffer(entry.table, dtype="<i4").reshape(spec.num_experts, spec.max_replicas)
    count_E = np.frombuffer(entry.count, dtype="<i4")
    if ((count_E < 1) | (count_E > spec.max_replicas)).any():
        raise PlanInvalid(f"{where}: a dispatch row's length is not in 1..{spec.max_replicas}")
    used_EK = np.arange(spec.max_replicas) < count_E[:, None]
    slots_EK = np.where(used_EK, table_EK, 0)
    if ((slots_EK < 0) | (slots_EK >= spec.num_slots)).any():
        raise PlanInvalid(f"{where}: a dispatch row names a slot that does not exist")
    if (used_EK & (row_P[slots_EK] != np.arange(spec.num_experts)[:, None])).any():
        raise PlanInvalid(f"{where}: a dispatch row sends tokens to a slot of another expert")

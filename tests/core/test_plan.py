"""Plans: counters, bytes, and a check that finds every kind of damage."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_async.core.diff import moves_between
from eplb_async.core.errors import PlanInvalid
from eplb_async.core.plan import (
    FIRST_COUNTER,
    NO_PLAN,
    Plan,
    PlanEntry,
    counter,
    decode_plan,
    encode_plan,
    generation_of,
    plan_digest,
    position_of,
    validate_entry,
)
from eplb_async.core.spec import MoESpec
from tests.core.placements import Case, cases

SPEC = MoESpec(num_layers=3, num_experts=4, num_redundant=4, num_ranks=4, table_length=3)
BASE_P = np.array([0, 1, 2, 3, 0, 1, -1, 2], dtype=np.int32)
ROW = [3, 1, 2, 3, 0, -1, 1, 2]
MOVES = [[3, 3, 0], [1, 1, 6]]
TABLE = [[4, -1, -1], [1, 6, 6], [2, 7, -1], [0, 3, -1]]
COUNT = [1, 3, 2, 2]


def packed(values: object) -> bytes:
    """As in an entry."""
    return np.array(values, dtype="<i4").tobytes()


ENTRY = PlanEntry(1, 0, packed(ROW), packed(MOVES), packed(TABLE), packed(COUNT))
PLAN = Plan(incarnation=7, generation=3, entries=[ENTRY, ENTRY], policy="default", reason="drift of the live PAR é")


@given(st.lists(st.tuples(st.integers(1, 1 << 40), st.integers(0, (1 << 20) - 1)), min_size=2, max_size=2))
def test_counters_are_ordered_like_pairs(pairs: list[tuple[int, int]]) -> None:
    """Packing keeps the order (generation, position) and loses nothing."""
    first, second = (counter(*pair) for pair in pairs)
    assert (generation_of(first), position_of(first)) == pairs[0]
    assert (first < second) == (pairs[0] < pairs[1])
    assert (first == second) == (pairs[0] == pairs[1])


def test_counter_examples() -> None:
    """counter(2, 3) is 2097155; the first counter is (1, 0)."""
    assert counter(2, 3) == 2097155
    assert counter(1, 0) == FIRST_COUNTER


def test_counters_of_a_plan() -> None:
    """The end of plan 3 of two entries reads (4, 0), whichever entry asks."""
    assert PLAN.last == counter(3, 2)
    assert [PLAN.after(position) for position in (0, 1, 2)] == [counter(3, 0), counter(3, 1), counter(4, 0)]


def test_bytes_lead_back_to_the_plan() -> None:
    """What is decoded equals what was encoded, arrays included."""
    plan = decode_plan(encode_plan(PLAN))
    assert plan == PLAN
    assert plan.entries[0].slot_to_expert_P.tolist() == ROW
    assert plan.entries[0].moves_M3.tolist() == MOVES
    assert PlanEntry(0, 0, b"", b"").moves_M3.shape == (0, 3)


@pytest.mark.parametrize(
    "changes",
    [{"entries": []}, {"generation": 0}, {"generation": -1}, {"generation": 1 << 42}, {"generation": 1 << 63}],
)
def test_plans_that_cannot_be_are_refused(changes: dict[str, object]) -> None:
    """No entries, and generations whose counters would not fit an int64, are not plans."""
    with pytest.raises(PlanInvalid):
        decode_plan(encode_plan(msgspec.structs.replace(PLAN, **changes)))


@pytest.mark.parametrize("change", [{"extra": 1}, {"generation": "3"}, {"entries": [[1, 0, "x", b""]]}, {"policy": 3}])
def test_fields_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    """Unknown fields and other types are not a plan of this version."""
    fields = {**msgspec.to_builtins(PLAN, builtin_types=(bytes,)), **change}
    with pytest.raises(PlanInvalid, match="are not a plan"):
        decode_plan(msgspec.msgpack.encode(fields))


def plan_or_invalid(data: bytes) -> None:
    """Decoding gives a plan or PlanInvalid; whatever else is raised goes through."""
    try:
        plan = decode_plan(data)
    except PlanInvalid:
        return
    assert plan.entries
    assert plan.last < plan.after(len(plan.entries)) < 1 << 63


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    """Bytes from anywhere are a plan or PlanInvalid."""
    plan_or_invalid(data)


def test_cut_plans_never_raise_anything_else() -> None:
    """A plan cut anywhere is no plan, and one followed by more bytes is none."""
    data = encode_plan(PLAN)
    for length in range(len(data)):
        with pytest.raises(PlanInvalid):
            decode_plan(data[:length])
    with pytest.raises(PlanInvalid):
        decode_plan(data + b"\0")


def test_flipped_plans_never_raise_anything_else() -> None:
    """Every single damaged bit, bits of text and of lengths among them, gives a plan or PlanInvalid."""
    data = encode_plan(PLAN)
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            plan_or_invalid(bytes(damaged))


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_digests_tell_contents_apart(first: bytes, second: bytes) -> None:
    """Equal bytes, equal digest; others another one; 63 bits, and never the digest of no plan."""
    assert (plan_digest(first) == plan_digest(second)) == (first == second)
    assert 0 < plan_digest(first) < 1 << 63
    assert plan_digest(first) != NO_PLAN


def test_valid_entries_pass() -> None:
    """With dispatch rows and without; with one that sends nothing to some replica; with rows that only empty a slot."""
    validate_entry(ENTRY, BASE_P, SPEC, 1)
    validate_entry(msgspec.structs.replace(ENTRY, table=b"", count=b""), BASE_P, SPEC, 1)
    emptied = PlanEntry(0, 0, packed([0, 1, 2, 3, -1, 1, -1, 2]), b"")
    validate_entry(emptied, BASE_P, SPEC, 0)


@given(cases())
def test_moves_between_valid_placements_pass(case: Case) -> None:
    """What the planner makes of any two valid rows is a valid entry."""
    before_P, after_P = case.rows
    moves = moves_between(before_P, after_P, case.spec.topology, np.zeros(case.spec.num_ranks, dtype=np.int64))
    validate_entry(PlanEntry(0, 0, packed(after_P), moves.tobytes()), before_P, case.spec, case.spec.slots_per_rank)


def put(values: list[list[int]], place: tuple[int, int], value: int) -> bytes:
    """The bytes of a copy with one number changed."""
    changed = np.array(values, dtype="<i4")
    changed[place] = value
    return changed.tobytes()


def row_with(slot: int, expert: int) -> bytes:
    """The bytes of the row with one slot changed."""
    return put([ROW], (0, slot), expert)


DAMAGE: list[tuple[str, dict[str, object], str]] = [
    ("layer too high", {"layer": 3}, "layers are 0..2"),
    ("layer below 0", {"layer": -1}, "layers are 0..2"),
    ("row cut", {"slots": ENTRY.slots[:-4]}, "a row of 28 "),
    ("row longer", {"slots": ENTRY.slots + b"\0" * 4}, "a row of 36 "),
    ("row of odd bytes", {"slots": ENTRY.slots[:-1]}, "a row of 31 "),
    ("moves cut", {"moves": ENTRY.moves[:-4]}, "moves of 20 bytes"),
    ("unknown expert", {"slots": row_with(2, 4)}, "names expert 4"),
    ("expert lost", {"slots": row_with(4, -1)}, "no slot for expert 0"),
    ("too many replicas", {"slots": packed([3, 1, 2, 3, 0, 3, 3, 2])}, "gives expert 3 4 slots"),
    ("change without a move", {"slots": row_with(5, 0)}, "its moves fill slots [0, 6], its row changes [0, 5, 6]"),
    ("move without a change", {"moves": packed([*MOVES, [2, 2, 7]])}, "its moves fill slots [0, 6, 7]"),
    ("move twice", {"moves": packed([*MOVES, MOVES[0]])}, "its moves fill slots [0, 0, 6]"),
    ("move left out", {"moves": packed(MOVES[:1])}, "its moves fill slots [0]"),
    ("destination no slot", {"moves": put(MOVES, (0, 2), 8)}, "its moves fill slots [6, 8]"),
    ("destination below 0", {"moves": put(MOVES, (0, 2), -8)}, "its moves fill slots [-8, 6]"),
    ("source no slot", {"moves": put(MOVES, (0, 1), 8)}, "source is not a slot"),
    ("source below 0", {"moves": put(MOVES, (0, 1), -5)}, "source is not a slot"),
    ("source of another expert", {"moves": put(MOVES, (0, 1), 2)}, "does not hold its expert"),
    ("source only incoming", {"moves": put(MOVES, (1, 1), 6)}, "does not hold its expert"),
    ("another expert moved", {"moves": put(MOVES, (0, 0), 2)}, "does not hold its expert"),
    ("expert and source of another", {"moves": packed([[2, 2, 0], MOVES[1]])}, "does not hold its expert"),
    ("table cut", {"table": ENTRY.table[:-4]}, "dispatch rows of 44 bytes"),
    ("table without lengths", {"count": b""}, "dispatch rows of 48 bytes"),
    ("lengths without table", {"table": b""}, "dispatch rows of 0 bytes"),
    ("empty dispatch row", {"count": packed([0, 3, 2, 2])}, "length is not in 1..3"),
    ("dispatch row too long", {"count": packed([1, 4, 2, 2])}, "length is not in 1..3"),
    ("dispatch to no slot", {"table": put(TABLE, (1, 2), 8)}, "a slot that does not exist"),
    ("dispatch to -1", {"count": packed([2, 3, 2, 2])}, "a slot that does not exist"),
    ("dispatch to another expert", {"table": put(TABLE, (1, 2), 2)}, "a slot of another expert"),
    ("dispatch to an empty slot", {"table": put(TABLE, (1, 2), 5)}, "a slot of another expert"),
    ("dispatch to a slot given up", {"table": put(TABLE, (0, 0), 0)}, "a slot of another expert"),
]


@pytest.mark.parametrize(("changes", "words"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_every_kind_of_damage_is_found(changes: dict[str, object], words: str) -> None:
    """A valid entry with one thing damaged raises PlanInvalid, which says what and names the layer."""
    entry = msgspec.structs.replace(ENTRY, **changes)
    with pytest.raises(PlanInvalid) as caught:
        validate_entry(entry, BASE_P, SPEC, 1)
    assert words in str(caught.value)
    assert f"layer {entry.layer}" in str(caught.value)


def test_more_than_fits_the_staging_rows_is_refused() -> None:
    """The message names the rank and both numbers."""
    row = [1, 0, 2, 3, 0, 1, -1, 2]
    entry = PlanEntry(2, 0, packed(row), packed([[1, 1, 0], [0, 0, 1]]))
    validate_entry(entry, BASE_P, SPEC, 2)
    with pytest.raises(PlanInvalid, match="layer 2: rank 0 receives 2 rows, staging holds 1"):
        validate_entry(entry, BASE_P, SPEC, 1)


@pytest.mark.parametrize("damage", ["base", "row"])
def test_entry_of_another_base_is_refused(damage: str) -> None:
    """The same entry against a row whose slot changed meanwhile does not match."""
    base_P = BASE_P.copy()
    base_P[3 if damage == "base" else 7] = 0
    with pytest.raises(PlanInvalid, match="layer 1"):
        validate_entry(ENTRY, base_P, SPEC, 1)

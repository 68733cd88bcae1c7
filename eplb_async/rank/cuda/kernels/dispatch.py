"""The kernel of rank/dispatch.py, which says what it computes.

Shape suffixes: M (token, choice) pairs, E experts, K table length, P slots.
"""

import triton
import triton.language as tl

__all__ = ["dispatch_kernel"]


@triton.jit
def dispatch_kernel(  # size: one launch does it all
    ids_M,
    table_EK,
    count_E,
    slots_M,
    logical_load_E,
    slot_load_P,
    num_pairs,
    num_choices,
    num_experts,
    num_slots,
    row_length,
    COUNT_LOGICAL: tl.constexpr,
    COUNT_SLOTS: tl.constexpr,
    LOGICAL_BINS: tl.constexpr,
    SLOT_BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of pairs: look up, store, and add its histograms to the loads.

    Ids [2, -1] of token 5 with table row 2 = [7, 9] and count 2: entry 0 or 1 by the hash of 5; the second pair gets slot -1
    and is not counted.
    """
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    expert = tl.load(ids_M + pair, mask=inside, other=-1).to(tl.int32)
    known = (expert >= 0) & (expert < num_experts)
    token = pair // num_choices
    # Fibonacci hashing, both halves mixed; the same as rank.dispatch.replica_hash
    mixed = (token.to(tl.uint32) * 2654435769).to(tl.uint32)
    mixed = (mixed ^ (mixed >> 15)).to(tl.uint32)
    count = tl.load(count_E + expert, mask=known, other=1).to(tl.uint32)
    entry = (mixed % count).to(tl.int32)
    slot = tl.load(table_EK + expert.to(tl.int64) * row_length + entry, mask=known, other=-1).to(tl.int32)
    tl.store(slots_M + pair, slot, mask=inside)
    if COUNT_LOGICAL:
        tokens = tl.histogram(tl.where(known, expert, num_experts), LOGICAL_BINS)
        bins = tl.arange(0, LOGICAL_BINS)
        tl.atomic_add(logical_load_E + bins, tokens, mask=(bins < num_experts) & (tokens > 0), sem="relaxed")
    if COUNT_SLOTS:
        tokens = tl.histogram(tl.where(known & (slot >= 0), slot, num_slots), SLOT_BINS)
        bins = tl.arange(0, SLOT_BINS)
        tl.atomic_add(slot_load_P + bins, tokens, mask=(bins < num_slots) & (tokens > 0), sem="relaxed")

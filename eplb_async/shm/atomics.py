"""Real acquire and release operations on shared memory, for Python.

A plain store from Python or numpy is one machine store, but neither the compiler nor an arm64 core owes us any order
between two of them, and no lock is involved between processes. So the few places where order matters call machine code
that LLVM makes from the instructions below: on x86-64 they become plain moves that the compiler may not reorder, on
arm64 `ldar`, `stlr` and `dmb`. llvmlite (numba's own back end) compiles them once per process, in a few milliseconds.

Addresses are those of naturally aligned int64 words in a mapped segment (`Segment.address`). The caller keeps the
mapping alive during a call. The functions hold the interpreter's lock and never block.

Which one to use:

    store_release / load_acquire       what was written before the store is seen after the load
    store_then_fence                   announce "I am about to overwrite", before the overwriting stores
    fence_then_load                    after reading data: was it overwritten meanwhile?

The last two make a sequence lock, and follow H.-J. Boehm, "Can seqlocks get along with programming language memory
models?" (MSPC 2012), section 4.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from eplb_async.core.errors import InternalError

__all__ = ["CLOSED", "Atomics", "atomics"]

WORD_RECORD = 64
"""Bytes of an agreement word: one cache line; see words.py for its fields."""

# PTR is what this LLVM calls a pointer; every function takes addresses as integers
_SOURCE = """
define i64 @load_acquire(i64 %address) {
  %p = inttoptr i64 %address to PTR
  %v = load atomic i64, PTR %p acquire, align 8
  ret i64 %v
}
define void @store_release(i64 %address, i64 %value) {
  %p = inttoptr i64 %address to PTR
  store atomic i64 %value, PTR %p release, align 8
  ret void
}
define void @store_then_fence(i64 %address, i64 %value) {
  %p = inttoptr i64 %address to PTR
  store atomic i64 %value, PTR %p monotonic, align 8
  fence release
  ret void
}
define i64 @fence_then_load(i64 %address) {
  fence acquire
  %p = inttoptr i64 %address to PTR
  %v = load atomic i64, PTR %p monotonic, align 8
  ret i64 %v
}

define private i64 @field(i64 %record, i64 %index) alwaysinline {
  %offset = shl i64 %index, 3
  %address = add i64 %record, %offset
  %p = inttoptr i64 %address to PTR
  %v = load atomic i64, PTR %p monotonic, align 8
  ret i64 %v
}
define private void @set_field(i64 %record, i64 %index, i64 %value) alwaysinline {
  %offset = shl i64 %index, 3
  %address = add i64 %record, %offset
  %p = inttoptr i64 %address to PTR
  store atomic i64 %value, PTR %p monotonic, align 8
  ret void
}
define private i64 @least(i64 %a, i64 %b) alwaysinline {
  %c = icmp slt i64 %a, %b
  %v = select i1 %c, i64 %a, i64 %b
  ret i64 %v
}
define private i64 @most(i64 %a, i64 %b) alwaysinline {
  %c = icmp sgt i64 %a, %b
  %v = select i1 %c, i64 %a, i64 %b
  ret i64 %v
}

; fields of a word: 0 step, 1 staged, 2 committed, 3 error, 4 digest. The step is invalid while the rest is written.
define void @publish_word(i64 %record, i64 %step, i64 %staged, i64 %committed, i64 %error, i64 %digest) {
  call void @set_field(i64 %record, i64 0, i64 -9223372036854775808)
  fence release
  call void @set_field(i64 %record, i64 1, i64 %staged)
  call void @set_field(i64 %record, i64 2, i64 %committed)
  call void @set_field(i64 %record, i64 3, i64 %error)
  call void @set_field(i64 %record, i64 4, i64 %digest)
  call void @store_release(i64 %record, i64 %step)
  ret void
}

; Reduces the records at first, first + stride, ... if all are of `step`: out = min staged, min committed, max error,
; min digest, max digest; returns -1. Else returns the first rank whose record is not, its step in out[0].
define i64 @reduce_words(i64 %first, i64 %ranks, i64 %stride, i64 %step, i64 %out) {
entry:
  br label %head
head:
  %r = phi i64 [ 0, %entry ], [ %r1, %whole ]
  %s = phi i64 [ 9223372036854775807, %entry ], [ %s1, %whole ]
  %c = phi i64 [ 9223372036854775807, %entry ], [ %c1, %whole ]
  %e = phi i64 [ -9223372036854775808, %entry ], [ %e1, %whole ]
  %d = phi i64 [ 9223372036854775807, %entry ], [ %d1, %whole ]
  %x = phi i64 [ -9223372036854775808, %entry ], [ %x1, %whole ]
  %more = icmp slt i64 %r, %ranks
  br i1 %more, label %read, label %done
read:
  %shift = mul i64 %r, %stride
  %record = add i64 %first, %shift
  %before = call i64 @load_acquire(i64 %record)
  %fresh = icmp eq i64 %before, %step
  br i1 %fresh, label %fields, label %missing
fields:
  %sv = call i64 @field(i64 %record, i64 1)
  %cv = call i64 @field(i64 %record, i64 2)
  %ev = call i64 @field(i64 %record, i64 3)
  %dv = call i64 @field(i64 %record, i64 4)
  %after = call i64 @fence_then_load(i64 %record)
  %same = icmp eq i64 %after, %step
  br i1 %same, label %whole, label %missing
whole:
  %s1 = call i64 @least(i64 %s, i64 %sv)
  %c1 = call i64 @least(i64 %c, i64 %cv)
  %e1 = call i64 @most(i64 %e, i64 %ev)
  %d1 = call i64 @least(i64 %d, i64 %dv)
  %x1 = call i64 @most(i64 %x, i64 %dv)
  %r1 = add i64 %r, 1
  br label %head
missing:
  %found = phi i64 [ %before, %read ], [ %after, %fields ]
  call void @set_field(i64 %out, i64 0, i64 %found)
  ret i64 %r
done:
  call void @set_field(i64 %out, i64 0, i64 %s)
  call void @set_field(i64 %out, i64 1, i64 %c)
  call void @set_field(i64 %out, i64 2, i64 %e)
  call void @set_field(i64 %out, i64 3, i64 %d)
  call void @set_field(i64 %out, i64 4, i64 %x)
  ret i64 -1
}

; The same two with their arguments in a block of int64, because a call from Python costs by the argument.
; block: 0 own records, 1 address of the own newest step, 2 history, 3 step, 4 to 7 counters, 8 all records, 9 ranks,
; 10 stride, 11 step to reduce, 12 to 16 result. Steps are not negative.
define void @publish_step(i64 %block) {
  %records = call i64 @field(i64 %block, i64 0)
  %newest = call i64 @field(i64 %block, i64 1)
  %history = call i64 @field(i64 %block, i64 2)
  %step = call i64 @field(i64 %block, i64 3)
  %staged = call i64 @field(i64 %block, i64 4)
  %committed = call i64 @field(i64 %block, i64 5)
  %error = call i64 @field(i64 %block, i64 6)
  %digest = call i64 @field(i64 %block, i64 7)
  %place = urem i64 %step, %history
  %offset = shl i64 %place, 6
  %record = add i64 %records, %offset
  call void @publish_word(i64 %record, i64 %step, i64 %staged, i64 %committed, i64 %error, i64 %digest)
  call void @store_release(i64 %newest, i64 %step)
  ret void
}
define i64 @reduce_step(i64 %block) {
  %history = call i64 @field(i64 %block, i64 2)
  %records = call i64 @field(i64 %block, i64 8)
  %ranks = call i64 @field(i64 %block, i64 9)
  %stride = call i64 @field(i64 %block, i64 10)
  %step = call i64 @field(i64 %block, i64 11)
  ; steps before 0 have their places at the end of the ring
  %rest = srem i64 %step, %history
  %below = icmp slt i64 %rest, 0
  %raised = add i64 %rest, %history
  %place = select i1 %below, i64 %raised, i64 %rest
  %offset = shl i64 %place, 6
  %first = add i64 %records, %offset
  %out = add i64 %block, 96
  %missing = call i64 @reduce_words(i64 %first, i64 %ranks, i64 %stride, i64 %step, i64 %out)
  ret i64 %missing
}
; Both, and whether the reduced words are what this rank has just published. 1: yes. 0: no, or a word is missing.
define i64 @repeat_step(i64 %block) {
  call void @publish_step(i64 %block)
  %missing = call i64 @reduce_step(i64 %block)
  %whole = icmp eq i64 %missing, -1
  %same0 = call i1 @equal_fields(i64 %block, i64 4, i64 12)
  %same1 = call i1 @equal_fields(i64 %block, i64 5, i64 13)
  %same2 = call i1 @equal_fields(i64 %block, i64 6, i64 14)
  %same3 = call i1 @equal_fields(i64 %block, i64 7, i64 15)
  %same4 = call i1 @equal_fields(i64 %block, i64 7, i64 16)
  %a = and i1 %whole, %same0
  %b = and i1 %same1, %same2
  %c = and i1 %same3, %same4
  %d = and i1 %a, %b
  %e = and i1 %c, %d
  %result = zext i1 %e to i64
  ret i64 %result
}

; Claims the next record of a load ring; see ring.py. block: 0 address of `reserved`, 1 first record, 2 bytes of one, 3 how many,
; 4 records finished so far, 5 to 10 the record's fields. Returns its address.
define i64 @claim_record(i64 %block) {
  %reserved = call i64 @field(i64 %block, i64 0)
  %first = call i64 @field(i64 %block, i64 1)
  %size = call i64 @field(i64 %block, i64 2)
  %number = call i64 @field(i64 %block, i64 3)
  %written = call i64 @field(i64 %block, i64 4)
  %next = add i64 %written, 1
  call void @store_then_fence(i64 %reserved, i64 %next)
  %place = urem i64 %written, %number
  %offset = mul i64 %place, %size
  %record = add i64 %first, %offset
  %step = call i64 @field(i64 %block, i64 5)
  %phase = call i64 @field(i64 %block, i64 6)
  %version = call i64 @field(i64 %block, i64 7)
  %tokens = call i64 @field(i64 %block, i64 8)
  %previous = call i64 @field(i64 %block, i64 9)
  %pulled = call i64 @field(i64 %block, i64 10)
  call void @set_field(i64 %record, i64 0, i64 %step)
  call void @set_field(i64 %record, i64 1, i64 %phase)
  call void @set_field(i64 %record, i64 2, i64 %version)
  call void @set_field(i64 %record, i64 3, i64 %tokens)
  call void @set_field(i64 %record, i64 4, i64 %previous)
  call void @set_field(i64 %record, i64 5, i64 %pulled)
  ret i64 %record
}
define private i1 @equal_fields(i64 %block, i64 %one, i64 %two) alwaysinline {
  %a = call i64 @field(i64 %block, i64 %one)
  %b = call i64 @field(i64 %block, i64 %two)
  %same = icmp eq i64 %a, %b
  ret i1 %same
}
"""


class Atomics(NamedTuple):
    """The compiled functions. All arguments and results are int64; addresses are 8-byte aligned.

    Fields:
        load_acquire: (address) -> value.
        store_release: (address, value).
        store_then_fence: (address, value); later stores are not seen before it.
        fence_then_load: (address) -> value; earlier loads are done before it.
        publish_word: (record, step, staged, committed, error, digest).
        reduce_words: (first record, ranks, stride in bytes, step, address of five int64 for the result) -> -1, or the
            first rank whose record is not of that step, with the step found in the first of the five.
        publish_step, reduce_step: the two above for one step of one rank, arguments in a block (see the source).
        repeat_step: both of them -> 1 if the reduced words equal the one just published.
        claim_record: the next record of a ring, arguments in a block -> its address.
    """

    load_acquire: Callable[[int], int]
    store_release: Callable[[int, int], None]
    store_then_fence: Callable[[int, int], None]
    fence_then_load: Callable[[int], int]
    publish_word: Callable[[int, int, int, int, int, int], None]
    reduce_words: Callable[[int, int, int, int, int], int]
    publish_step: Callable[[int], None]
    reduce_step: Callable[[int], int]
    repeat_step: Callable[[int], int]
    claim_record: Callable[[int], int]


def _closed(*_: int) -> NoReturn:
    raise InternalError("a shared segment was used after it was closed")


CLOSED = Atomics(*[_closed] * len(Atomics._fields))
"""Put in place of the functions when a mapping is dropped: their addresses would then point nowhere."""

_SHAPES = {  # name -> (returns a value, number of arguments)
    "load_acquire": (True, 1),
    "store_release": (False, 2),
    "store_then_fence": (False, 2),
    "fence_then_load": (True, 1),
    "publish_word": (False, 6),
    "reduce_words": (True, 5),
    "publish_step": (False, 1),
    "reduce_step": (True, 1),
    "repeat_step": (True, 1),
    "claim_record": (True, 1),
}

# the code lives as long as its engine; lru_cache keeps both for the life of the process


@functools.lru_cache(maxsize=1)
def _engine() -> object:
    from llvmlite import binding

    if not hasattr(binding, "initialize_all_targets") or binding.llvm_version_info[0] < 20:
        binding.initialize()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    # LLVM 17 dropped typed pointers
    pointer = "ptr" if binding.llvm_version_info[0] >= 17 else "i64*"
    module = binding.parse_assembly(_SOURCE.replace("PTR", pointer))
    module.verify()
    machine = binding.Target.from_default_triple().create_target_machine(opt=2)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


@functools.lru_cache(maxsize=1)
def atomics() -> Atomics:
    """The functions, compiled at the first call."""
    engine = _engine()
    functions = []
    for name, (returns, arguments) in _SHAPES.items():
        prototype = ctypes.PYFUNCTYPE(ctypes.c_int64 if returns else None, *[ctypes.c_int64] * arguments)
        functions.append(prototype(engine.get_function_address(name)))  # type: ignore[attr-defined]
    return Atomics(*functions)

"""The kernel of rank/cuda/recorder.py, which says what it is for."""

import triton
import triton.language as tl

__all__ = ["record_kernel"]


@triton.jit(do_not_specialize=["load", "target", "published", "number", "num_words"])
def record_kernel(  # size: the arguments of a kernel
    load: tl.int64,
    target: tl.int64,
    published: tl.int64,
    number: tl.int64,
    num_words: tl.int64,
    COUNT: tl.constexpr,
    FOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts into the record (if COUNT), zero them, and publish the records before this one. FOURS: num_words is a multiple of 4.

    load, target, published are addresses, multiples of 16, 16 and 8. Counts [3, 1] with number 7: the record holds [3, 1], the
    counts are [0, 0], and 7 stands at `published`, which says that records 0 to 6 are whole.
    """
    program = tl.program_id(0)
    if FOURS:
        num_words = num_words // 4 * 4  # which tells the compiler
    place = program * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_words
    counts = tl.multiple_of(load.to(tl.pointer_type(tl.int32)), 16) + place
    if COUNT:
        record = tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16) + place
        tl.store(record, tl.load(counts, mask=inside, other=0), mask=inside)
    tl.store(counts, tl.zeros([BLOCK], dtype=tl.int32), mask=inside)
    if program == 0:
        # the kernels before this one have ended; the fence makes that known to the host before the number is (PTX ISA, memory
        # consistency model: a fence is cumulative over what happened before it in the stream)
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first fence.acq_rel.sys;
            @first st.relaxed.sys.global.u64 [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,l",
            [published + tl.zeros([1], dtype=tl.int64), number + tl.zeros([1], dtype=tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

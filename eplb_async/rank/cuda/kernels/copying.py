"""The kernel of a commit: many pieces of memory copied in one launch."""

import triton
import triton.language as tl

__all__ = ["copy_pieces_kernel"]


@triton.jit(do_not_specialize=["pieces_N3"])
def copy_pieces_kernel(pieces_N3: tl.int64, BLOCK: tl.constexpr):
    """Program (n, j) copies blocks j, j + programs, ... of piece n, a (target, source, bytes) triple of int64 in the table.

    The table's address is a multiple of 8. Pieces whose three numbers are multiples of 16 go in 16-byte accesses, others byte by byte.
    Table [(t, s, 20)]: not a multiple of 16, so program (0, 0) copies 20 bytes, all others none.
    """
    row = pieces_N3.to(tl.pointer_type(tl.int64)) + 3 * tl.program_id(0)
    target = tl.load(row)
    source = tl.load(row + 1)
    num_bytes = tl.load(row + 2)
    start = tl.program_id(1).to(tl.int64)
    programs = tl.num_programs(1)
    lanes = tl.arange(0, BLOCK)
    if (target | source | num_bytes) % 16 == 0:
        to = tl.multiple_of(target.to(tl.pointer_type(tl.int64)), 16)
        what = tl.multiple_of(source.to(tl.pointer_type(tl.int64)), 16)
        num_words = tl.multiple_of(num_bytes // 8, 2)
        for block in range(start, (num_words + BLOCK - 1) // BLOCK, programs):
            place = block * BLOCK + lanes
            inside = place < num_words
            tl.store(to + place, tl.load(what + place, mask=inside, other=0), mask=inside)
    else:
        to_chars = target.to(tl.pointer_type(tl.uint8))
        chars = source.to(tl.pointer_type(tl.uint8))
        for block in range(start, (num_bytes + BLOCK - 1) // BLOCK, programs):
            at = block * BLOCK + lanes
            within = at < num_bytes
            tl.store(to_chars + at, tl.load(chars + at, mask=within, other=0), mask=within)

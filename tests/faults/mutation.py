"""Damage for fuzzing: bytes that were valid, after bit flips, splices, cuts, repetitions, or as something else altogether.

Everything comes from a random generator that the caller seeds, so an input can be made again from its number alone.
"""

from collections.abc import Sequence
from random import Random

__all__ = ["Mutator", "random_json", "random_text"]

EDGES: tuple[int, ...] = (
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    2**15,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    -(2**63),
)
EDGES += (2**64 - 1, 2**64, 10**19, 10**30)
"""Numbers at which some type ends."""
MAX_BYTES = 256 << 10
"""Inputs are cut here: larger ones only cost time."""
PIECES = (
    b"\xff",
    b"\xed\xa0\x80",
    b"\0",
    b"\n",
    b"\xc1",
    b"\xdd\xff\xff\xff\xff",
    b"[" * 40,
    b"\x91" * 60,
    b'"\\ud800"',
    b"nan",
)
"""What decoders are known to trip over: bytes that are no UTF-8, lone surrogates, lengths without content, nesting."""


class Mutator:
    """Damages members of a corpus of valid inputs."""

    def __init__(self, corpus: Sequence[bytes]) -> None:
        self.corpus = list(corpus)
        self._ways = (
            self._flip,
            self._flip,
            self._overwrite,
            self._insert,
            self._cut,
            self._remove,
            self._repeat,
            self._splice,
            self._number,
        )

    def damaged(self, rng: Random) -> bytes:
        """One member of the corpus after one to six mutations; now and then random bytes, an empty or a huge input."""
        kind = rng.random()
        if kind < 0.01:
            return rng.randbytes(rng.randrange(200))
        data = bytearray(rng.choice(self.corpus))
        if kind < 0.015:
            return bytes(data * rng.randrange(2, 2000))[:MAX_BYTES]
        for _ in range(1 if kind < 0.5 else rng.randrange(1, 7)):
            data = rng.choice(self._ways)(data, rng)
        return bytes(data[:MAX_BYTES])

    @staticmethod
    def _flip(data: bytearray, rng: Random) -> bytearray:
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return data

    @staticmethod
    def _overwrite(data: bytearray, rng: Random) -> bytearray:
        start = rng.randrange(len(data) + 1)
        piece = rng.choice(PIECES) if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 9))
        data[start : start + len(piece)] = piece
        return data

    @staticmethod
    def _insert(data: bytearray, rng: Random) -> bytearray:
        start = rng.randrange(len(data) + 1)
        data[start:start] = rng.choice(PIECES) if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 9))
        return data

    @staticmethod
    def _cut(data: bytearray, rng: Random) -> bytearray:
        return data[: rng.randrange(len(data) + 1)]

    @staticmethod
    def _remove(data: bytearray, rng: Random) -> bytearray:
        start = rng.randrange(len(data) + 1)
        del data[start : start + rng.randrange(1, 17)]
        return data

    @staticmethod
    def _repeat(data: bytearray, rng: Random) -> bytearray:
        start = rng.randrange(len(data) + 1)
        data[start:start] = data[start : start + rng.randrange(1, 33)] * rng.randrange(1, 20)
        return data

    def _splice(self, data: bytearray, rng: Random) -> bytearray:
        other = rng.choice(self.corpus)
        return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]

    @staticmethod
    def _number(data: bytearray, rng: Random) -> bytearray:
        """An edge in place of some digits, or of eight bytes."""
        edge = rng.choice(EDGES)
        places = [i for i, byte in enumerate(data[:400]) if 48 <= byte <= 57]
        if places and rng.random() < 0.5:
            place = rng.choice(places)
            data[place : place + 1] = str(edge).encode()
        else:
            start = rng.randrange(len(data) + 1)
            data[start : start + 8] = (edge % 2**64).to_bytes(8, rng.choice(("little", "big")))
        return data


def random_text(rng: Random) -> str:
    """A short text: a name, or characters of all kinds."""
    if rng.random() < 0.5:
        return rng.choice(("", "main", "a.b-c", "../x", "x" * 65, "default", "\x00", "é\u2028\U0001f600"))
    return "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0xD800)))) for _ in range(rng.randrange(12)))


def random_json(rng: Random, depth: int = 3) -> object:
    """Any value that JSON can hold, nested a little."""
    kind = rng.randrange(8 if depth else 6)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind in (1, 2):
        return rng.choice(EDGES)
    if kind == 3:
        return rng.choice((0.0, -0.0, 1e308, 1e-320, rng.uniform(-10, 10)))
    if kind in (4, 5):
        return random_text(rng)
    if kind == 6:
        return [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {random_text(rng): random_json(rng, depth - 1) for _ in range(rng.randrange(4))}

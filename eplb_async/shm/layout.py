r"""Names and headers of shared segments.

A segment is called /eplb_async.<uid>.<group>.<kind>, mode 0600. Kinds: `group` (members and agreement words), `board`,
`live`, and per rank `ring.<r>`, `export.<r>`, `weights.<r>`. Each begins with the same header, then a JSON text, then
data from the next multiple of 4096 bytes:

    byte    0  magic            8 bytes, "EPLBASY\n"
            8  version          u64, of the bytes of all kinds together
           16  layout hash      u64, of the kind and what its fields are
           24  incarnation      u64, of the group; 0 for segments that outlive one
           32  owner pid        u64 \  the process that created it
           40  owner start      u64 /  and when that process started, in clock ticks since boot
           48  size             u64, of the whole segment
           56  text length      u64, bytes of JSON from byte 128
           64  data offset      u64
           72  checksum         u64, CRC-32 of bytes 0 to 72 and of the text
           80  ready            i64, 1 once all of the above is written (release store); zeros from here
          128  JSON text
"""

import hashlib
import os
import re
import struct
import zlib
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from eplb_async.core.errors import SegmentRefused

__all__ = [
    "DATA_ALIGNMENT",
    "READY_OFFSET",
    "Header",
    "decode_text",
    "owner_alive",
    "parse_name",
    "process_start",
    "segment_name",
]

MAGIC = b"EPLBASY\n"
VERSION = 1
TEXT_OFFSET = 128
READY_OFFSET = 80
DATA_ALIGNMENT = 4096

_FIXED = struct.Struct("<8s8Q")
_CHECKSUM = struct.Struct("<Q")

Text = TypeVar("Text", bound=msgspec.Struct)


def segment_name(group: str, kind: str) -> str:
    """The name of a segment of this user: segment_name("deepseek-v3", "ring.0") is /eplb_async.0.deepseek-v3.ring.0."""
    return f"/eplb_async.{os.getuid()}.{group}.{kind}"


def parse_name(name: str) -> tuple[int, str, str] | None:
    """(uid, group, kind) of a segment's name without its slash; None if it is not one of ours."""
    match = re.fullmatch(r"eplb_async\.(\d+)\.(.+)\.(group|board|live|(?:ring|export|weights)\.\d+)", name)
    return (int(match[1]), match[2], match[3]) if match else None


def process_start(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if there is none (or only its unreaped rest)."""
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    # the second field is the command's name in parentheses and may hold any bytes
    fields = line.rpartition(b")")[2].split()
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def owner_alive(pid: int, start: int) -> bool:
    """True if the process with this id still is the one that started then."""
    return pid > 0 and start > 0 and process_start(pid) == start


class Header(NamedTuple):
    """The header of one segment; fields as drawn above."""

    layout_hash: int
    incarnation: int
    owner_pid: int
    owner_start: int
    size: int
    text: bytes

    @staticmethod
    def hash_of(layout: str) -> int:
        """The layout hash of a description of fields."""
        return int.from_bytes(hashlib.blake2b(layout.encode(), digest_size=8).digest(), "little")

    @property
    def data_offset(self) -> int:
        """Where data begins."""
        return -(-(TEXT_OFFSET + len(self.text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT

    def encode(self) -> bytes:
        """All bytes before the data but `ready`."""
        fixed = _FIXED.pack(
            MAGIC,
            VERSION,
            self.layout_hash,
            self.incarnation,
            self.owner_pid,
            self.owner_start,
            self.size,
            len(self.text),
            self.data_offset,
        )
        checksum = _CHECKSUM.pack(zlib.crc32(self.text, zlib.crc32(fixed)))
        return (fixed + checksum).ljust(TEXT_OFFSET, b"\0") + self.text

    @classmethod
    def decode(cls, name: str, data: memoryview, layout: str) -> "Header":
        """Read and check a header.

        Args:
            name: of the segment, for messages.
            data: the whole mapping.
            layout: what the caller takes the segment for.

        Raises:
            SegmentRefused: anything about it is not as it must be.
        """
        if len(data) < DATA_ALIGNMENT or bytes(data[:8]) != MAGIC:
            raise SegmentRefused(name, f"{len(data)} bytes without our magic number", "a segment of eplb_async")
        _, version, layout_hash, incarnation, pid, start, size, length, offset = _FIXED.unpack_from(data)
        if version != VERSION:
            raise SegmentRefused(name, f"version {version}", f"version {VERSION} (run the same release everywhere)")
        if any(data[READY_OFFSET + 8 : TEXT_OFFSET]):
            raise SegmentRefused(name, "a header with bytes where there are no fields", "an undamaged segment")
        if size != len(data) or TEXT_OFFSET + length > size:
            raise SegmentRefused(name, f"{len(data)} bytes with a header for {size}", "an undamaged segment")
        text = bytes(data[TEXT_OFFSET : TEXT_OFFSET + length])
        (checksum,) = _CHECKSUM.unpack_from(data, _FIXED.size)
        header = cls(layout_hash, incarnation, pid, start, size, text)
        if checksum != zlib.crc32(text, zlib.crc32(bytes(data[: _FIXED.size]))) or offset != header.data_offset:
            raise SegmentRefused(name, "a header with a wrong checksum", "an undamaged segment")
        if layout_hash != cls.hash_of(layout):
            raise SegmentRefused(name, f"layout {layout_hash:016x}", f"layout {cls.hash_of(layout):016x}")
        return header


def decode_text(name: str, text: bytes, kind: type[Text]) -> Text:
    """The text of a segment as what its kind says it is.

    Raises:
        SegmentRefused: it is something else, as another release may have written it.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SegmentRefused(name, f"a text that is not {kind.__name__} ({error})", "one of this release") from error

"""A shared segment: created whole or not at all, opened only after its header was checked, unlinked only by name and inode.

A mapping lives as long as anything still views it: `close` drops the segment's own references, and the pages go when
the last array over them does. So no array can ever point to unmapped memory.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import posix_ipc
from numpy.typing import DTypeLike, NDArray

from eplb_async.core.errors import EplbError, NoSharedMemory, SegmentMissing, SegmentRefused
from eplb_async.shm.atomics import atomics
from eplb_async.shm.layout import READY_OFFSET, Header, owner_alive, parse_name, process_start

__all__ = ["SHM_DIRECTORY", "Segment", "file_lock", "list_segments", "prepare_runtime_dir"]

SHM_DIRECTORY = Path("/dev/shm")
"""Where Linux shows POSIX shared memory as files; used to list segments and to compare inodes."""


class Segment:
    """One mapped segment. Not thread-safe; the data it maps has its own rules, see the kinds.

    Attributes:
        name: with its slash.
        header: the checked header.
        address: of the first data byte in this process.
    """

    def __init__(self, name: str, header: Header, mapping: mmap.mmap, inode: int) -> None:
        self.name, self.header = name, header
        self._mapping: mmap.mmap | None = mapping
        self._inode = inode
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)
        self.address = int(self._bytes.ctypes.data) + header.data_offset

    @classmethod
    def create(cls, name: str, layout: str, data_bytes: int, *, text: bytes = b"", incarnation: int = 0) -> "Segment":
        """A new segment, zeroed, owned by this process, not ready before `publish`.

        Raises:
            NoSharedMemory: no room, no permission, or the name is taken.
        """
        pid = os.getpid()
        draft = Header(Header.hash_of(layout), incarnation, pid, process_start(pid), 0, text)
        size = draft.data_offset + max(data_bytes, 1)
        header = draft._replace(size=size)
        try:
            shared = posix_ipc.SharedMemory(name, flags=posix_ipc.O_CREX, mode=0o600)
        except posix_ipc.ExistentialError as error:
            raise NoSharedMemory(name, size, "a segment of that name exists") from error
        except (OSError, posix_ipc.Error) as error:
            raise NoSharedMemory(name, size, str(error)) from error
        try:
            # the owner is named before anything that takes long, so that gc sees whose it is
            os.pwrite(shared.fd, header.encode(), 0)
            # ftruncate alone would succeed without room, and the first touch would then kill us with SIGBUS
            os.posix_fallocate(shared.fd, 0, size)
            mapping = mmap.mmap(shared.fd, size)
            inode = os.fstat(shared.fd).st_ino
        except OSError as error:
            posix_ipc.unlink_shared_memory(name)
            why = "no room in /dev/shm" if error.errno in (errno.ENOSPC, errno.ENOMEM) else str(error)
            raise NoSharedMemory(name, size, why) from error
        finally:
            shared.close_fd()
        return cls(name, header, mapping, inode)

    def publish(self) -> "Segment":
        """Let others open it; call once its first contents are written."""
        atomics().store_release(self._header_address + READY_OFFSET, 1)
        return self

    @classmethod
    def open(cls, name: str, layout: str, incarnation: int | None = None) -> "Segment":
        """Map an existing segment, of one incarnation if that is given.

        Raises:
            SegmentMissing: there is none.
            SegmentRefused: it is another user's, readable by others, unfinished, damaged, of another layout, or of
                another incarnation.
        """
        try:
            shared = posix_ipc.SharedMemory(name)
        except posix_ipc.ExistentialError as error:
            raise SegmentMissing(name) from error
        except (OSError, posix_ipc.Error) as error:
            raise SegmentRefused(name, f"no access ({error})", "a segment of this user") from error
        try:
            status = os.fstat(shared.fd)
            mode = stat.S_IMODE(status.st_mode)
            if status.st_uid != os.geteuid() or mode & 0o077:
                raise SegmentRefused(
                    name, f"owner {status.st_uid} and mode {mode:04o}", f"owner {os.geteuid()} and mode 0600"
                )
            if status.st_size < READY_OFFSET + 8:
                raise SegmentRefused(
                    name, f"{status.st_size} bytes", "a whole header (its creator may not have finished)"
                )
            mapping = mmap.mmap(shared.fd, status.st_size)
        finally:
            shared.close_fd()
        base = int(np.frombuffer(mapping, dtype=np.uint8).ctypes.data)
        if atomics().load_acquire(base + READY_OFFSET) != 1:
            raise SegmentRefused(name, "a header that is not ready", "a whole one (its creator may not have finished)")
        header = Header.decode(name, memoryview(mapping), layout)
        if incarnation not in (None, header.incarnation):
            raise SegmentRefused(name, f"incarnation {header.incarnation}", f"incarnation {incarnation}")
        return cls(name, header, mapping, status.st_ino)

    def array(self, dtype: DTypeLike, shape: tuple[int, ...], offset: int = 0) -> NDArray[np.generic]:
        """A view of the data; keeps the mapping alive.

        Args:
            dtype, shape: of the array.
            offset: in bytes from the start of the data.

        Raises:
            SegmentRefused: the segment is smaller than that.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        first = self.header.data_offset + offset
        if first + size > self.header.size:
            raise SegmentRefused(self.name, f"{self.header.size} bytes", f"at least {first + size}")
        return self._bytes[first : first + size].view(dtype).reshape(shape)

    @property
    def pages(self) -> tuple[int, int]:
        """(address, bytes) of the whole mapping, whole pages; for a driver that registers them."""
        return self._header_address, -(-self.header.size // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def replaced(self) -> bool:
        """True if the name is gone or now belongs to another segment."""
        try:
            return os.stat(SHM_DIRECTORY / self.name[1:]).st_ino != self._inode
        except FileNotFoundError:
            return True

    @property
    def owner_alive(self) -> bool:
        """True if the process that created it still runs."""
        return owner_alive(self.header.owner_pid, self.header.owner_start)

    def unlink(self) -> None:
        """Remove the name if it still is this segment's; mappings stay. Idempotent."""
        if not self.replaced:
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_shared_memory(self.name)

    def close(self) -> None:
        """Drop this mapping; arrays made from it stay valid and keep the pages until they go. Idempotent."""
        self._bytes = np.empty(0, dtype=np.uint8)
        if self._mapping is not None:
            # an array over the mapping still lives: the pages go with it
            with contextlib.suppress(BufferError):
                self._mapping.close()
            self._mapping = None

    @property
    def _header_address(self) -> int:
        return self.address - self.header.data_offset


def list_segments() -> list[tuple[str, str, str]]:
    """(name, group, kind) of this user's segments on this host, sorted.

    What others have put under such a name, and what is no regular file, is left out.
    """
    found = []
    with os.scandir(SHM_DIRECTORY) as entries:
        for entry in entries:
            parsed = parse_name(entry.name)
            if parsed and parsed[0] == os.getuid() and _is_own_file(entry):
                found.append(("/" + entry.name, parsed[1], parsed[2]))
    return sorted(found)


def _is_own_file(entry: "os.DirEntry[str]") -> bool:
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def prepare_runtime_dir(directory: Path) -> Path:
    """Make the runtime directory, mode 0700, and check that it is this user's alone.

    Raises:
        EplbError: it cannot be made, or others may write to it.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise EplbError(f"runtime_dir {directory} cannot be used: {error}; set EPLB_ASYNC_RUNTIME_DIR") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise EplbError(
            f"runtime_dir {directory} belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}; "
            f"needed user {os.geteuid()} and mode 0700; choose another with EPLB_ASYNC_RUNTIME_DIR"
        )
    return directory


@contextlib.contextmanager
def file_lock(path: Path, deadline_s: float) -> Iterator[None]:
    """Hold an exclusive lock between processes. The kernel drops it when the holder dies.

    Raises:
        TimeoutError: somebody else held it all the time.
    """
    with path.open("a") as file:
        end = time.monotonic() + deadline_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(f"{path} was held by another process for {deadline_s:g} s") from None
                time.sleep(0.005)
        yield

"""Recording on CUDA: one small kernel behind each forward writes the counts into the ring, zeroes them, and publishes.

    compute stream   forward s -> kernel: counts into record i, zero them, published := i -> forward s + 1 -> ...
    host             claims record i and writes its fields when it issues that; never waits for any of it

The ring's pages are registered with the driver, so the kernel writes straight into shared memory. Record i is published by the kernel of
record i + 1, when the one that wrote it has ended: publishing it by itself would cost another kernel, or a stop between all of its
programs. So a reader is one step behind; `close` publishes the last. What else was measured: docs/gpu.md.

The host may be any number of steps ahead of the device: records are claimed in the order of the stream, and a reader that finds a claim
a whole ring ahead counts that record as lost, as ever.
"""

import torch

from eplb_async.core.errors import SpecError
from eplb_async.core.load import Phase
from eplb_async.rank.cuda.driver import CudaDriver
from eplb_async.rank.cuda.kernels.recording import record_kernel
from eplb_async.rank.cuda.launch import Launcher
from eplb_async.rank.cuda.streams import ComputeStream
from eplb_async.rank.recorder import Recorder
from eplb_async.shm.ring import LoadRing

__all__ = ["CudaRecorder"]

BLOCK = 512
"""Words per program. Few words each, so that many multiprocessors write to the bus at once."""
LOAD, TARGET, PUBLISHED, NUMBER, NUM_WORDS = range(5)
"""Arguments of the kernel."""
COUNTING = frozenset(phase for phase in Phase if phase.counts)


class CudaRecorder(Recorder):
    """The writing end of one rank's ring, for a load tensor on a GPU."""

    def __init__(self, load: torch.Tensor, ring: LoadRing, driver: CudaDriver, compute: ComputeStream) -> None:
        """Registers the ring's memory until `close`.

        Raises:
            SpecError: the counts do not start at a multiple of 16 bytes.
            DeviceCallFailed: the driver refuses to.
        """
        if load.data_ptr() % 16:
            raise SpecError(
                "the load tensor starts at an address that is not a multiple of 16; give one that is not cut out of another"
            )
        self._load, self.ring = load, ring
        self._driver, self._compute = driver, compute
        self._words = load.numel()
        self._grid = (-(-self._words // BLOCK), 1)
        fours = self._words % 4 == 0
        self._count, self._zero = (
            Launcher(driver, record_kernel, 5, (counts, fours, BLOCK), num_warps=4) for counts in (True, False)
        )
        for launch in (self._count, self._zero):
            launch.set(LOAD, load.data_ptr())
            launch.set(PUBLISHED, ring.published_address)
            launch.set(NUM_WORDS, self._words)
        self._first, size = ring.segment.pages
        driver.register(self._first, size)
        self._registered = True

    def record(self, step: int, phase: Phase, version: int, tokens: int, previous_us: int = 0, pulled: int = 0) -> None:
        """See Recorder. Issued on the current stream, behind the forward that counted."""
        ring, stream = self.ring, self._compute.handle()
        launch = self._count if phase in COUNTING else self._zero
        launch.set(TARGET, ring.claim(step, phase, version, tokens, previous_us, pulled))
        launch.set(NUMBER, ring.finish() - 1)
        launch(self._grid, stream)

    def close(self) -> None:
        """Wait until the device writes no more, publish the last record and give the pages back. Idempotent."""
        if self._registered:
            self._registered = False
            try:
                self._compute.current().synchronize()
                self.ring.publish_finished()
            finally:
                self._driver.unregister(self._first)
        super().close()

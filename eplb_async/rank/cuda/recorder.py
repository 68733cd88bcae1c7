"""Recording on CUDA: the device copies the counts into the ring itself, and publishes the record when it has.

    compute stream   forward -> copy counts into the record -> zero the counts -> write `published` -> next forward
    host             claims the record and writes its fields when it issues that; never waits for any of it

The ring's pages are registered with the driver, so the copy goes straight into shared memory. `published` is written by a stream-ordered
write with the driver's memory barrier, so whoever sees it sees the counts. The host may be any number of steps ahead: records
are claimed in the order of the stream, and a reader that finds a claim a whole ring ahead counts that record as lost, as ever.
"""

import torch

from eplb_async.core.load import Phase
from eplb_async.rank.cuda.driver import CudaDriver
from eplb_async.rank.cuda.streams import ComputeStream
from eplb_async.rank.recorder import Recorder
from eplb_async.shm.ring import LoadRing

__all__ = ["CudaRecorder"]


class CudaRecorder(Recorder):
    """The writing end of one rank's ring, for a load tensor on a GPU."""

    def __init__(self, load: torch.Tensor, ring: LoadRing, driver: CudaDriver, compute: ComputeStream) -> None:
        """Registers the ring's memory until `close`.

        Raises:
            DeviceCallFailed: the driver refuses to.
        """
        self._load, self.ring = load, ring
        self._driver, self._compute = driver, compute
        self._address, self._words = load.data_ptr(), load.numel()
        self._first, size = ring.segment.pages
        driver.register(self._first, size)
        self._registered = True

    def record(self, step: int, phase: Phase, version: int, tokens: int) -> None:
        """See Recorder. Everything is issued on the current stream, behind the forward that counted."""
        driver, stream = self._driver, self._compute.current().cuda_stream
        counts = self.ring.claim(step, phase, version, tokens)
        if phase.counts:
            driver.copy(counts, self._address, 4 * self._words, stream)
        driver.zero(self._address, self._words, stream)
        driver.write_value(self.ring.published_address, self.ring.finish(), stream)

    def close(self) -> None:
        """Wait until the device writes no more, and give the pages back. Idempotent."""
        if self._registered:
            self._registered = False
            self._compute.current().synchronize()
            self._driver.unregister(self._first)
        super().close()

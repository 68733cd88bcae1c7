"""The platform of ranks whose tensors lie on an NVIDIA GPU."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_async.core.errors import SpecError
from eplb_async.core.placement import IntArray
from eplb_async.core.spec import MoESpec
from eplb_async.rank.cuda.driver import load_driver
from eplb_async.rank.cuda.fingerprint import fingerprint_pieces
from eplb_async.rank.cuda.maps import CudaMaps
from eplb_async.rank.cuda.recorder import CudaRecorder
from eplb_async.rank.cuda.streams import ComputeStream
from eplb_async.rank.maps import Maps
from eplb_async.rank.recorder import Recorder
from eplb_async.rank.transfer.base import Transfer
from eplb_async.rank.transfer.cuda_ipc import CudaIpcTransfer
from eplb_async.rank.verification import slot_fingerprints
from eplb_async.rank.weights import LayerTensors, WeightRows
from eplb_async.shm.ring import LoadRing

__all__ = ["CudaPlatform"]


class CudaPlatform:
    """See rank.platform.Platform. The parts it makes share one compute stream."""

    def __init__(self, device: torch.device) -> None:
        """Checks the device.

        Raises:
            SpecError: it is not the calling thread's current one.
            ConfigError: cuda-bindings is not installed.
        """
        if torch.cuda.current_device() != device.index:
            raise SpecError(
                f"the tensors lie on {device}, the current device is cuda:{torch.cuda.current_device()}; call "
                f"torch.cuda.set_device({device.index}) before attach, in the thread that steps"
            )
        self._driver, self._compute = load_driver(), ComputeStream(device)

    @property
    def capturing(self) -> Callable[[], bool]:
        """See Platform."""
        return torch.cuda.is_current_stream_capturing

    def transfer(self, weights: Sequence[LayerTensors], rows: WeightRows, num_staging_rows: int, name: str) -> Transfer:
        """See Platform."""
        return CudaIpcTransfer(rows, num_staging_rows, self._driver, self._compute)

    def maps(self, placement_LP: IntArray, spec: MoESpec) -> Maps:
        """See Platform."""
        return CudaMaps(placement_LP, spec, self._compute.device)

    def recorder(self, load: torch.Tensor, ring: LoadRing) -> Recorder:
        """See Platform."""
        return CudaRecorder(load, ring, self._driver, self._compute)

    def fingerprints(self, rows: WeightRows, placement_LP: IntArray, rank: int) -> NDArray[np.int64]:
        """See Platform. Waits for the device."""
        return slot_fingerprints(rows, placement_LP, rank, fingerprint_pieces)

"""Where a model's tensors lie, and what of the hook follows from it: one platform per kind of device.

host    weights in shared memory, counts and maps on the CPU
cuda    weights, counts and maps on one NVIDIA GPU of the rank (eplb_async.rank.cuda.platform)
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_async.core.errors import SpecError
from eplb_async.core.placement import IntArray
from eplb_async.core.spec import MoESpec
from eplb_async.rank.fingerprint import fingerprint
from eplb_async.rank.maps import Maps
from eplb_async.rank.recorder import Recorder
from eplb_async.rank.streams import HostStream
from eplb_async.rank.transfer.base import Transfer
from eplb_async.rank.verification import slot_fingerprints
from eplb_async.rank.weights import LayerTensors, WeightRows
from eplb_async.shm.ring import LoadRing

__all__ = ["HostPlatform", "Platform", "choose_platform"]


class Platform(Protocol):
    """Makes the parts of one rank's hook that depend on the device."""

    @property
    def capturing(self) -> Callable[[], bool]:
        """Tells whether the engine is capturing a graph, while which the hook does nothing."""
        ...

    def transfer(self, weights: Sequence[LayerTensors], rows: WeightRows, num_staging_rows: int, name: str) -> Transfer:
        """The transfer backend inside a node, with its staging rows. `name` is for threads and logs.

        Raises:
            SpecError: other ranks cannot reach such weights, or there is no memory for the rows.
        """
        ...

    def maps(self, placement_LP: IntArray, spec: MoESpec) -> Maps:
        """The map tensors."""
        ...

    def recorder(self, load: torch.Tensor, ring: LoadRing) -> Recorder:
        """The writer of the ring."""
        ...

    def fingerprints(self, rows: WeightRows, placement_LP: IntArray, rank: int) -> NDArray[np.int64]:
        """Of what is in this rank's slots; see `slot_fingerprints`."""
        ...


def choose_platform(rows: WeightRows, load: torch.Tensor) -> Platform:
    """The platform of these tensors.

    Raises:
        SpecError: they lie on different devices, or on one that no platform knows.
        ConfigError: a package is missing.
    """
    device = rows.rows[0][0].device
    if load.device != device:
        raise SpecError(f"the load tensor is on {load.device}, the weights on {device}; both must lie on one device")
    if device.type == "cpu":
        return HostPlatform()
    if device.type == "cuda":
        from eplb_async.rank.cuda.platform import CudaPlatform

        return CudaPlatform(device)
    raise SpecError(f"weights on {device} cannot be moved; they can be on the CPU and on CUDA devices")


class HostPlatform:
    """See Platform."""

    capturing = staticmethod(lambda: False)

    def transfer(self, weights: Sequence[LayerTensors], rows: WeightRows, num_staging_rows: int, name: str) -> Transfer:
        """See Platform."""
        from eplb_async.rank.transfer.shm import SharedWeights, ShmTransfer

        if not isinstance(weights, SharedWeights):
            raise SpecError(
                "other ranks cannot reach these CPU weights: make them with "
                "weights = share_weights(group, rank, weights_per_layer) (eplb_async.rank.transfer.shm), compute with the "
                "tensors in it, and pass it to attach"
            )
        return ShmTransfer(rows, num_staging_rows, HostStream(name), weights)

    def maps(self, placement_LP: IntArray, spec: MoESpec) -> Maps:
        """See Platform."""
        return Maps(placement_LP, spec, torch.device("cpu"))

    def recorder(self, load: torch.Tensor, ring: LoadRing) -> Recorder:
        """See Platform."""
        return Recorder(load, ring)

    def fingerprints(self, rows: WeightRows, placement_LP: IntArray, rank: int) -> NDArray[np.int64]:
        """See Platform."""
        return slot_fingerprints(rows, placement_LP, rank, lambda pieces: [fingerprint(piece) for piece in pieces])

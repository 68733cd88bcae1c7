"""Recording: the load tensor of a step goes into the ring, and is zeroed for the next."""

import numpy as np
import torch

from eplb_async.core.errors import SpecError
from eplb_async.core.load import LoadKind, Phase, load_kind
from eplb_async.core.spec import MoESpec
from eplb_async.shm.ring import LoadRing, RingInfo

__all__ = ["Recorder", "check_load"]


def check_load(load: torch.Tensor, spec: MoESpec, kind: LoadKind | None) -> LoadKind:
    """What a load tensor counts.

    Raises:
        SpecError: not int32, not contiguous, neither on the CPU nor on CUDA, or a shape that fits no reading (see core.load.load_kind).
    """
    if load.dtype != torch.int32 or not load.is_contiguous():
        raise SpecError(
            f"the load tensor is {load.dtype} with strides {list(load.stride())}; needed contiguous torch.int32"
        )
    if load.device.type not in ("cpu", "cuda"):
        raise SpecError(
            f"the load tensor is on {load.device}; loads can be recorded from the CPU and from CUDA devices"
        )
    return load_kind(load.shape, spec, kind)


class Recorder:
    """The writing end of one rank's ring, for a load tensor on the CPU."""

    def __init__(self, load: torch.Tensor, ring: LoadRing) -> None:
        self._load, self.ring = load, ring
        self._counts = load.numpy()

    @staticmethod
    def ring_info(group: str, rank: int, load: torch.Tensor, kind: LoadKind, num_records: int) -> RingInfo:
        """The description of the ring for a load tensor [L, width]."""
        layers, width = load.shape
        return RingInfo(group=group, rank=rank, kind=kind, num_layers=layers, width=width, num_records=num_records)

    def record(self, step: int, phase: Phase, version: int, tokens: int, previous_us: int = 0, pulled: int = 0) -> None:
        """Write the record of a step and zero the load tensor. Never waits.

        Args:
            step, phase: of the forward that has just run.
            version: packed counter of the placement it ran with.
            tokens: tokens of the batch on this rank.
            previous_us: how long the step before took; 0: not known.
            pulled: bytes whose copies were issued since the record before.
        """
        counts = self.ring.begin(step, phase, version, tokens, previous_us, pulled)
        if phase.counts:
            np.copyto(counts, self._counts)
        self.ring.publish()
        self._counts.fill(0)

    def discard(self, step: int, version: int) -> None:
        """The forward of a step failed: record that the step was made, without its load."""
        self.record(step, Phase.DUMMY, version, 0)

    def close(self) -> None:
        """Let go of the ring. Idempotent."""
        self.ring.close()

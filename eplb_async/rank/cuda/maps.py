"""Map tensors on CUDA: rows come from pinned memory, on the compute stream, without a synchronisation."""

import torch

from eplb_async.core.placement import IntArray
from eplb_async.core.spec import MoESpec
from eplb_async.rank.cuda.driver import CudaDriver
from eplb_async.rank.cuda.streams import ComputeStream
from eplb_async.rank.maps import Maps
from eplb_async.rank.plan_reader import PreparedEntry

__all__ = ["CudaMaps"]


class CudaMaps(Maps):
    """The committed placement of one rank on a GPU.

    Each layer has pinned rows of its own. They are rewritten only by the layer's next commit, which is issued after every rank,
    this one too, has said that the one before ended on its device (I12, and I4 between plans): no copy still reads them.
    """

    def __init__(self, placement_LP: IntArray, spec: MoESpec, compute: ComputeStream, driver: CudaDriver) -> None:
        super().__init__(placement_LP, spec, compute.device)
        self._compute, self._driver = compute, driver
        self._targets = (self.slot_to_expert_LP, self.dispatch_table_LEK, self.dispatch_count_LE)
        # one buffer for all: pinned memory is given out in whole pages
        layers = [tensor[0].numel() for tensor in self._targets]
        self._pinned_LW = torch.empty((spec.num_layers, sum(layers)), dtype=torch.int64, pin_memory=True)
        self._parts = [part.numpy() for part in torch.split(self._pinned_LW, layers, dim=1)]

    def _write(self, entry: PreparedEntry) -> None:
        layer, stream = entry.layer, self._compute.current().cuda_stream
        for pinned, target, row in zip(
            self._parts, self._targets, (entry.row_P, entry.table_EK, entry.count_E), strict=True
        ):
            pinned[layer] = row.numpy().reshape(-1)
            live = target[layer]
            self._driver.copy(live.data_ptr(), pinned[layer].ctypes.data, live.nbytes, stream)

"""Map tensors on CUDA: a commit's kernel copies their rows from pinned memory."""

import torch

from eplb_async.core.placement import IntArray
from eplb_async.core.spec import MoESpec
from eplb_async.rank.maps import Maps
from eplb_async.rank.plan_reader import PreparedEntry
from eplb_async.rank.transfer.base import Copy

__all__ = ["CudaMaps"]


class CudaMaps(Maps):
    """The committed placement of one rank on a GPU.

    Each layer has pinned rows of its own. They are rewritten only by the layer's next commit, which is issued after every rank,
    this one too, has said that the one before ended on its device (I12, and I4 between plans): no copy still reads them.
    """

    def __init__(self, placement_LP: IntArray, spec: MoESpec, device: torch.device) -> None:
        super().__init__(placement_LP, spec, device)
        tensors = (self.slot_to_expert_LP, self.dispatch_table_LEK, self.dispatch_count_LE)
        pinned = [torch.empty(tensor.shape, dtype=torch.int64, pin_memory=True) for tensor in tensors]
        self._rows_L = [[part[layer].numpy() for part in pinned] for layer in range(spec.num_layers)]
        self._copies_L: list[list[Copy]] = [
            [
                (tensor[layer].data_ptr(), part[layer].data_ptr(), part[layer].nbytes)
                for tensor, part in zip(tensors, pinned, strict=True)
            ]
            for layer in range(spec.num_layers)
        ]
        self._pinned = pinned

    def _write(self, entry: PreparedEntry) -> list[Copy]:
        for pinned, row in zip(self._rows_L[entry.layer], (entry.row_P, entry.table_EK, entry.count_E), strict=True):
            pinned[...] = row.numpy()
        return self._copies_L[entry.layer]

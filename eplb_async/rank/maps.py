"""The tensors that the router reads. Their addresses and shapes never change: captured graphs keep pointing at them.

Rows are rewritten in place, between two forwards. All are int64, which torch indexes with.
"""

from collections.abc import Sequence

import numpy as np
import torch

from eplb_async.core.placement import IntArray, expert_to_slots
from eplb_async.core.spec import MoESpec
from eplb_async.rank.plan_reader import PreparedEntry, Snapshot
from eplb_async.rank.transfer.base import Copy

__all__ = ["Maps"]


class Maps:
    """The committed placement of one rank.

    Attributes:
        slot_to_expert_LP: the expert in every slot, -1 for an empty one.
        dispatch_table_LEK: slots of every expert; token i of expert e goes to table[l, e, hash(i) % count[l, e]].
        dispatch_count_LE: entries in use of each row.
        version_L: packed counter of each layer's last commit, 0 for the initial placement.
    """

    def __init__(self, placement_LP: IntArray, spec: MoESpec, device: torch.device) -> None:
        table_LEK, count_LE = expert_to_slots(placement_LP, spec.num_experts, spec.max_replicas)
        self.slot_to_expert_LP = torch.from_numpy(placement_LP.astype(np.int64)).to(device)
        self.dispatch_table_LEK = torch.from_numpy(table_LEK.astype(np.int64)).to(device)
        self.dispatch_count_LE = torch.from_numpy(count_LE.astype(np.int64)).to(device)
        self.version_L = [0] * spec.num_layers
        self._rows_LP = placement_LP.astype(np.int32)
        self._snapshot: Snapshot | None = None

    @property
    def snapshot(self) -> Snapshot:
        """A copy of the placement as it is now, for other threads; made at the first call after a commit."""
        if self._snapshot is None:
            self._snapshot = Snapshot(self._rows_LP.copy(), tuple(self.version_L))
        return self._snapshot

    def commit(self, entry: PreparedEntry, version: int) -> Sequence[Copy]:
        """Rewrite the rows of one layer; returns what the transfer has to copy for that on the device."""
        copies = self._write(entry)
        self.version_L[entry.layer] = version
        self._rows_LP[entry.layer] = entry.slot_to_expert_P
        self._snapshot = None
        return copies

    def _write(self, entry: PreparedEntry) -> Sequence[Copy]:
        layer = entry.layer
        self.slot_to_expert_LP[layer].copy_(entry.row_P)
        self.dispatch_table_LEK[layer].copy_(entry.table_EK)
        self.dispatch_count_LE[layer].copy_(entry.count_E)
        return ()

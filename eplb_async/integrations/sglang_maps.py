"""SGLang's expert location metadata, kept equal to the hook's maps.

    hook, L MoE layers                   SGLang, all layers of the model          row of layer l: layer_ids[l]
    slot_to_expert_LP       [L, P]   ->  physical_to_logical_map                  [layers, P]
    dispatch_table_LEK      [L,E,K]  ->  logical_to_all_physical_map              [layers, E, P], padded with -1
    dispatch_count_LE       [L, E]   ->  logical_to_all_physical_map_num_valid    [layers, E]
    both                             ->  logical_to_rank_dispatch_physical_map    [layers, E], only with static dispatch
    host copy of the placement       ->  physical_to_logical_map_cpu, logical_to_all_physical_map_cpu

SGLang's tensors stay where they are, since graphs and the recorder know them: after a commit, the rows of its layer are copied on the
compute stream, between the same two forwards. The hook's own tensors in their place were rejected: they have no rows for dense layers, and
SGLang's balancing could not go on from them when we leave.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eplb_async.core.placement import EMPTY, expert_to_slots
from eplb_async.rank.hook import RankHook

__all__ = ["MetadataMirror", "rank_slots"]


class MetadataMirror:
    """Its methods belong to the thread that runs the forwards.

    Attributes:
        has_empty: a live slot holds no expert, which SGLang has no word for.
    """

    def __init__(self, metadata: Any, hook: RankHook, layer_ids: Sequence[int]) -> None:
        """Makes SGLang's maps those of the hook, whatever they were.

        Args:
            metadata: SGLang's ExpertLocationMetadata, whose tensors are written to.
            hook: attached.
            layer_ids: SGLang's number of each MoE layer, [L].
        """
        self._metadata, self._hook, self._layer_ids = metadata, hook, layer_ids
        self._versions: Sequence[int] = ()
        self._num_commits = -1
        self.follow()

    @property
    def has_empty(self) -> bool:
        """See the class."""
        return bool((self._hook.live.rows_LP == EMPTY).any())

    def follow(self) -> None:
        """Copy what commits have changed since the last call. Without one it is a comparison of two integers."""
        if self._hook.num_commits == self._num_commits:
            return
        self._num_commits = self._hook.num_commits
        live = self._hook.live
        before, self._versions = self._versions, live.versions
        for layer, version in enumerate(live.versions):
            if not before or before[layer] != version:
                self._copy_on_device(layer)
                self._copy_on_host(layer)

    def _copy_on_device(self, layer: int) -> None:
        metadata, hook, row = self._metadata, self._hook, self._layer_ids[layer]
        table_EK, count_E = hook.dispatch_table_LEK[layer], hook.dispatch_count_LE[layer]
        metadata.physical_to_logical_map[row].copy_(hook.slot_to_expert_LP[layer])
        _write_padded(metadata.logical_to_all_physical_map[row], table_EK)
        metadata.logical_to_all_physical_map_num_valid[row].copy_(count_E)
        if metadata.logical_to_rank_dispatch_physical_map is not None:
            slots_E = rank_slots(table_EK, count_E, hook.rank, hook.spec.slots_per_rank, hook.spec.num_ranks)
            metadata.logical_to_rank_dispatch_physical_map[row].copy_(slots_E)

    def _copy_on_host(self, layer: int) -> None:
        """SGLang reads these to load weights: every slot once, whatever the dispatch table repeats."""
        metadata, spec, row = self._metadata, self._hook.spec, self._layer_ids[layer]
        slot_to_expert_1P = self._hook.live.rows_LP[layer : layer + 1]
        table_1EK, _ = expert_to_slots(slot_to_expert_1P, spec.num_experts, spec.max_replicas)
        metadata.physical_to_logical_map_cpu[row].copy_(torch.from_numpy(slot_to_expert_1P[0].astype(np.int64)))
        _write_padded(metadata.logical_to_all_physical_map_cpu[row], torch.from_numpy(table_1EK[0].astype(np.int64)))


def rank_slots(
    table_EK: torch.Tensor, count_E: torch.Tensor, rank: int, slots_per_rank: int, num_ranks: int
) -> torch.Tensor:
    """The one slot to which a rank sends each expert's tokens, under static dispatch. No wait for the device.

    A slot of its own if it has one. The ranks that have none take the entries by turns, beginning at the e-th. Three ranks with two slots
    each, table [[0, 2], [1, -1], [3, 4]]: expert 0 is on ranks 0 and 1, so rank 2 is the first that has none and takes entry 0, slot 0.
    Rank 2 takes [0, 1, 4], rank 0 takes [0, 1, 3]: for expert 2 it has the first turn, entry (0 + 2) % 2.

    Args:
        table_EK, count_E: rows of the hook's dispatch table, on one device.
        rank, slots_per_rank, num_ranks: slot p is on rank p // slots_per_rank.

    Returns:
        int64 [E].
    """
    num_experts = table_EK.shape[0]
    home_EK = torch.where(table_EK >= 0, table_EK // slots_per_rank, num_ranks)  # padding is on a rank after the last
    has_ER = torch.zeros(num_experts, num_ranks + 1, dtype=torch.bool, device=table_EK.device)
    has_ER.scatter_(1, home_EK, torch.ones_like(home_EK, dtype=torch.bool))
    turn_E = (~has_ER[:, :rank]).sum(dim=1) + torch.arange(num_experts, device=table_EK.device)
    own_EK = home_EK == rank
    entry_E = torch.where(own_EK.any(dim=1), own_EK.to(torch.uint8).argmax(dim=1), turn_E % count_E)
    return table_EK.gather(1, entry_E[:, None])[:, 0]


def _write_padded(target_EP: torch.Tensor, table_EK: torch.Tensor) -> None:
    """A row of K entries where SGLang keeps P."""
    length = table_EK.shape[1]
    target_EP[:, :length].copy_(table_EK)
    target_EP[:, length:].fill_(EMPTY)

"""From logical experts to slots, counted on the way: for engines that have no such kernel of their own.

    slots = map_and_count(topk_ids, hook.dispatch_table_LEK[layer], hook.dispatch_count_LE[layer], logical_load_E=load[layer])

On CUDA it is one Triton kernel, which a captured graph may contain; elsewhere plain torch, with the same result. Token i of expert e goes
to entry `replica_hash(i) % count[e]` of the expert's row, so the choice depends on nothing but the token's place in the batch.
"""

import torch

from eplb_async.core.errors import SpecError

__all__ = ["map_and_count", "replica_hash"]

BLOCK = 1024
"""Pairs per program. Each adds its histogram to the loads with one atomic per expert it met."""


def map_and_count(
    topk_ids: torch.Tensor,
    table_EK: torch.Tensor,
    count_E: torch.Tensor,
    *,
    logical_load_E: torch.Tensor | None = None,
    slot_load_P: torch.Tensor | None = None,
) -> torch.Tensor:
    """The slot of each chosen expert; tokens are added to the loads.

    Experts [[0, 1], [1, -1]], table [[0, 4], [2, 2]], counts [2, 1]: expert 1 goes to slot 2, the id -1 to slot -1 uncounted, and
    expert 0 of token 0 to slot 0, since replica_hash(0) is 0; logical load [1, 2].

    Args:
        topk_ids: int32 or int64 [tokens, k]; ids below 0 or from E on are padding.
        table_EK: int64 [E, K], the layer's dispatch table, contiguous.
        count_E: int64 [E], entries in use of each row.
        logical_load_E: int32 [E], contiguous; gets the tokens of each expert added, if given.
        slot_load_P: int32 [P], contiguous; gets the tokens of each slot added, if given.

    Returns:
        Slots in the ids' type and shape, -1 for padding.

    Raises:
        SpecError: a tensor has another type or shape.
    """
    _check(topk_ids, table_EK, count_E, (logical_load_E, slot_load_P))
    if topk_ids.is_cuda:
        return _on_device(topk_ids, table_EK, count_E, logical_load_E, slot_load_P)
    num_experts = len(count_E)
    known = (topk_ids >= 0) & (topk_ids < num_experts)
    expert = torch.where(known, topk_ids, 0).long()
    entry = replica_hash(torch.arange(len(topk_ids), device=topk_ids.device))[:, None] % count_E[expert]
    slots = torch.where(known, table_EK[expert, entry], -1)
    for load, index in ((logical_load_E, expert), (slot_load_P, slots)):
        if load is not None:
            counted = index[known & (slots >= 0) if load is slot_load_P else known]
            load += torch.bincount(counted, minlength=len(load)).to(load.dtype)
    return slots.to(topk_ids.dtype)


def replica_hash(token: torch.Tensor) -> torch.Tensor:
    """32 bits of a token's index, mixed so that neighbours spread: Fibonacci hashing (D. Knuth, TAOCP vol. 3, 6.4).

    0 stays 0; 1 gives 2654435769 ^ (2654435769 >> 15) = 2654356951.
    """
    mixed = token * 2654435769 & 0xFFFFFFFF
    return mixed ^ (mixed >> 15)


def _on_device(
    topk_ids: torch.Tensor,
    table_EK: torch.Tensor,
    count_E: torch.Tensor,
    logical_load_E: torch.Tensor | None,
    slot_load_P: torch.Tensor | None,
) -> torch.Tensor:
    from eplb_async.rank.cuda.kernels.dispatch import dispatch_kernel

    ids = topk_ids.contiguous()
    slots = torch.empty_like(ids)
    num_slots = 0 if slot_load_P is None else len(slot_load_P)
    # a power of two, with room for what is not counted
    bins = [1 << max(number, 1).bit_length() for number in (len(count_E), num_slots)]
    dispatch_kernel[(-(-ids.numel() // BLOCK),)](
        ids,
        table_EK,
        count_E,
        slots,
        logical_load_E,
        slot_load_P,
        ids.numel(),
        ids.shape[1],
        len(count_E),
        num_slots,
        table_EK.shape[1],
        logical_load_E is not None,
        slot_load_P is not None,
        *bins,
        BLOCK,
    )
    return slots


def _check(
    topk_ids: torch.Tensor, table_EK: torch.Tensor, count_E: torch.Tensor, loads: tuple[torch.Tensor | None, ...]
) -> None:
    if topk_ids.dtype not in (torch.int32, torch.int64) or topk_ids.dim() != 2:
        raise SpecError(
            f"topk_ids is {topk_ids.dtype} of shape {list(topk_ids.shape)}; needed int32 or int64 [tokens, k]"
        )
    for name, tensor, shape in (
        ("table_EK", table_EK, (len(count_E), table_EK.shape[-1])),
        ("count_E", count_E, (len(count_E),)),
    ):
        if tensor.dtype != torch.int64 or tensor.shape != shape or not tensor.is_contiguous():
            raise SpecError(
                f"{name} is {tensor.dtype} of shape {list(tensor.shape)}; needed contiguous int64 {list(shape)}"
            )
    for load in loads:
        if load is not None and (load.dtype != torch.int32 or load.dim() != 1 or not load.is_contiguous()):
            raise SpecError(f"a load is {load.dtype} of shape {list(load.shape)}; needed contiguous int32 [E] or [P]")
    if loads[0] is not None and loads[0].shape != count_E.shape:
        raise SpecError(f"logical_load_E has {len(loads[0])} experts, the table {len(count_E)}")

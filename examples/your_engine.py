"""A whole engine of one rank, as the README shows it. Run one process per rank; see tests/test_readme.py."""

__all__ = ["serve"]

import torch

from eplb_async import MoESpec, RankHook, share_weights


def serve(rank: int, num_ranks: int, num_steps: int) -> None:
    """One rank: two MoE layers, eight experts and as many slots again for replicas."""
    spec = MoESpec(num_layers=2, num_experts=8, num_redundant=8, num_ranks=num_ranks)

    # Your weights, [S, ...] per layer and tensor: S slots of this rank, loaded in the initial layout (expert p % 8 in slot p).
    own = range(rank * spec.slots_per_rank, (rank + 1) * spec.slots_per_rank)
    layers = [{"w": torch.stack([torch.full((4, 4), p % 8.0) for p in own])} for _ in range(spec.num_layers)]
    weights = share_weights("my-model", rank, layers)  # on the CPU, peers read them in shared memory

    load = torch.zeros(spec.num_layers, spec.num_experts, dtype=torch.int32)  # your router adds to it
    hook = RankHook.attach(group="my-model", rank=rank, spec=spec, weights=weights, load=load, daemon="auto")
    for step in range(num_steps):
        with hook.step(phase="decode", num_tokens=16):
            for layer in range(spec.num_layers):
                experts = torch.randint(0, 1 + step % 8, (16,))  # your router
                load[layer] += torch.bincount(experts, minlength=spec.num_experts).to(torch.int32)
                # which replica: row of the expert, one of its `count` entries; slot p lives on rank p // S
                entry = torch.arange(16) % hook.dispatch_count_LE[layer, experts]
                slots = hook.dispatch_table_LEK[layer, experts, entry]
                assert (hook.slot_to_expert_LP[layer, slots] == experts).all()
                # ... send tokens to ranks slots // S, compute there with weights[layer]["w"][slots % S], send back
    hook.detach()
    weights.close()

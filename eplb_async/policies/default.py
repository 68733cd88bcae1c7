"""The `default` policy: DeepSeek's EPLB, with replicas kept apart and slots preserved.

Source of the algorithm: github.com/deepseek-ai/EPLB (README), also vLLM's default policy. For each layer, with the loads of
all windows summed:

    hierarchical  (nodes divide the expert groups) whole groups are packed on nodes by load; each node then replicates its
                  own experts and packs the replicas over its ranks: the traffic of a group stays on one node
    global        (else) the same with all ranks as one node
    replicate     each spare slot goes to the expert with most tokens per replica
    pack          heaviest replica first, into the lightest rank that has a free slot

Then, which DeepSeek's does not do: replicas that met on one rank are swapped apart (no expert gets more replicas than
there are ranks to hold them), and an expert that stays on its rank keeps its slot.
"""

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.spec import Topology
from eplb_async.policies.base import Policy

__all__ = ["POLICY", "DefaultOptions", "default", "planning_nodes", "warm_up"]


class DefaultOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `default`.

    Fields:
        relabel_ranks: which rank gets which planned bin does not matter for the balance. False: as packed, like DeepSeek's
            and vLLM's. True: the assignment (per node where planned per node) that leaves most experts where they are, for
            2 to 3 times the time on 32 ranks, 5 to 8 times on 64.
    """

    relabel_ranks: bool = False


def default(
    windows_TLE: NDArray[np.float64],
    slot_to_expert_LP: NDArray[np.int32],
    topology: Topology,
    options: DefaultOptions,
    state: bytes,
) -> tuple[NDArray[np.int32], bytes]:
    """Plan all layers (see `base.PolicyFunction`). Keeps no state; never leaves a slot empty."""
    # numba takes a quarter of a second and many megabytes to import: the daemon, which only reads names and options, must not pay for it
    from eplb_async.policies import _kernels, _matching

    load_LE = np.ascontiguousarray(windows_TLE.sum(axis=0))
    live_LP = np.array(slot_to_expert_LP, dtype=np.int32, order="C")
    num_layers, num_experts = load_LE.shape
    ranks, per_rank = topology.num_ranks, topology.slots_per_rank
    nodes = planning_nodes(topology, num_experts)
    if per_rank >= num_experts:
        planned_LP = np.tile(_all_on_every_rank(topology, num_experts), (num_layers, 1))
    else:
        most = min(topology.max_replicas, ranks // nodes)
        planned_LP = _kernels.plan_layers(load_LE, ranks, per_rank, nodes, topology.num_expert_groups, most)
    if options.relabel_ranks:
        planned_LP = _matching.match_ranks(planned_LP, live_LP, num_experts, per_rank, nodes)
    return _matching.keep_slots(planned_LP, live_LP, per_rank), state


def planning_nodes(topology: Topology, num_experts: int) -> int:
    """How many nodes are planned one by one: all of them (hierarchical), or 1 (global).

    Global also where a rank has more slots than its node would have experts: replicas would have to share a rank.
    """
    nodes, groups = topology.num_nodes, topology.num_expert_groups
    divides = groups % nodes == 0 and num_experts % groups == 0
    return nodes if divides and topology.slots_per_rank * nodes <= num_experts else 1


def _all_on_every_rank(topology: Topology, num_experts: int) -> NDArray[np.int32]:
    """A row for ranks with room for every expert: all alike, which is perfect balance whatever the load. int32 [P].

    Where K forbids that, the slots count through the experts from rank to rank; each rank still holds them all.
    """
    slots = np.arange(topology.num_slots, dtype=np.int32)
    most_in_a_rank = -(-topology.slots_per_rank // num_experts)
    if topology.num_ranks * most_in_a_rank <= topology.max_replicas:
        slots %= topology.slots_per_rank
    return slots % np.int32(num_experts)


def warm_up() -> None:
    """Compile all loops with the types that plans use."""
    topology = Topology(num_ranks=2, slots_per_rank=2, num_nodes=2, num_expert_groups=2)
    windows_TLE = np.ones((1, 1, 4))
    live_LP = np.array([[0, 1, 2, 3]], dtype=np.int32)
    default(windows_TLE, live_LP, topology, DefaultOptions(relabel_ranks=True), b"")


POLICY = Policy(
    name="default",
    function=default,
    options_type=DefaultOptions,
    summary="DeepSeek's greedy balance (hierarchical or global), replicas apart, slots preserved",
    warm_up=warm_up,
)

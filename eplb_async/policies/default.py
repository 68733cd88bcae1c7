"""The `default` policy: DeepSeek's EPLB as vLLM runs it, with replicas kept apart.

Source of the algorithm: github.com/deepseek-ai/EPLB (README); vLLM's `DefaultEplbPolicy`, compared with version 0.33. For each
layer, with the loads of all windows summed:

    hierarchical  (nodes divide the expert groups) whole groups are packed on nodes by load; each node then replicates its
                  own experts and packs the replicas over its ranks: the traffic of a group stays on one node
    global        (else) the same with all ranks as one node
    replicate     each spare slot goes to the expert with most tokens per replica
    pack          heaviest replica first, into the lightest rank that has a free slot
    keep slots    an expert that stays on its rank keeps its slot there

With `strict` the placement is vLLM's, slot for slot, its defects included. Without it, it is vLLM's for every layer in which
that has no defect. What counts as a defect, and what is done instead:

    a rank holds an expert twice though another could have its slot     packing passes over ranks that hold the expert; where
                                                                         none is left, a swap mends it that costs least balance
    an expert has more replicas than its node has ranks, or than a       it gets no more, the next hottest does (vLLM gives
    dispatch row holds (K)                                               expert 0 all spare slots of an idle layer)
    a rank has more slots than its node has experts                      global instead of hierarchical
    a rank has a slot for every expert, and does not hold them all       every rank holds them all, alike

A second replica on a rank is a wasted slot, but not always without use: it sends that rank a double share, which splits very
hot experts finer. So vLLM's PAR can be better by what such splits give (on one recorded trace it is, by a hundredth).

To agree in every tie it computes as vLLM does: loads rounded to float32 and summed per group in float32, loads per replica in
float64, and everything to be packed in the order in which numpy sorts it. That sort is not stable: which of two equal
replicas comes first depends on numpy's version and on the CPU. It does no harm: on one machine the same input gives the
same plan, and ranks never plan: they get the plan of one process. Loads beyond float32 are scaled by a power of two, which
changes no comparison; `strict` refuses them.
"""

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.placement import replica_count
from eplb_async.core.spec import Topology
from eplb_async.policies.base import Policy

__all__ = ["POLICY", "DefaultOptions", "default", "planning_nodes", "warm_up"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]


class DefaultOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `default`.

    Fields:
        strict: vLLM's placement exactly, its defects included: replicas of an expert on one rank, and more of them than
            there are ranks. It cannot always be had: the policy then fails, and says why.
        relabel_ranks: which rank gets which planned bin does not matter for the balance. False: as packed, like DeepSeek's
            and vLLM's. True: the assignment (per node where planned per node) that leaves most experts where they are, for
            2 to 3 times the time on 32 ranks, 5 to 8 times on 64. Not with `strict`.
    """

    strict: bool = False
    relabel_ranks: bool = False

    def __post_init__(self) -> None:
        if self.strict and self.relabel_ranks:
            raise ValueError("relabel_ranks changes the placement that strict promises; set one of them")


def default(
    windows_TLE: FloatArray,
    slot_to_expert_LP: IntArray,
    topology: Topology,
    options: DefaultOptions,
    state: bytes,
) -> tuple[IntArray, bytes]:
    """Plan all layers (see `base.PolicyFunction`). Keeps no state; never leaves a slot empty.

    Raises:
        ValueError: `strict`, and vLLM's placement has more replicas of an expert than a dispatch row holds, or its
            arithmetic (float32) overflows on these loads.
    """
    # numba takes a quarter of a second and many megabytes to import: the daemon, which only reads names and options, must not pay for it
    from eplb_async.policies import _matching

    load_LE = windows_TLE.sum(axis=0)
    live_LP = np.array(slot_to_expert_LP, dtype=np.int32, order="C")
    num_experts, per_rank = load_LE.shape[1], topology.slots_per_rank
    if options.strict:
        planned_LP = _strict_bins(load_LE, topology)
    else:
        planned_LP = _bins(load_LE, topology)
    if options.relabel_ranks:
        nodes, _ = planning_nodes(topology, num_experts)
        planned_LP = _matching.match_ranks(planned_LP, live_LP, num_experts, per_rank, nodes)
    return _matching.keep_slots(planned_LP, live_LP, per_rank), state


def planning_nodes(topology: Topology, num_experts: int, strict: bool = False) -> tuple[int, int]:
    """How many nodes are planned one by one, and how many groups there are to pack on them; (1, 1): global.

    Global also, but not in vLLM (`strict`), where a rank has more slots than its node would have experts: replicas would
    have to share a rank.
    """
    nodes, groups = topology.num_nodes, topology.num_expert_groups
    if groups % nodes or (nodes > 1 and not strict and topology.slots_per_rank * nodes > num_experts):
        return 1, 1
    return nodes, groups


def _strict_bins(load_LE: FloatArray, topology: Topology) -> IntArray:
    """VLLM's bins, int32 [L, P]."""
    num_experts = load_LE.shape[1]
    nodes, groups = planning_nodes(topology, num_experts, strict=True)
    if not _fits_float32(load_LE, groups):
        raise ValueError("loads add up to more than float32 holds, in which vLLM computes; plan without strict")
    planned_LP = _greedy(load_LE, topology, (nodes, groups), topology.num_slots, apart=False)
    count_LE = replica_count(planned_LP, num_experts)
    if count_LE.max() > topology.max_replicas:
        layer, expert = np.argwhere(count_LE > topology.max_replicas)[0]
        raise ValueError(
            f"vLLM's placement has {count_LE[layer, expert]} replicas of expert {expert} in layer {layer}; dispatch rows "
            f"hold {topology.max_replicas} (table_length of the spec). Lengthen them, or plan without strict"
        )
    return planned_LP


def _bins(load_LE: FloatArray, topology: Topology) -> IntArray:
    """VLLM's bins where they have no defect, else the mended ones, int32 [L, P]."""
    num_layers, num_experts = load_LE.shape
    nodes, groups = planning_nodes(topology, num_experts)
    if not _fits_float32(load_LE, groups):
        _, exponent = np.frexp(load_LE.sum(axis=1).max())
        load_LE = np.ldexp(load_LE, 120 - exponent)
    if topology.slots_per_rank < num_experts:
        most = min(topology.max_replicas, topology.num_ranks // nodes)
        return _greedy(load_LE, topology, (nodes, groups), most, apart=True)
    planned_LP = _greedy(load_LE, topology, (nodes, groups), topology.max_replicas, apart=False)
    by_rank = planned_LP.reshape(-1, topology.slots_per_rank)
    complete_L = replica_count(by_rank, num_experts).all(axis=1).reshape(num_layers, -1).all(axis=1)
    planned_LP[~complete_L] = _all_on_every_rank(topology, num_experts)
    return planned_LP


def _greedy(
    load_LE: FloatArray, topology: Topology, nodes_and_groups: tuple[int, int], most_replicas: int, apart: bool
) -> IntArray:
    """Pack groups on nodes, replicate, pack replicas on ranks. int32 [L, P]: bins in the order of ranks.

    Args:
        load_LE: within the range of float32.
        topology: R and S.
        nodes_and_groups: from `planning_nodes`.
        most_replicas: of one expert.
        apart: separate replicas that met on a rank; needs most_replicas <= ranks of a node and S <= its experts.
    """
    from eplb_async.policies import _kernels

    (num_layers, num_experts), (nodes, groups) = load_LE.shape, nodes_and_groups
    rounded_LE = np.ascontiguousarray(load_LE, dtype=np.float32)
    if groups == nodes:
        # as many bins as items: each group stays where it is
        member_LE = np.broadcast_to(np.arange(num_experts), load_LE.shape).copy()
    else:
        group_load_LG = rounded_LE.reshape(num_layers, groups, -1).sum(axis=2)
        order_LG = np.argsort(-group_load_LG, axis=1)
        member_LE = _kernels.order_in_nodes(group_load_LG.astype(np.float64), order_LG, nodes, num_experts // groups)
    expert_XQ, weight_XQ = _kernels.replicate_all(
        rounded_LE.astype(np.float64), member_LE, nodes, topology.num_slots // nodes, most_replicas
    )
    order_XQ = np.argsort(-weight_XQ, axis=1)
    planned_XQ = _kernels.pack_all(expert_XQ, weight_XQ, order_XQ, topology.slots_per_rank, num_experts, apart)
    return planned_XQ.reshape(num_layers, -1)


def _fits_float32(load_LE: FloatArray, groups: int) -> bool:
    """Whether loads, and where there are groups their sums, are well within the range of float32 (below 2^128)."""
    largest = load_LE.reshape(len(load_LE), groups, -1).sum(axis=2) if groups > 1 else load_LE
    return bool(largest.max() < 2.0**127)


def _all_on_every_rank(topology: Topology, num_experts: int) -> IntArray:
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
    topology = Topology(num_ranks=4, slots_per_rank=2, num_nodes=2, num_expert_groups=4)
    windows_TLE = np.ones((1, 1, 4))
    live_LP = np.array([[0, 1, 2, 3, 0, 1, 2, 3]], dtype=np.int32)
    default(windows_TLE, live_LP, topology, DefaultOptions(relabel_ranks=True), b"")


POLICY = Policy(
    name="default",
    function=default,
    options_type=DefaultOptions,
    summary="DeepSeek's greedy balance as vLLM runs it (hierarchical or global), replicas apart, slots preserved",
    warm_up=warm_up,
)

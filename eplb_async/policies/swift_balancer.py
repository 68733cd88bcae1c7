"""The `swift_balancer` policy: repair the live placement with few moves.

Source of the algorithm: Huawei's SwiftBalancer, public in vllm-ascend. For each layer, with the loads of all windows summed:

    leave     a layer without load, or whose PAR is at most a threshold
    copies    what the redundant slots copy is chosen anew: the expert with most tokens per replica gets a slot of the one
              that would miss it least, while that pays; the copy goes to the lightest rank that has a free slot for it
    swaps     experts of the heaviest rank are swapped with experts of other ranks, while that pays
    decide    a layer is changed only if that lowers its peak

with caps on the swaps of a layer and on the experts that one rank sends to another. Different from SwiftBalancer, which
takes all copies away first and gives them out again:

    - a redundant slot that copies the right expert is not touched
    - a swap is judged by its gain less the price of the experts it really moves. An expert that is new on its rank may go
      on to another, which costs nothing more; all ranks are searched for the best swap
    - the last swaps are taken back as far as they did not pay for their moves, and so is the whole plan of a layer
    - gains are measured in slot loads: the mean rank load / S, which is what an average slot computes
    - if swaps find nothing more and the peak is still over `copy_gain` slot loads above the mean, the layer is planned once
      more with every copy that lowers the greatest load of a replica, and the better of both plans counts
    - empty slots, and slots that repeat an expert of their rank, are filled like redundant ones; where no expert may go,
      they stay empty
"""

import math
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.spec import Topology
from eplb_async.policies.base import Policy

if TYPE_CHECKING:
    from eplb_async.policies._swift_layer import Rules

__all__ = ["POLICY", "SwiftOptions", "plan_rules", "swift_balancer", "warm_up"]


class SwiftOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `swift_balancer`. Gains are in slot loads: a layer's mean rank load / S.

    The defaults were chosen so that on all recorded traces and synthetic shapes both PAR (planned and next) and moves are
    at most SwiftBalancer's. Lower gains and more swaps balance better and move more.

    Fields:
        threshold: PAR (>= 1) up to which a layer is left alone, and at which swaps end.
        copy_gain: a redundant slot is given to another expert if that has more tokens per replica than this plus what the
            slot's expert would have with one replica less.
        swap_gain: by how much a swap must lower the busier of its two ranks for each expert that it moves.
        layer_gain: by how much a plan must lower a layer's peak for its moves: this times the share of the layer's slots
            that get a new expert.
        most_swaps: in one layer and plan; 0 for none. What is left waits for the next plan.
        most_transfers: experts (>= 1) that one rank may send to another in one layer and plan.
        scope: "global", or "node": experts only move inside a node, which needs no traffic between nodes. A node then keeps
            the experts it has; one that has fewer than a rank has slots leaves slots empty.
    """

    threshold: float = 1.02
    copy_gain: float = 1.0
    swap_gain: float = 0.15
    layer_gain: float = 3.6
    most_swaps: int = 8
    most_transfers: int = 1
    scope: Literal["global", "node"] = "global"

    def __post_init__(self) -> None:
        for name, least in (
            ("threshold", 1),
            ("copy_gain", 0),
            ("swap_gain", 0),
            ("layer_gain", 0),
            ("most_swaps", 0),
            ("most_transfers", 1),
        ):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be finite and at least {least}")


def swift_balancer(
    windows_TLE: NDArray[np.float64],
    slot_to_expert_LP: NDArray[np.int32],
    topology: Topology,
    options: SwiftOptions,
    state: bytes,
) -> tuple[NDArray[np.int32], bytes]:
    """Plan all layers (see `base.PolicyFunction`). Keeps no state."""
    # numba is imported by planning and warm-up alone (see `default`)
    from eplb_async.policies import _swift

    load_LE = np.ascontiguousarray(windows_TLE.sum(axis=0))
    live_LP = np.array(slot_to_expert_LP, dtype=np.int32, order="C")
    return _swift.plan_layers(load_LE, live_LP, topology.num_ranks, plan_rules(topology, options)), state


def plan_rules(topology: Topology, options: SwiftOptions) -> "Rules":
    """The options as the compiled loops take them."""
    from eplb_async.policies._swift_layer import Rules

    return Rules(
        slots_per_rank=topology.slots_per_rank,
        ranks_per_unit=topology.ranks_per_node if options.scope == "node" else topology.num_ranks,
        most_replicas=topology.max_replicas,
        # a record of each swap is allocated beforehand; more swaps than slots would not pay
        most_swaps=min(options.most_swaps, topology.num_slots),
        most_transfers=min(options.most_transfers, topology.slots_per_rank),
        threshold=float(options.threshold),
        copy_gain=float(options.copy_gain),
        swap_gain=float(options.swap_gain),
        layer_gain=float(options.layer_gain),
    )


def warm_up() -> None:
    """Compile all loops with the types that plans use."""
    topology = Topology(num_ranks=2, slots_per_rank=2)
    live_LP = np.array([[0, 1, 2, 3]], dtype=np.int32)
    swift_balancer(np.ones((1, 1, 4)), live_LP, topology, SwiftOptions(), b"")


POLICY = Policy(
    name="swift_balancer",
    function=swift_balancer,
    options_type=SwiftOptions,
    summary="repairs the live placement with few moves: redundant copies chosen anew, then swaps (SwiftBalancer)",
    warm_up=warm_up,
)

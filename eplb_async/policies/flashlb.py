"""The `flashlb` policy: replica counts and placement chosen together, by a tree search over simulated placements.

Source of the algorithm: FlashLB, public in github.com/vllm-project/vllm-ascend; written anew. For each layer:

    due?        its mean / peak rank load on the windows has fallen against what was promised when it was last deployed, or
                is low in itself; or, where several windows gave no better plan, against what it was then. Else the layer is
                left alone
    risk        of an expert: mean + z standard deviations of its share over the windows; of a rank: the same of the sum of
                its experts, covariances included
    search      experts, riskiest first, are cut into `depth` groups. Group by group, the number of spare slots that the
                group gets is searched within `width` of what the replica rule gives it, or twice that; each number is scored by a simulated
                placement (largest first, each replica into the rank of least risk) on the windows themselves
    placement   the same with the best counts, but an expert stays on its rank where that is little worse
    swaps       of experts between ranks, while that lowers the mean PAR over the windows; with a single window those count more that
                leave the ranks even under equally hot experts
    match       ranks that were planned without regard to the live placement go to the live ranks that hold most of them

It differs from its source in what follows the search (homes, swaps), in two replicas of an expert never meeting on a rank
where that can be avoided, in windows counting as shares (a step with few tokens as much as one with many), and in the
thresholds: what chance alone may add to the PAR of few tokens makes no layer due, and a layer whose gain is small stays.
Planned globally: nodes and expert groups do not matter.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.spec import Topology
from eplb_async.policies.base import Policy
from eplb_async.policies.default import DefaultOptions, default
from eplb_async.policies.windows import expected_peak, merged

if TYPE_CHECKING:
    from eplb_async.policies._flash_work import Rules

__all__ = ["POLICY", "FlashLBOptions", "ReplicaRule", "flashlb", "warm_up"]

ReplicaRule = Literal["peak", "relief", "proportional"]

RULE_NUMBER: dict[str, int] = {"peak": 0, "relief": 1, "proportional": 2}
"""As in `_flash_search`."""

GOOD_ENOUGH = 1.001
"""A mean PAR at which swapping ends."""

STATE_VERSION = 1


class FlashLBOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `flashlb`.

    Fields:
        depth: groups that the experts are cut into, >= 1; with 1 counts are the rule's.
        width: numbers of spare slots tried to each side of the rule's (and of the best so far), for each group but the last,
            >= 0; twice as many while ranks are far from even; with 0 counts are the rule's.
        replica_rule: who gets the next spare slot. With risk r and c replicas, the expert of greatest: "peak": r / c, which
            keeps the riskiest replica least; "relief": r / (c (c + 1)), what the replica's ranks are relieved of;
            "proportional": r / (c + 1/2), counts nearest to shares.
        z_score: standard deviations that count as risk, >= 0; 0.674: three windows in four are below.
        max_windows: more windows than that are merged, consecutive ones, >= 1.
        redeploy_ratio: a layer is due when its mean / peak is below this part of what was promised, in [0, 1].
        redeploy_below: and when it is below this, in [0, 1]. Where several windows showed no better plan, neither counts until it is worse.
        sampling_noise: how much of the PAR that chance alone makes (tokens choosing experts independently) is taken off
            before these two are asked, >= 0; it shrinks with the tokens of a window and with the square root of the number
            of windows. 0 for loads that are not token counts.
        least_gain: a planned layer stays as it is unless its mean PAR falls by more than this part, in [0, 1]. It stays, too, if the
            search alone, before homes and swaps, gains no more than this; 0: any gain will do, and every due layer is planned.
        most_layers: most layers changed by a plan, those with the greatest gain; 0: no limit.
        stay_within: an expert stays on its rank in dealing unless that is this much riskier than the best rank, in mean rank
            loads; more: fewer moves, more swaps to do, >= 0.
        most_swaps: of experts between ranks, per layer, >= 0.
    """

    depth: int = 4
    width: int = 2
    replica_rule: ReplicaRule = "peak"
    z_score: float = 0.674
    max_windows: int = 64
    redeploy_ratio: float = 0.98
    redeploy_below: float = 0.925
    sampling_noise: float = 1.0
    least_gain: float = 0.01
    most_layers: int = 0
    stay_within: float = 0.2
    most_swaps: int = 80

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}; it must be at least {least} and at most {most}")


_RANGES: dict[str, tuple[float, float]] = {
    "depth": (1, 1_000_000),
    "width": (0, 1_000_000),
    "z_score": (0, 1_000_000),
    "max_windows": (1, 1_000_000),
    "redeploy_ratio": (0, 1),
    "redeploy_below": (0, 1),
    "sampling_noise": (0, 1_000_000),
    "least_gain": (0, 1),
    "most_layers": (0, 1_000_000),
    "stay_within": (0, 1_000_000),
    "most_swaps": (0, 1_000_000),
}


class _State(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one plan tells the next: 16 bytes for each layer.

    Fields:
        version: of this layout.
        promised: float64 [L], mean / peak of each layer on the windows it was planned for; 1 where it never was; negative: what it was
            when the layer was planned in vain.
        planned: int64 [L], fingerprints of the rows that this is about. A promise does not bind a row that was not deployed.
    """

    version: int
    promised: bytes
    planned: bytes


_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(_State)


def flashlb(
    windows_TLE: NDArray[np.float64],
    slot_to_expert_LP: NDArray[np.int32],
    topology: Topology,
    options: FlashLBOptions,
    state: bytes,
) -> tuple[NDArray[np.int32], bytes]:
    """Plan the layers that are due (see `base.PolicyFunction`).

    The state holds what was promised for each layer, or tried in vain. State that is lost, garbage or of another shape counts as a promise of
    perfect balance. Layers without load are left alone, and so are empty slots of layers that are not due; but where a rank has
    a slot for every expert, all ranks get all experts, whatever the load.
    """
    num_experts = windows_TLE.shape[2]
    if topology.slots_per_rank >= num_experts:
        # perfect balance whatever the load: nothing to search
        return default(windows_TLE, slot_to_expert_LP, topology, DefaultOptions(), b"")
    # read-only whatever the caller has: numba compiles for arrays that may be written and for others anew
    live_LP = np.ascontiguousarray(slot_to_expert_LP, dtype=np.int32).view()
    windows = merged(np.ascontiguousarray(windows_TLE), options.max_windows).view()
    live_LP.flags.writeable = windows.flags.writeable = False
    replan, rules = _compiled(topology, options)
    placement_LP, promised_L, print_L = replan(
        windows, live_LP, *_recalled(state, len(live_LP)), rules, options.most_layers
    )
    return placement_LP, _ENCODER.encode(_State(STATE_VERSION, promised_L.tobytes(), print_L.tobytes()))


@lru_cache(maxsize=16)
def _compiled(topology: Topology, options: FlashLBOptions) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The kernel that plans, and the rules as a plain tuple: numba looks at the type of a named one longer than a calm layer takes."""
    # numba takes a quarter of a second to import: the daemon, which only reads names and options, must not pay for it
    from eplb_async.policies import _flash

    return _flash.replan, tuple(_rules(topology, options))


def _rules(topology: Topology, options: FlashLBOptions) -> "Rules":
    from eplb_async.policies._flash_work import Rules

    ranks = topology.num_ranks
    return Rules(
        ranks,
        topology.slots_per_rank,
        min(topology.max_replicas, ranks),
        options.depth,
        options.width,
        options.z_score,
        RULE_NUMBER[options.replica_rule],
        options.stay_within,
        options.most_swaps,
        GOOD_ENOUGH,
        options.redeploy_ratio,
        options.redeploy_below,
        options.sampling_noise * expected_peak(ranks),
        options.least_gain,
    )


def _recalled(state: bytes, num_layers: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """What the state says was promised, float64 [L], and the fingerprints of the rows it was promised for, int64 [L].

    Zeros, which are no promise, where nothing is known.
    """
    promised = planned = bytes(8 * num_layers)
    try:
        known = _DECODER.decode(state)
    except msgspec.DecodeError:
        # lost, of another version or of another policy: the contract allows all of these
        pass
    else:
        if known.version == STATE_VERSION and len(known.promised) == len(known.planned) == len(promised):
            promised, planned = known.promised, known.planned
    return np.frombuffer(promised), np.frombuffer(planned, dtype=np.int64)


def warm_up() -> None:
    """Compile all loops with the types that plans use."""
    topology = Topology(num_ranks=2, slots_per_rank=2)
    live_LP = np.array([[0, 1, 2, 0]], dtype=np.int32)
    flashlb(np.arange(6.0).reshape(2, 1, 3), live_LP, topology, FlashLBOptions(), b"")


POLICY = Policy(
    name="flashlb",
    function=flashlb,
    options_type=FlashLBOptions,
    summary="tree search over replica counts and placement on several windows, only layers that are due",
    warm_up=warm_up,
)

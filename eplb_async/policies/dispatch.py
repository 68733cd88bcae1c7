"""Weighted dispatch: how an expert's tokens are split over its replicas, as an option of every policy.

A policy says where replicas live. With `dispatch = "even"` each gets the same share of its expert's tokens, and ranks need no
table. With `dispatch = "weighted"` the planner fits shares to the placement and to the windows, rounds them to dispatch
rows of at most K entries, and may refit them without moving an expert:

    fit     shares of least mean peak over the windows (the busiest rank's tokens): exact for one window, smoothed for
            several (policies/_dispatch.py), each slot at least 1 / K
    blend   dispatch_strength of the way from the even split to the fitted one
    round   the row of at most K entries that comes closest; no share is off by 1 / K or more, so a rank's tokens grow by
            less than the sum of load / K over its slots of split experts
    keep    the even split of a layer that the rounded rows do not improve

It is off by default: weights fitted to one interval meet the next. On recorded traffic they helped most where placements are
left alone for long, somewhat where intervals have 8 windows or more, and not at all where traffic changes from each window
to the next (benchmarks/bench_dispatch.py replays it). K limits them too: give the spec a `table_length` of 32 or more.
Importing this module does not import numba.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.spec import Topology

__all__ = ["DispatchOptions", "FittedDispatch", "fit_dispatch", "split_options", "wants_weights", "warm_up"]

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]


class DispatchOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Planning options that every policy has beside its own.

    Fields:
        dispatch: "even": all replicas of an expert get the same share of its tokens. "weighted": shares fitted to the windows.
        dispatch_strength: how far shares go from the even split, 0, to the fitted ones, 1. Less than 1 hedges against the
            next interval being another one: on recorded traffic 0.75 kept most of the gain, and cost at most 0.4 % of the
            PAR of a placement that was planned at the same time, where 1 cost up to 0.7 %. Without effect on "even".
    """

    dispatch: Literal["even", "weighted"] = "even"
    dispatch_strength: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.dispatch_strength <= 1:  # nan is not
            raise ValueError(f"dispatch_strength is {self.dispatch_strength}; it must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class FittedDispatch:
    """Dispatch tables for the rows of a placement.

    Fields:
        table_LEK, count_LE: int32, the tables for the router and the lengths of their rows; each slot of an expert stands in
            its row at least once, in ascending order.
        share_LP: the share of its expert's tokens that each slot gets with them, 0 for an empty slot.
        even_L: bool, the layers whose table is that of the even split.
        peak_bound_L: tokens of the busiest rank, mean over windows, that no shares at this placement can get below; 0 for a
            layer without load.
    """

    table_LEK: IntArray
    count_LE: IntArray
    share_LP: FloatArray
    even_L: NDArray[np.bool_]
    peak_bound_L: FloatArray


def split_options(options: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Options of all policies by name, and those of the policy itself, as read from settings."""
    common = {name: value for name, value in options.items() if name in DispatchOptions.__struct_fields__}
    return common, {name: value for name, value in options.items() if name not in common}


def wants_weights(options: Mapping[str, object]) -> bool:
    """True if the options of a policy, not checked yet, ask for weighted dispatch."""
    return options.get("dispatch") == "weighted"


def fit_dispatch(
    windows_TLE: FloatArray, slot_to_expert_LP: IntArray, topology: Topology, strength: float = 1.0
) -> FittedDispatch:
    """Fit dispatch tables to placements and windows. Pure; the same arguments give the same tables.

    One window of load [8, 4] on slots [0, 1, 0, -1] of 2 ranks, K = 4: expert 0 gets the row [0, 2, 2, 2], so that the ranks
    compute 6 and 6 tokens, where an even split gives them 8 and 4.

    Args:
        windows_TLE: tokens per window, finite and >= 0, T >= 1.
        slot_to_expert_LP: valid rows, of the same L.
        topology: R, S, and K (`max_replicas`).
        strength: `dispatch_strength`; all the way by default, which is exact for one window.

    Returns:
        Tables whose mean peak over the windows is never above that of the even split.
    """
    # numba: only a worker that fits pays for its import
    from eplb_async.policies import _dispatch, _dispatch_rounding

    windows_TLE = np.array(windows_TLE, dtype=np.float64, order="C")
    rows_LP = np.array(slot_to_expert_LP, dtype=np.int32, order="C")
    num_ranks, length = topology.num_ranks, topology.max_replicas
    share_LP, entries_LP, bound_L = _dispatch.fit_layers(windows_TLE, rows_LP, num_ranks, length, float(strength), True)
    table_LEK, count_LE = _dispatch_rounding.tables(rows_LP, entries_LP, windows_TLE.shape[2], length)
    even_L = (entries_LP <= 1).all(axis=1)
    return FittedDispatch(
        table_LEK=table_LEK, count_LE=count_LE, share_LP=share_LP, even_L=np.asarray(even_L), peak_bound_L=bound_L
    )


def warm_up() -> None:
    """Compile the loops with the types that plans use."""
    fit_dispatch(np.ones((2, 1, 2)), np.array([[0, 1, 0, 1]], dtype=np.int32), Topology(num_ranks=2, slots_per_rank=2))

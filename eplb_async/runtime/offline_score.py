"""How good a new placement is and what it moves, as fields of `observability.plan_report.PlanReport`.

PAR is over windows (`core.score.windows_par`). The busiest rank's load, its bound and balancedness are of the windows'
sum, which is what `policies.bounds` bounds: for small layers by exact search, so that an optimal placement has gap 0.

Shape suffixes: T windows, L MoE layers, E logical experts, P slots of all ranks, R ranks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.placement import EMPTY, replica_count
from eplb_async.core.score import balancedness, rank_load, windows_par
from eplb_async.core.spec import MoESpec
from eplb_async.policies.bounds import peak_lower_bound, proven_peak_lower_bound

__all__ = ["Compared", "balance", "gap_to_bound", "moved_slots", "moves", "next_balance"]

_ROUNDING = 1e-12
"""A smaller gap is the rounding of sums, not distance."""


@dataclass(frozen=True)
class Compared:
    """Two placements of one model, int32 [L, P].

    Fields:
        before_LP, after_LP: the placements; before, every expert's tokens are split evenly.
        share_LP: the share of its expert's tokens that each slot gets after; None: evenly too.
    """

    spec: MoESpec
    before_LP: NDArray[np.int32]
    after_LP: NDArray[np.int32]
    share_LP: NDArray[np.float64] | None = None


def balance(windows_TLE: NDArray[np.float64], compared: Compared) -> dict[str, Any]:
    """The report's PAR over the windows it was planned on; peak, bound, gap and balancedness on their sum."""
    topology = compared.spec.topology
    sum_LE = windows_TLE.sum(axis=0)
    bound_L = _bound(sum_LE, compared)
    facts: dict[str, Any] = {}
    for suffix, placement_LP, share_LP in _sides(compared):
        facts |= _par_facts(f"par{suffix}", windows_par(windows_TLE, placement_LP, topology, share_LP))
        load_LR = rank_load(sum_LE, placement_LP, topology, share_LP)
        peak_L = load_LR.max(axis=1)
        facts |= {
            f"balancedness{suffix}": balancedness(load_LR),
            f"max_load{suffix}": float(peak_L.max()),
            f"max_load{suffix}_L": peak_L.tolist(),
        }
    gap_L = gap_to_bound(np.asarray(facts["max_load_L"]), bound_L)
    facts |= {"bound": float(bound_L.max()), "bound_L": bound_L.tolist()}
    return facts | {"gap": float(gap_L.mean()), "gap_max": float(gap_L.max()), "gap_L": gap_L.tolist()}


def next_balance(next_TLE: NDArray[np.float64] | None, compared: Compared) -> dict[str, Any]:
    """The report's PAR on the windows that come next; None in each field if there are none."""
    facts: dict[str, Any] = {}
    for side, placement_LP, share_LP in _sides(compared):
        name = f"par_next{side}"
        if next_TLE is None:
            facts |= {f"{name}{suffix}": None for suffix in ("", "_max", "_L")}
        else:
            facts |= _par_facts(name, windows_par(next_TLE, placement_LP, compared.spec.topology, share_LP))
    return facts


def moves(compared: Compared, slot_bytes: int | None) -> dict[str, Any]:
    """The report's counts of what changes, and the bytes of that if a slot's are known."""
    before_LP, after_LP = compared.before_LP, compared.after_LP
    moved_L = moved_slots(before_LP, after_LP, compared.spec)
    changed_L = (before_LP != after_LP).sum(axis=1)
    return {
        "moved": sum(moved_L),
        "moved_share": sum(moved_L) / after_LP.size,
        "moved_L": moved_L,
        "slots_changed": int(changed_L.sum()),
        "slots_changed_L": changed_L.tolist(),
        "layers_changed": int((changed_L > 0).sum()),
        "transfer_bytes": None if slot_bytes is None else sum(moved_L) * slot_bytes,
    }


def moved_slots(before_LP: NDArray[np.int32], after_LP: NDArray[np.int32], spec: MoESpec) -> list[int]:
    """Slots of each layer that get an expert which their rank did not hold (or held in fewer slots), in any order.

    2 ranks x 2 slots, from [0, 1, 2, 0] to [1, 2, 0, 0]: expert 2 is new on rank 0, and rank 1 holds 0 once more: 2.
    """
    by_rank = (spec.num_ranks, spec.slots_per_rank)
    moved = []
    for before_P, after_P in zip(before_LP, after_LP, strict=True):  # by layer: [R, E] is large on many ranks
        new = replica_count(after_P.reshape(by_rank), spec.num_experts)
        old = replica_count(before_P.reshape(by_rank), spec.num_experts)
        moved.append(int(np.maximum(new - old, 0).sum()))
    return moved


def gap_to_bound(peak_L: NDArray[np.float64], bound_L: NDArray[np.float64]) -> NDArray[np.float64]:
    """The relative distance peak / bound - 1; 0 for a layer without load. [232, 0] over [200, 0]: [0.16, 0]."""
    gap_L = peak_L / np.where(bound_L > 0, bound_L, 1.0) - (bound_L > 0)
    return np.where(np.abs(gap_L) < _ROUNDING, 0.0, gap_L)


def _bound(sum_LE: NDArray[np.float64], compared: Compared) -> NDArray[np.float64]:
    """What the peak after is compared with: where that is above the cheap bound, one that search may have raised.

    Only for layers that fill every slot, hold no expert twice on a rank and split evenly: others might beat what is proven.
    """
    spec, after_LP = compared.spec, compared.after_LP
    bound_L = peak_lower_bound(sum_LE, spec.topology)
    if compared.share_LP is None:
        held_LRS = np.sort(after_LP.reshape(len(after_LP), spec.num_ranks, spec.slots_per_rank), axis=2)
        twice_L = (held_LRS[:, :, 1:] == held_LRS[:, :, :-1]).any(axis=(1, 2))
        peak_L = rank_load(sum_LE, after_LP, spec.topology).max(axis=1)
        search_L = ~twice_L & (after_LP != EMPTY).all(axis=1) & (gap_to_bound(peak_L, bound_L) > 0)
        if search_L.any():
            bound_L[search_L] = proven_peak_lower_bound(sum_LE[search_L], spec.topology)
    return bound_L


def _sides(
    compared: Compared,
) -> list[tuple[str, NDArray[np.int32], NDArray[np.float64] | None]]:
    """How the report's names end, with the placement and shares that they are of."""
    return [("", compared.after_LP, compared.share_LP), ("_before", compared.before_LP, None)]


def _par_facts(name: str, par_L: NDArray[np.float64]) -> dict[str, Any]:
    return {name: float(par_L.mean()), f"{name}_max": float(par_L.max()), f"{name}_L": par_L.tolist()}

"""What is to gain per layer: by a policy's rows, by new dispatch tables for the live ones, and which of them pays.

A layer moves only if its predicted PAR falls by at least `min_gain` of its PAR below what the live row would have with new
tables: those cost no bytes. Else it gets new tables without a move, if these lower its PAR as much. Without weighted dispatch,
in the options or live, new tables of the live row are those it has, and nothing is refitted.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.diff import aligned_target
from eplb_async.core.score import even_share, windows_par
from eplb_async.core.spec import Topology
from eplb_async.policies.dispatch import FittedDispatch
from eplb_async.policies.registry import run_dispatch
from eplb_async.policies.windows import expected_peak
from eplb_async.runtime.proposal import PlanRequest

__all__ = ["Outlook", "outlook_of", "sampling_noise"]

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]
LEAST_GAIN = 1e-9
"""A PAR that is lower by less is the same, summed in another order."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The choices, PAR per layer of the windows under each, float64 [L], and what follows from it, bool [L].

    Fields:
        target_LP: the policy's rows, aligned with the live ones.
        stay, target: tables fitted to the live rows and to the target's; None for an even split.
        before_L: as it is live.
        stay_L: with the live rows and new dispatch.
        target_L: with the target's rows and new dispatch.
        moves_L: layers that get their target's row.
        refits_L: others, which get new dispatch only.
        uncertain: PAR, summed over layers that would move but for the sampling noise of so few tokens.
        num_uncertain: those layers.
        num_dear: layers that gain enough, and not what their moves cost.
    """

    target_LP: IntArray
    stay: FittedDispatch | None
    target: FittedDispatch | None
    before_L: FloatArray
    stay_L: FloatArray
    target_L: FloatArray
    moves_L: NDArray[np.bool_]
    refits_L: NDArray[np.bool_]
    uncertain: float = 0.0
    num_uncertain: int = 0
    num_dear: int = 0

    @property
    def after_L(self) -> FloatArray:
        """If all these layers change."""
        changed_L = np.where(self.moves_L, self.target_L, self.stay_L)
        return np.where(self.moves_L | self.refits_L, changed_L, self.before_L)


def outlook_of(request: PlanRequest, target_LP: IntArray) -> Outlook:
    """Which layers move, which get new dispatch only, and what PAR each choice has."""
    windows_TLE, live_LP, topology = request.windows.unpack(), request.placement.unpack(), request.spec.topology

    def par_of(rows_LP: IntArray, share_LP: FloatArray | None) -> FloatArray:
        return windows_par(windows_TLE, rows_LP, topology, share_LP)

    # tables name slots, so they are fitted to the rows that will be committed
    pairs = zip(live_LP, target_LP, strict=True)
    target_LP = np.stack([aligned_target(live_P, target_P, topology) for live_P, target_P in pairs])
    stay, target = _dispatch(request, live_LP), _dispatch(request, target_LP)
    share_LP = None if request.share is None else request.share.unpack()
    renew_L = np.zeros(len(live_LP), dtype=np.bool_)
    renew_L[request.renew] = True
    if stay is None and share_LP is not None:
        # weights of the past, which nobody refits any more
        renew_L |= ~np.isclose(share_LP, even_share(live_LP, request.spec.num_experts)).all(axis=1)
    before_L = par_of(live_LP, share_LP)
    stay_L = before_L
    if stay is not None or share_LP is not None:
        stay_L = par_of(live_LP, None if stay is None else stay.share_LP)
    target_L = par_of(target_LP, None if target is None else target.share_LP)

    def pays(gain_L: FloatArray) -> NDArray[np.bool_]:
        return (gain_L > LEAST_GAIN) & (gain_L >= request.min_gain * before_L)

    # bytes must pay for what tables alone do not bring
    moves_L = pays(np.where(renew_L, stay_L, np.minimum(stay_L, before_L)) - target_L)
    share_L = (target_LP != live_LP).mean(axis=1)
    gain_L = before_L - target_L
    noise_L = (
        np.zeros(len(live_LP)) if not request.confidence else sampling_noise(windows_TLE, before_L + target_L, topology)
    )
    moves_L &= share_L > 0
    dear_L = moves_L & (gain_L < request.price * share_L)
    moves_L &= ~dear_L
    uncertain_L = moves_L & (gain_L - request.confidence * noise_L < request.price * share_L)
    moves_L &= ~uncertain_L
    return Outlook(
        target_LP=target_LP,
        stay=stay,
        target=target,
        before_L=before_L,
        stay_L=stay_L,
        target_L=target_L,
        moves_L=moves_L,
        refits_L=~moves_L & (renew_L | pays(before_L - stay_L)),
        uncertain=float(gain_L[uncertain_L].sum()),
        num_uncertain=int(uncertain_L.sum()),
        num_dear=int(dear_L.sum()),
    )


def sampling_noise(windows_TLE: FloatArray, peaks_L: FloatArray, topology: Topology) -> FloatArray:
    """Standard deviation, in PAR, of a gain between two placements that comes of counting tokens alone, per layer.

    Two parts, added: the Poisson noise of the two busiest ranks, and what the greatest of R noisy ranks is above their mean, by which the
    placement that was fitted to the counts looks better than it is. 16 ranks of 10,000 tokens, PAR 1.5 and 1.0: sqrt(2.5) / 100 + 1.77 / 100.
    Loads of less than a token per rank are no counts: 0.

    Args:
        windows_TLE: what the gain was predicted on, in tokens.
        peaks_L: sum of the PAR of both placements.
        topology: R.
    """
    mean_L = windows_TLE.sum(axis=(0, 2)) / topology.num_ranks
    noise_L = (np.sqrt(peaks_L) + expected_peak(topology.num_ranks)) / np.sqrt(np.maximum(mean_L, 1.0))
    return np.where(mean_L >= 1.0, noise_L, 0.0)


def _dispatch(request: PlanRequest, rows_LP: IntArray) -> FittedDispatch | None:
    """Tables for these rows, None for an even split."""
    return run_dispatch(request.policy, request.windows.unpack(), rows_LP, request.spec, request.options)

"""The tree search of the `flashlb` policy: how many replicas each expert of a layer gets.

    spare_order   the order in which a stretch of experts is given spare slots
    deal          the simulated placement: largest first, each replica to the rank of least risk
    search        from group to group of experts, the number of spare slots with the best simulated placement

The risk of a rank is the mean of its load plus z standard deviations, which counts how its experts vary together.
Imports numba (see `_kernels` for what that implies). Every function has a plain twin in tests/policies/twins_flash.py.
The innermost loops stand where they are used: a call with the arrays that they read takes longer than they do.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._flash_work import INNER, Rules, Work, mean_peak, put_on_ranks
from eplb_async.policies._kernels import CACHE

__all__ = [
    "FAR",
    "GOOD_AMONG_SEVERAL",
    "GOOD_ENOUGH",
    "NO_HOMES",
    "PEAK",
    "PROPORTIONAL",
    "RELIEF",
    "deal",
    "reorder",
    "search",
    "spare_order",
]

IndexArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

PEAK, RELIEF, PROPORTIONAL = 0, 1, 2
"""Replica rules: the next spare slot goes to the greatest risk / c, risk / (c (c + 1)), or risk / (c + 1/2), c being the
replicas that the expert has."""

GOOD_ENOUGH = 1.05
"""The search ends at a placement whose greatest mean load is at most this times the least possible; swaps do the rest."""

GOOD_AMONG_SEVERAL = 1.1
"""The same with several windows, whose peaks are higher than that of the means in any case."""

FAR = 1.1
"""A placement whose greatest mean load is more than this times what is good enough is worth trying twice the width: replicas of half a rank's load
leave no room beside each other, and the next number of them that fits may be several away."""

NO_HOMES = 0.0
"""As `within` of `deal`: the live placement does not matter."""


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def spare_order(
    work: Work, ranked_E: IndexArray, stretch: tuple[int, int], spare: int, rules: Rules, order_P: IndexArray
) -> int:
    """The places in `ranked_E`, in a stretch of it, that get a spare slot, one after the other; how many.

    Risks [90, 40, 20] in this order, 3 spare slots by the rule PEAK: 90, then 45, then 40: [0, 0, 1].

    What n spare slots give is always the start of what more of them give. An expert that has one replica never goes
    before a riskier one that has one, so only those with several and the first with one are compared.

    Args:
        work: `risk_E` is read; `unit_E` is scratch.
        ranked_E: experts by descending risk.
        stretch: where it begins, and before where it ends.
        spare: slots to give out.
        rules: `replica_rule` and `most_replicas`.
        order_P: out: the places.

    Returns:
        At most `spare`: fewer if all have as many as they may. Ties: fewest replicas first, then the first place.
    """
    first, last = stretch
    risk_E, count = work.risk_E, work.unit_E
    for place in range(last - first):
        count[place] = 1.0
    given, several = 0, 0
    while given < spare:
        best, most_wanted = -1, -1.0
        for place in range(min(several + 1, last - first)):
            replicas = count[place]
            if replicas < rules.most_replicas:
                divisor = replicas
                if rules.replica_rule == RELIEF:
                    divisor = replicas * (replicas + 1.0)
                elif rules.replica_rule == PROPORTIONAL:
                    divisor = replicas + 0.5
                wanted = risk_E[ranked_E[first + place]] / divisor
                if wanted > most_wanted or (wanted == most_wanted and replicas < count[best]):
                    best, most_wanted = place, wanted
        if best < 0:
            break
        count[best] += 1
        several = max(several, best + 1)
        order_P[given] = first + best
        given += 1
    return given


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def deal(  # size: one pass over all experts, with what a layer and a placement consist of
    work: Work, num_windows: int, order_E: IndexArray, count_E: IndexArray, within: float, cut: float, rules: Rules
) -> tuple[float, bool]:
    """Place every replica: experts in the given order, each replica on the rank that has the least risk with it.

    Means [4, 3, 2] of one window in 2 ranks of 2 slots, counts [2, 1, 1]: 2 | 2, 2 | 5, 4 | 5: score 5.

    Args:
        work: shares, statistics and homes are read, the placement and `load_RT` written (not if the deal is cut short).
        num_windows: those with load; variances count if there are several and z > 0.
        order_E: experts by descending risk of one replica.
        count_E: replicas of each expert, P in all.
        within: a home of the expert that is less than this above the rank of least risk is taken instead.
        cut: give up as soon as the mean load of a rank is as high: so would be the score.
        rules: z and the number of slots.

    Returns:
        The mean PAR (infinite if it gave up), and whether some rank got an expert twice, there being no other with room.
    """
    row_RS, filled_R, mean_R, open_R, last_R = work.row_RS, work.filled_R, work.mean_R, work.open_R, work.last_R
    mean_E, var_E, off_TE, covariance_EE = work.mean_E, work.var_E, work.off_TE, work.covariance_EE
    var_R, spread_RX, home_P, home_at_E = work.var_R, work.spread_RX, work.home_P, work.home_at_E
    rank_R = work.rank_R
    risk, matrix, doubled = rules.z_score if num_windows > 1 else 0.0, covariance_EE.shape[0] > 0, False
    filled_R[:] = 0
    mean_R[:] = 0.0
    open_R[:] = 0.0
    var_R[:] = 0.0
    last_R[:] = -1
    for rank in range(rules.num_ranks):
        rank_R[rank] = rank
    num_open = rules.num_ranks
    if risk > 0.0:
        spread_RX[:] = 0.0
    for expert in order_E:
        part = 1.0 / count_E[expert]
        single = np.float32(part)
        own = var_E[expert] * part * part
        homes = home_at_E[expert + 1] - home_at_E[expert] if within > 0.0 else 0
        for _ in range(count_E[expert]):
            # first the ranks by ascending mean: no risk is below the mean, so few of them are looked at; then the homes
            best, least, best_var, turn, slack = -1, np.inf, 0.0, 0, within
            while turn < num_open + homes:
                if turn < num_open:
                    rank = rank_R[turn]
                    turn = turn + 1 if open_R[rank] < least else num_open
                else:
                    rank = home_P[home_at_E[expert] + turn - num_open]
                    least, slack = least + slack, 0.0
                    turn += 1
                if open_R[rank] < least and last_R[rank] != expert:
                    # the replica's mean is the same on every rank, and left out
                    level, var = open_R[rank], 0.0
                    if risk > 0.0:
                        joint = 0.0
                        if matrix:
                            joint = spread_RX[rank, expert]
                        else:
                            for window in range(num_windows):
                                joint += spread_RX[rank, window] * off_TE[window, expert]
                        var = max(var_R[rank] + own + 2.0 * part * joint, 0.0)
                        # most ranks fail already by the squares: a root takes longer than all the rest
                        if risk * risk * var >= (least - level) * (least - level):
                            continue
                        level += risk * np.sqrt(var)
                    if level < least:
                        best, least, best_var = rank, level, var
            if best < 0:
                best, doubled = rank_R[0], True
            row_RS[best, filled_R[best]] = expert
            filled_R[best] += 1
            last_R[best] = expert
            mean_R[best] += mean_E[expert] * part
            if mean_R[best] >= cut:
                return np.inf, doubled
            open_R[best] = mean_R[best] if filled_R[best] < rules.slots_per_rank else np.inf
            num_open = reorder(rank_R, num_open, open_R, best)
            if risk > 0.0:
                var_R[best] = best_var
                if matrix:
                    for other in range(mean_E.shape[0]):
                        spread_RX[best, other] += covariance_EE[expert, other] * single
                else:
                    for window in range(num_windows):
                        spread_RX[best, window] += off_TE[window, expert] * single
    if num_windows == 1:
        # the same sums: what a rank has in its one window is its mean
        work.load_RT[:, 0] = mean_R
    else:
        put_on_ranks(work.share_ET, num_windows, row_RS, count_E, work.part_N, work.load_RT)
    return mean_peak(work.load_RT, num_windows, work.peak_T), doubled


@numba.njit(error_model="numpy", cache=CACHE)
def reorder(rank_R: IndexArray, num_open: int, open_R: FloatArray, changed: int) -> int:
    """Keep the open ranks in ascending order of `open_R` after one has grown; how many are open now.

    Ranks [2, 0, 1] at [4, 5, 3], rank 2 having grown from 1 to 3: [2, 0, 1] still; had it grown to 5: [0, 2, 1].
    """
    place = 0
    while rank_R[place] != changed:
        place += 1
    while place + 1 < num_open and open_R[rank_R[place + 1]] < open_R[changed]:
        rank_R[place] = rank_R[place + 1]
        place += 1
    rank_R[place] = changed
    return num_open - 1 if open_R[changed] == np.inf else num_open


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def search(  # size: one walk down the tree
    work: Work, num_windows: int, ranked_E: IndexArray, count_E: IndexArray, worth: float, rules: Rules
) -> float:
    """Choose the replica counts of all experts; writes them to `count_E`, and the order for `deal` to `ranked_E`.

    The experts, riskiest first, are cut into `depth` groups of the same size. For the first group, each number of spare slots
    within `width` of what the rule gives it (and of the best so far), or twice that while the best is FAR from good, is tried: its own by
    the rule, what is left to all later groups by the rule, and a simulated placement of all. The best number stays, and the next group is next. It ends where the
    ranks' mean loads are balanced well enough, or cannot be because of the heaviest replica: counts mend means, and what
    fluctuates is a matter of who meets whom.

    Args:
        work: shares, statistics; the placement is scratch.
        num_windows: those with load.
        ranked_E: in: experts by descending risk; out: by descending risk of one replica.
        count_E: out: P in all, none above `most_replicas`.
        worth: only a mean PAR below this counts as found; without one in the first group, the search ends.
        rules: depth, width, the replica rule, and what is good enough.

    Returns:
        The mean PAR of the best simulated placement, which `deal` makes again of the order and the counts; `worth` if none was
        below it.
    """
    num_experts = ranked_E.shape[0]
    risk_E, mean_E, rule_P, rest_P = work.risk_E, work.mean_E, work.rule_P, work.rest_P
    trial_E, order_E, best_E, unit_E = work.trial_E, work.order_E, work.best_E, work.unit_E
    per_group = -(-num_experts // rules.depth)
    spare = rules.num_ranks * rules.slots_per_rank - num_experts
    spare_order(work, ranked_E, (0, num_experts), spare, rules, rule_P)
    _give(ranked_E, 0, rule_P, spare, count_E)
    least = 1.0
    for expert in range(num_experts):
        least = max(least, mean_E[expert] / count_E[expert])
    good = least * (GOOD_ENOUGH if num_windows == 1 else GOOD_AMONG_SEVERAL)
    for place in range(num_experts):
        trial_E[place] = count_E[place]
        order_E[place] = best_E[place] = ranked_E[place]
    best, level = worth, np.inf
    first, last = 0, per_group
    while first == 0 or (last < num_experts and spare > 0 and level > good and best < worth):
        end = min(last, num_experts)
        most = min(spare_order(work, ranked_E, (first, end), spare, rules, rule_P), spare)
        most_rest = spare_order(work, ranked_E, (end, num_experts), spare, rules, rest_P)
        start = 0
        for place in range(first, end):
            start += count_E[ranked_E[place]] - 1
        chosen, away, side, furthest = start, 0, 1, min(rules.width, spare)
        # the start itself is known but for the first group; then one less, one more, two less, ...
        if first > 0:
            away, side = 1, -1
        while level > good and (away <= furthest or (away <= 2 * rules.width and level > FAR * good)):
            given = start + side * away
            away, side = (away, 1) if side < 0 else (away + 1, -1)
            if given < 0 or given > most or spare - given > most_rest:
                continue
            _give(ranked_E, first, rule_P, given, trial_E)
            _give(ranked_E, end, rest_P, spare - given, trial_E)
            _resort(order_E, trial_E, risk_E, unit_E)
            score, _ = deal(work, num_windows, order_E, trial_E, NO_HOMES, best, rules)
            if score < best:
                best, chosen, furthest = score, given, min(abs(given - start) + rules.width, spare)
                level = 0.0
                for rank in range(rules.num_ranks):
                    level = max(level, work.mean_R[rank])
                for place in range(num_experts):
                    best_E[place] = order_E[place]
        _give(ranked_E, first, rule_P, chosen, count_E)
        _give(ranked_E, end, rest_P, spare - chosen, count_E)
        for expert in range(num_experts):
            trial_E[expert] = count_E[expert]
        spare -= chosen
        first, last = last, last + per_group
    for place in range(num_experts):
        ranked_E[place] = best_E[place]
    return best


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def _give(ranked_E: IndexArray, first: int, order: IndexArray, number: int, count_E: IndexArray) -> None:
    """One replica for each expert from place `first` on, and one more for each of the first so many in the order."""
    for place in range(first, ranked_E.shape[0]):
        count_E[ranked_E[place]] = 1
    for index in range(number):
        count_E[ranked_E[order[index]]] += 1


@numba.njit(error_model="numpy", cache=CACHE, **INNER)
def _resort(order_E: IndexArray, count_E: IndexArray, risk_E: FloatArray, unit_E: FloatArray) -> None:
    """Sort by descending risk of one replica, in place: insertion, because counts change little from one trial to the next."""
    for expert in range(order_E.shape[0]):
        unit_E[expert] = risk_E[expert] / count_E[expert]
    for place in range(1, order_E.shape[0]):
        expert, to = order_E[place], place
        while to > 0 and unit_E[order_E[to - 1]] < unit_E[expert]:
            order_E[to] = order_E[to - 1]
            to -= 1
        order_E[to] = expert

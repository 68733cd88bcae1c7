"""Plain twins of the `flashlb` kernels, written the obvious way.

They add in the same order as the loops (`total`), so results agree to the last bit and ties fall alike.
"""

import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._flash import HOPELESS, RETRY, WORSE_THAN_FOUND
from eplb_async.policies._flash_search import FAR, GOOD_AMONG_SEVERAL, GOOD_ENOUGH, NO_HOMES, PROPORTIONAL, RELIEF
from eplb_async.policies._flash_swaps import ENOUGH, EVENNESS, NO_GAIN, TRIES
from eplb_async.policies._flash_work import Rules
from eplb_async.policies._matching import match_ranks
from tests.policies.twins import keep_slots_twin, separate_twin
from tests.policies.twins_flash_layer import LayerTwin, total

__all__ = [
    "deal_twin",
    "find_homes_twin",
    "find_swap_twin",
    "fingerprint_twin",
    "plan_layers_twin",
    "replan_twin",
    "search_twin",
    "spare_order_twin",
    "swap_experts_twin",
]

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]


def spare_order_twin(
    risk_E: FloatArray, ranked_E: list[int], first: int, last: int, spare: int, rules: Rules
) -> list[int]:
    """`spare_order`: the greatest of all places, again and again."""
    order: list[int] = []
    count = dict.fromkeys(range(first, last), 1)

    def wanted(place: int) -> float:
        c = count[place]
        divisor = {RELIEF: c * (c + 1), PROPORTIONAL: c + 0.5}.get(rules.replica_rule, c)
        return float(risk_E[ranked_E[place]] / divisor)

    while len(order) < spare:
        free = [place for place in count if count[place] < rules.most_replicas]
        if not free:
            break
        order.append(min(free, key=lambda place: (-wanted(place), count[place], place)))
        count[order[-1]] += 1
    return order


def deal_twin(
    layer: LayerTwin,
    matrix: bool,
    order_E: list[int],
    count_E: NDArray[np.int64],
    homes: dict[int, list[int]],
    within: float,
) -> tuple[list[list[int]], FloatArray, bool]:
    """`deal`, never cut short: the experts of each rank, the ranks' means, and whether some rank has one twice."""
    rules = layer.rules
    ranks = list(range(rules.num_ranks))  # by ascending mean; one that grew stands before its equals
    bins: list[list[int]] = [[] for _ in ranks]
    placed: list[list[tuple[int, float]]] = [[] for _ in ranks]
    mean_R, var_R = np.zeros(len(ranks)), np.zeros(len(ranks))
    doubled = False
    for expert in order_E:
        part = 1 / count_E[expert]
        for _ in range(count_E[expert]):
            var = {}
            level = {}
            for rank in ranks:
                if expert not in bins[rank]:
                    joint = layer.covariance(matrix, placed[rank], expert) if layer.used > 1 else 0.0
                    own = layer.var_E[expert] * part * part
                    var[rank] = max(var_R[rank] + own + 2 * part * joint, 0.0)
                    level[rank] = mean_R[rank] + rules.z_score * np.sqrt(var[rank]) if layer.used > 1 else mean_R[rank]
            if level:
                best = min(level, key=lambda rank: level[rank])
                near = [rank for rank in homes.get(expert, []) if rank in level and level[rank] < level[best] + within]
                best = min(near, key=lambda rank: level[rank]) if near and within > 0 else best
            else:
                best, doubled = ranks[0], True
                var[best] = 0.0
            bins[best].append(expert)
            placed[best].append((expert, part))
            mean_R[best] += layer.mean_E[expert] * part
            var_R[best] = var[best]
            at = ranks.index(best)
            ranks.remove(best)
            if len(bins[best]) < rules.slots_per_rank:
                while at < len(ranks) and mean_R[ranks[at]] < mean_R[best]:
                    at += 1
                ranks.insert(at, best)
    return bins, mean_R, doubled


def search_twin(layer: LayerTwin, matrix: bool, worth: float) -> tuple[float, list[int], NDArray[np.int64]]:
    """`search`: the best mean PAR, and the order and the counts that give it."""
    rules, risk_E = layer.rules, layer.risk_E
    num_experts = len(risk_E)
    ranked = sorted(range(num_experts), key=lambda expert: -risk_E[expert])
    spare = rules.num_ranks * rules.slots_per_rank - num_experts
    order = ranked

    def counts(first: int, given: int, last: int, left: int, before: dict[int, int]) -> dict[int, int]:
        count = {expert: before.get(expert, 1) if place < first else 1 for place, expert in enumerate(ranked)}
        for start, end, number in ((first, last, given), (last, num_experts, left)):
            for place in spare_order_twin(risk_E, ranked, start, end, number, rules):
                count[ranked[place]] += 1
        return count

    count = counts(0, spare, num_experts, 0, {})
    least = max(1.0, *(layer.mean_E[e] / count[e] for e in range(num_experts)))
    good = least * (GOOD_ENOUGH if layer.used == 1 else GOOD_AMONG_SEVERAL)
    best, level, best_order = worth, np.inf, order
    size = -(-num_experts // rules.depth)
    first = 0
    while first == 0 or (first + size < num_experts and spare > 0 and level > good and best < worth):
        last = min(first + size, num_experts)
        start = sum(count[ranked[place]] - 1 for place in range(first, last))
        chosen, furthest = start, min(rules.width, spare)
        for away, side in [(0, 1)] * (first == 0) + [(a, s) for a in range(1, spare + 1) for s in (-1, 1)]:
            given = start + side * away
            if level <= good or away > max(furthest, 2 * rules.width * (level > FAR * good)):
                break
            most_here, most_left = ((rules.most_replicas - 1) * n for n in (last - first, num_experts - last))
            if not (0 <= given <= min(most_here, spare) and spare - given <= most_left):
                continue
            trial = counts(first, given, last, spare - given, count)
            order = sorted(order, key=lambda expert: -(risk_E[expert] / trial[expert]))
            count_E = np.array([trial[e] for e in range(num_experts)])
            bins, mean_R, _ = deal_twin(layer, matrix, order, count_E, {}, NO_HOMES)
            score = layer.score(layer.loads(bins, count_E))
            if score < best:
                best, level, chosen, best_order = score, mean_R.max(), given, order
                furthest = min(away + rules.width, spare)
        count = counts(first, chosen, last, spare - chosen, count)
        spare -= chosen
        first = last
    return best, best_order, np.array([count[e] for e in range(num_experts)])


def find_swap_twin(
    layer: LayerTwin,
    bins: list[list[int]],
    loads: tuple[FloatArray, FloatArray, FloatArray],
    count_E: NDArray[np.int64],
    busiest: int,
    slope: float,
) -> tuple[float, int, int, int]:
    """`find_swap`, of loads by rank and window, their means, and loads under equally hot experts: gain, slot, other rank (-1: none), its slot."""
    load_RT, mean_R, even_R = loads
    top_T = load_RT.max(axis=0)
    first = [t for t in range(layer.used) if load_RT[busiest, t] == top_T[t]]
    others = [t for t in range(layer.used) if t not in first]
    others_RT = np.delete(load_RT, busiest, axis=0)
    most = total(top_T[t] - (others_RT[:, t].max() if len(others_RT) else 0.0) for t in first)
    worth, best, least = -np.inf, (0.0, 0, -1, 0), NO_GAIN * layer.used

    def rise(expert: int, rank: int, swapped: int) -> float:
        less, one, two = 1 / count_E[expert] - 1 / count_E[swapped], even_R[busiest], even_R[rank]
        return float(max(one - less, two + less) - max(one, two))

    for rank in sorted(range(len(bins)), key=lambda rank: mean_R[rank]):
        if mean_R[rank] >= min(mean_R[busiest], 1.0) or worth >= ENOUGH * most:
            break
        rest_RT = np.delete(load_RT, [busiest, rank], axis=0)
        rest_T = rest_RT.max(axis=0) if len(rest_RT) else np.full(layer.used, -1.0)
        half = (mean_R[busiest] - mean_R[rank]) / 2
        for slot, expert in enumerate(bins[busiest]):
            part = 1 / count_E[expert]
            away = {
                place: abs(layer.mean_E[expert] / count_E[expert] - layer.mean_E[swapped] / count_E[swapped] - half)
                + slope * max(rise(expert, rank, swapped), 0.0)
                for place, swapped in enumerate(bins[rank])
                if swapped not in bins[busiest]
            }
            away = {place: off for place, off in away.items() if off < half}
            if expert in bins[rank] or not away:
                continue
            near = min(away, key=lambda place: away[place])
            swapped = bins[rank][near]
            less_T = layer.share_ET[expert] * part - layer.share_ET[swapped] * (1 / count_E[swapped])
            peak_T = np.maximum(np.maximum(load_RT[busiest] - less_T, load_RT[rank] + less_T), rest_T)
            gain = total(top_T[t] - peak_T[t] for t in first)
            if gain > max(worth, least):
                gain = total([*(top_T[t] - peak_T[t] for t in first), *(top_T[t] - peak_T[t] for t in others)])
            harm = slope * rise(expert, rank, swapped)
            if gain > least and gain - harm > worth:
                worth, best = gain - harm, (gain, slot, rank, near)
    return best


def swap_experts_twin(
    layer: LayerTwin,
    bins: list[list[int]],
    load_RT: FloatArray,
    mean_R: FloatArray,
    count_E: NDArray[np.int64],
    score: float,
) -> float:
    """`swap_experts`: in place; the score after it."""
    settled: set[int] = set()
    even_R = np.array([total(1 / count_E[experts]) for experts in bins])
    slope = EVENNESS * len(bins) / len(count_E) if layer.used == 1 else 0.0
    swaps = failed = 0
    while swaps < layer.rules.most_swaps and failed < TRIES and score > layer.rules.good_enough:
        number = [(load == load_RT.max(axis=0)).sum() for load in load_RT]
        peaks = [rank for rank in range(len(bins)) if number[rank] and rank not in settled]
        if not peaks:
            break
        busiest = max(peaks, key=lambda rank: (number[rank], mean_R[rank], -rank))
        gain, mine, other, theirs = find_swap_twin(layer, bins, (load_RT, mean_R, even_R), count_E, busiest, slope)
        if other < 0:
            settled.add(busiest)
            failed += 1
            continue
        expert, swapped = bins[busiest][mine], bins[other][theirs]
        part, swapped_part = 1 / count_E[expert], 1 / count_E[swapped]
        less_T = layer.share_ET[expert] * part - layer.share_ET[swapped] * swapped_part
        less = layer.mean_E[expert] * part - layer.mean_E[swapped] * swapped_part
        load_RT[busiest] -= less_T
        load_RT[other] += less_T
        mean_R[busiest] -= less
        mean_R[other] += less
        even_R[busiest] -= part - swapped_part
        even_R[other] += part - swapped_part
        bins[busiest][mine], bins[other][theirs] = swapped, expert
        settled.clear()
        score -= gain / layer.used
        swaps += 1
    return score


def find_homes_twin(bins: list[list[int]]) -> dict[int, list[int]]:
    """`find_homes`: the ranks of each expert, ascending."""
    homes: dict[int, list[int]] = {}
    for rank, experts in enumerate(bins):
        for expert in experts:
            if expert >= 0:
                homes.setdefault(expert, []).append(rank)
    return homes


def plan_layers_twin(
    windows_TLE: FloatArray, live_LP: IntArray, promised_L: FloatArray, rules: Rules
) -> tuple[list[list[int] | None], list[float], list[bool], list[float]]:
    """`plan_layers`: the planned row (None: not due), gain, whether it is astray, and the promise of each layer."""
    rows: list[list[int] | None] = []
    gains, astray, ratios = [], [], []
    num_windows, num_layers, num_experts = windows_TLE.shape
    matrix = num_windows * rules.num_ranks > 4 * num_experts
    for index in range(num_layers):
        rows.append(None)
        gains.append(0.0)
        astray.append(False)
        ratios.append(float(promised_L[index]))
        layer = LayerTwin(windows_TLE[:, index], rules)
        if not layer.used:
            continue
        live = live_LP[index].reshape(rules.num_ranks, -1).tolist()
        homes = find_homes_twin(live)
        live_count_E = np.array([len(homes[expert]) for expert in range(num_experts)])
        live_par = layer.score(layer.loads(live, live_count_E))
        doubled = promised_L[index] == 1 and any(len(set(ranks)) < len(ranks) for ranks in homes.values())
        ratio = 1 / max(1.0, live_par - rules.allowance * layer.noise / np.sqrt(layer.used))
        promised = promised_L[index]
        due = ratio < -promised * RETRY if promised < 0 else ratio < max(rules.ratio * promised, rules.below)
        if not doubled and not due:
            continue
        worth = np.inf if doubled or rules.least_gain == 0 else live_par * (1 - rules.least_gain)
        found, order, count_E = search_twin(layer, matrix, worth)
        if layer.used > 1:
            ratios[-1] = -ratio
        if found >= worth:
            continue
        bins, par = live, live_par
        for within in (rules.stay_within, NO_HOMES):
            bins, mean_R, met = deal_twin(layer, matrix, order, count_E, homes, within)
            if met:
                row_P = np.array(bins, dtype=np.int32).reshape(-1)
                separate_twin(row_P, layer.mean_E[row_P] / count_E[row_P], mean_R)
                bins = row_P.reshape(rules.num_ranks, -1).tolist()
            load_RT = layer.loads(bins, count_E)
            par = layer.score(load_RT)
            if within > NO_HOMES and par > found * HOPELESS:
                continue
            par = swap_experts_twin(layer, bins, load_RT, mean_R, count_E, par)
            astray[-1] = within == NO_HOMES
            if par <= found * WORSE_THAN_FOUND:
                break
        gain = 1 - par / live_par
        if doubled or gain > rules.least_gain:
            gains[-1] = np.inf if doubled else gain
            ratios[-1] = 1 / par
        rows[-1] = [expert for experts in bins for expert in experts]
    return rows, gains, astray, ratios


def replan_twin(
    windows_TLE: FloatArray,
    live_LP: IntArray,
    promised_L: FloatArray,
    planned_L: NDArray[np.int64],
    rules: Rules,
    most_layers: int,
) -> tuple[IntArray, FloatArray, NDArray[np.int64]]:
    """`replan`, all changed layers at once."""
    print_L = np.array([fingerprint_twin(row) for row in live_LP.tolist()])
    holds_L = np.where((planned_L == print_L) & (promised_L != 0) & (abs(promised_L) <= 1), promised_L, 1.0)
    rows, gains, astray, ratios = plan_layers_twin(windows_TLE, live_LP, holds_L, rules)
    order = np.argsort(-np.array(gains), kind="stable")
    chosen = [int(layer) for layer in order if gains[layer] > 0][: most_layers or None]
    placement_LP = live_LP.copy()
    holds_L = np.where(np.array(gains) == 0, ratios, holds_L)
    for layer in chosen:
        row_LP, live_row_LP = np.array([rows[layer]], dtype=np.int32), live_LP[layer : layer + 1]
        if astray[layer]:
            row_LP = match_ranks(row_LP, live_row_LP, windows_TLE.shape[2], rules.slots_per_rank, 1)
        placement_LP[layer] = keep_slots_twin(row_LP, live_row_LP, rules.slots_per_rank)[0]
        holds_L[layer], print_L[layer] = ratios[layer], fingerprint_twin(placement_LP[layer].tolist())
    return placement_LP, holds_L, print_L


def fingerprint_twin(row_P: list[int]) -> int:
    """`fingerprints`, of one row, with Python's integers."""
    number = 0
    for expert in reversed(row_P):
        number = number * (2**40 + 15) + expert + 1
    return (number + 2**63) % 2**64 - 2**63

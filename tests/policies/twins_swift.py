"""Plain twins of the loops of `swift_balancer`, written the obvious way: nothing is kept that can be worked out again."""

from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._swift_layer import Rules

__all__ = ["Plain", "plan_layer_twin", "plan_layers_twin"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]


@dataclass
class Plain:
    """One layer while it is planned; `sources` are the ranks from which the experts of slots come, where they are new."""

    load: list[float]
    live: list[int]
    ranks: int
    rules: Rules
    row: list[int]
    pending: list[int] = field(default_factory=list)
    sources: dict[int, int] = field(default_factory=dict)

    def slots(self, rank: int) -> range:
        """The slots of a rank."""
        return range(rank * self.rules.slots_per_rank, (rank + 1) * self.rules.slots_per_rank)

    def holds(self, rank: int, expert: int) -> bool:
        """Whether a rank has the expert now."""
        return any(self.row[slot] == expert for slot in self.slots(rank))

    def was_on(self, rank: int, expert: int) -> bool:
        """Whether a rank has the expert in the live placement."""
        return any(self.live[slot] == expert for slot in self.slots(rank))

    def count(self, expert: int) -> int:
        """Replicas, chosen ones included."""
        return self.row.count(expert) + self.pending.count(expert)

    def share(self, expert: int) -> float:
        """Tokens of one replica."""
        return self.load[expert] / self.count(expert)

    def rank_load(self, rank: int) -> float:
        """Tokens of a rank; added in slot order, as the compiled loops do."""
        total = 0.0
        for slot in self.slots(rank):
            total += self.share(self.row[slot]) if self.row[slot] >= 0 else 0.0
        return total

    def peak(self) -> float:
        """Tokens of the heaviest rank."""
        return max(self.rank_load(rank) for rank in range(self.ranks))

    def sent(self, sender: int, rank: int) -> int:
        """Experts that one rank sends to another."""
        return sum(self.sources.get(slot) == sender for slot in self.slots(rank))

    def unit(self, rank: int) -> range:
        """The ranks with which a rank may exchange experts."""
        first = rank // self.rules.ranks_per_unit * self.rules.ranks_per_unit
        return range(first, first + self.rules.ranks_per_unit)

    def sender(self, rank: int, expert: int) -> int | None:
        """The rank that sends an expert: the one that sends least to this rank so far."""
        able = [r for r in self.unit(rank) if self.was_on(r, expert) and self.sent(r, rank) < self.rules.most_transfers]
        return min(able, key=lambda r: self.sent(r, rank), default=None)

    def fits(self, rank: int, expert: int) -> bool:
        """Whether a rank with a free slot may take an expert."""
        return not self.holds(rank, expert) and (self.was_on(rank, expert) or self.sender(rank, expert) is not None)

    def put(self, slot: int, expert: int) -> None:
        """Fill a free slot."""
        rank = slot // self.rules.slots_per_rank
        source = self.sender(rank, expert)
        self.row[slot] = expert
        if not self.was_on(rank, expert) and source is not None:
            self.sources[slot] = source

    def hottest(self, able: list[int]) -> int | None:
        """The expert with most tokens per replica, then fewest replicas, that may have one more."""
        able = [expert for expert in able if self.count(expert) < self.rules.most_replicas]
        return min(able, key=lambda expert: (-self.share(expert), self.count(expert)), default=None)


def choose_copies_twin(plain: Plain, ranks: range, margin: float) -> list[int]:
    """`_swift_copies.choose_copies`."""
    slots = [slot for rank in ranks for slot in plain.slots(rank)]
    free = sum(plain.row[slot] < 0 for slot in slots)
    local = sorted({plain.live[slot] for slot in slots} - {-1})
    while len(plain.pending) < len(slots):
        inside = [plain.row[slot] for slot in slots] + plain.pending
        hot = plain.hottest([expert for expert in local if inside.count(expert) < len(ranks)])
        if hot is None:
            break
        if not free:
            donors = [e for e in local if plain.count(e) > 1 and any(plain.holds(rank, e) for rank in ranks)]
            donor = min(donors, key=lambda e: plain.load[e] / (plain.count(e) - 1), default=None)
            if donor is None or plain.share(hot) - plain.load[donor] / (plain.count(donor) - 1) <= margin:
                break
            holders = [rank for rank in ranks if plain.holds(rank, donor)]
            rank = min(holders, key=lambda r: (plain.holds(r, hot), -plain.rank_load(r)))
            plain.row[next(slot for slot in plain.slots(rank) if plain.row[slot] == donor)] = -1
        free = max(free - 1, 0)
        plain.pending.append(hot)
    return list(plain.pending)


def place_copies_twin(plain: Plain, ranks: range) -> None:
    """`_swift_copies.place_copies`, of what is pending."""
    while plain.pending:
        expert = max(plain.pending, key=plain.share)
        free = [rank for rank in ranks if -1 in (plain.row[slot] for slot in plain.slots(rank))]
        fit = [rank for rank in free if plain.fits(rank, expert)]
        # all shares as long as the copy is pending; the rank's load is that of what it has
        rank = min(fit, key=plain.rank_load, default=None)
        plain.pending.remove(expert)
        if rank is not None:
            plain.put(next(slot for slot in plain.slots(rank) if plain.row[slot] < 0), expert)


def fill_rest_twin(plain: Plain, ranks: range) -> None:
    """`_swift_copies.fill_rest`."""
    for slot in (slot for rank in ranks for slot in plain.slots(rank)):
        rank, before = slot // plain.rules.slots_per_rank, plain.live[slot]
        if plain.row[slot] >= 0:
            continue
        if before >= 0 and not plain.holds(rank, before) and plain.count(before) < plain.rules.most_replicas:
            plain.put(slot, before)
        elif (best := plain.hottest([e for e in range(len(plain.load)) if plain.fits(rank, e)])) is not None:
            plain.put(slot, best)


def swapped_twin(plain: Plain, slot: int, other: int) -> Plain | None:
    """`_swift_swaps.swap`: the layer after it, or None if it is not allowed."""
    new = Plain(plain.load, plain.live, plain.ranks, plain.rules, list(plain.row), [], dict(plain.sources))
    sources = {}
    for from_slot, to_slot in ((slot, other), (other, slot)):
        expert, rank = plain.row[from_slot], from_slot // plain.rules.slots_per_rank
        target = to_slot // plain.rules.slots_per_rank
        source = plain.sources.get(from_slot, rank)
        if expert < 0 or plain.holds(target, expert):
            return None
        if not plain.was_on(target, expert):
            if plain.sent(source, target) >= plain.rules.most_transfers:
                return None
            sources[to_slot] = source
        new.sources.pop(from_slot, None)
    new.sources |= sources
    new.row[slot], new.row[other] = plain.row[other], plain.row[slot]
    return new


def best_swap_twin(plain: Plain, gain_per_move: float) -> Plain | None:
    """`_swift_swaps.best_swap`: the layer after it, or None if none is worth anything."""
    loads = [plain.rank_load(rank) for rank in range(plain.ranks)]
    heavy = loads.index(max(loads))
    best, most = None, 0.0
    for light in sorted(set(plain.unit(heavy)) - {heavy}, key=lambda rank: (loads[rank], rank)):
        for slot, other in product(plain.slots(heavy), plain.slots(light)):
            if plain.row[slot] < 0 or plain.row[other] < 0:
                continue
            less = plain.share(plain.row[slot]) - plain.share(plain.row[other])
            gain = min(less, loads[heavy] - loads[light] - less)
            if gain > 0 and (new := swapped_twin(plain, slot, other)) is not None:
                worth = gain - gain_per_move * (len(new.sources) - len(plain.sources))
                if worth > most:
                    best, most = new, worth
    return best


def attempt_twin(plain: Plain, mean: float, margin: float) -> tuple[Plain, float, bool]:
    """`_swift._attempt`: the layer, its peak and cost, and whether it is stuck."""
    rules, slot_load = plain.rules, mean / plain.rules.slots_per_rank
    cost = rules.layer_gain * slot_load / len(plain.row)
    for first in range(0, plain.ranks, rules.ranks_per_unit):
        choose_copies_twin(plain, plain.unit(first), margin)
        place_copies_twin(plain, plain.unit(first))
        fill_rest_twin(plain, plain.unit(first))
    steps, stuck = [plain], False
    while len(steps) <= rules.most_swaps and steps[-1].peak() > rules.threshold * mean and not stuck:
        following = best_swap_twin(steps[-1], rules.swap_gain * slot_load)
        stuck = following is None
        steps += [] if following is None else [following]
    best = min(steps, key=lambda step: step.peak() + cost * len(step.sources))
    stuck = stuck and best.peak() > mean + rules.copy_gain * slot_load
    return best, best.peak() + cost * len(best.sources), stuck


def plan_layer_twin(load: list[float], live: list[int], ranks: int, rules: Rules) -> list[int]:
    """`_swift.plan_layer`."""
    per_rank = rules.slots_per_rank
    opened = Plain(load, live, ranks, rules, list(live))
    row, repeats = list(live), False
    for rank in range(ranks):
        experts = [live[slot] for slot in opened.slots(rank) if live[slot] >= 0]
        repeats |= len(experts) - len(set(experts)) > max(per_rank - len(load), 0)
        for slot in opened.slots(rank):
            if live[slot] in live[rank * per_rank : slot]:
                row[slot] = -1
    total = 0.0
    for tokens in load:
        total += tokens
    mean, old_peak = total / ranks, opened.peak()
    if not repeats and old_peak <= rules.threshold * mean:
        return live
    best, score, stuck = attempt_twin(
        Plain(load, live, ranks, rules, list(row)), mean, rules.copy_gain * mean / per_rank
    )
    if stuck and rules.copy_gain > 0:
        again, other_score, _ = attempt_twin(Plain(load, live, ranks, rules, list(row)), mean, 0.0)
        if other_score < score:
            best, score = again, other_score
    return _restored(best) if score < old_peak or repeats else live


def _restored(plain: Plain) -> list[int]:
    """`_swift.restore_slots`."""
    row = list(plain.row)
    for rank in range(plain.ranks):
        for slot, other in product(plain.slots(rank), repeat=2):
            if slot != other and row[other] >= 0 and row[other] == plain.live[slot]:
                row[slot], row[other] = row[other], row[slot]
    return row


def plan_layers_twin(load_LE: FloatArray, live_LP: IntArray, ranks: int, rules: Rules) -> IntArray:
    """`_swift.plan_layers`."""
    rows = zip(load_LE.tolist(), live_LP.tolist(), strict=True)
    return np.array([plan_layer_twin(load, live, ranks, rules) for load, live in rows], dtype=np.int32)

"""A plain twin of the search of `frontier`: the same rules, every sum worked out again from the placement."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._frontier import CLEARS
from eplb_async.policies._frontier_state import (
    COOL_RANKS,
    ENOUGH,
    EVEN,
    LEAST_COST,
    LEAST_FAVOUR,
    LEAST_GAIN,
    MOST_FAVOUR,
    STEEP,
)

__all__ = ["Plain", "comers_of", "complete_row_twin", "harm_of", "journal_twin"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]


@dataclass
class Plain:
    """One layer while it is searched; the fields are those of `search_layers`, for one layer."""

    load_ET: FloatArray
    row_P: IntArray
    live_P: IntArray
    node_E: LongArray
    node_R: LongArray
    most_replicas: int
    waterline: float
    spread: float
    stuck: set[int] = field(default_factory=set)

    @property
    def width(self) -> int:
        """Slots of a rank."""
        return len(self.row_P) // len(self.node_R)

    def slots(self, rank: int) -> range:
        """Of a rank."""
        return range(rank * self.width, (rank + 1) * self.width)

    def count(self) -> LongArray:
        """Replicas of each expert."""
        return np.bincount(self.row_P, minlength=len(self.load_ET))

    def loads(self, row_P: IntArray, count_E: LongArray) -> FloatArray:
        """Load of each rank in each window, [R, T], were the experts split over so many replicas."""
        slot_PT = self.load_ET[row_P] / count_E[row_P, None]
        return np.asarray(slot_PT.reshape(len(self.node_R), self.width, -1).sum(axis=1))

    def above(self, row_P: IntArray, count_E: LongArray | None = None) -> FloatArray:
        """Potential of each rank, [R]."""
        if count_E is None:
            count_E = np.bincount(row_P, minlength=len(self.load_ET))
        load_RT = self.loads(row_P, count_E)
        over_RT = np.maximum(load_RT - self.waterline, 0.0)
        return np.asarray((over_RT * (STEEP + over_RT) + EVEN * (load_RT - 1.0) ** 2).sum(axis=1))

    def par(self) -> float:
        """Mean over windows of the busiest rank's load."""
        return float(self.loads(self.row_P, self.count()).max(axis=0).mean())

    def holds(self, rank: int, row_P: IntArray) -> set[int]:
        """Experts of a rank."""
        return set(row_P[rank * self.width : (rank + 1) * self.width].tolist())

    def hosts(self, expert: int) -> NDArray[np.bool_]:
        """Which ranks hold an expert, [R]."""
        return np.asarray((self.row_P.reshape(len(self.node_R), -1) == expert).any(axis=1))

    def moved(self, row_P: IntArray) -> int:
        """Slots whose expert is not on that rank in the live placement."""
        new = [expert not in self.holds(slot // self.width, self.live_P) for slot, expert in enumerate(row_P.tolist())]
        return sum(new)

    def may_hold(self, rank: int, expert: int) -> bool:
        """Whether a rank has not got the expert, and is on its node."""
        return expert not in self.holds(rank, self.row_P) and self.node_E[expert] == self.node_R[rank]

    def after(self, first: int, second: int, expert: int) -> IntArray:
        """The row after a replace (second < 0) or a swap."""
        row_P = self.row_P.copy()
        if second >= 0:
            row_P[second] = row_P[first]
        row_P[first] = expert
        return row_P


def complete_row_twin(
    live_P: IntArray, load_E: FloatArray, node_E: LongArray, node_R: LongArray, most: int
) -> list[int] | None:
    """`_frontier_layers.complete_rows` for one layer; None where it cannot be done."""
    width = len(live_P) // len(node_R)
    row: list[int] = live_P.tolist()
    for slot, expert in enumerate(row):
        rank = slot // width
        if expert in row[rank * width : slot]:
            row[slot] = -1
        elif expert >= 0 and node_E[expert] != node_R[rank]:
            return None
    for slot, held in enumerate(row):
        rank = slot // width
        room = [
            expert
            for expert in range(len(load_E))
            if expert not in row[rank * width : (rank + 1) * width]
            and row.count(expert) < most
            and node_E[expert] == node_R[rank]
        ]
        if held < 0 and not room:
            return None
        if held < 0:
            row[slot] = max(room, key=lambda expert: load_E[expert] / row.count(expert))
    return row


def journal_twin(layer: Plain, price: float, limits: tuple[int, int], bar: float) -> Iterator[tuple[list[int], float]]:
    """`_frontier.search` as `search_layers` calls it: each step as in the journal, and the PAR after it.

    Args:
        layer: where to start; changed.
        price: PAR that a slot filled anew is worth.
        limits: most steps, and steps without a better point that end the search.
        bar: PAR up to which nothing is done.
    """
    most_steps, patience = limits
    started, steps, since, best = layer.moved(layer.row_P), 0, 0, layer.par()
    if best <= bar:
        return
    while steps < most_steps and since < patience:
        moved = layer.moved(layer.row_P) - started
        left_R = [rank for rank in range(len(layer.node_R)) if rank not in layer.stuck]
        if not left_R or best <= 1.0 + price * (moved + 1):
            return
        above_R = layer.above(layer.row_P)
        busiest = max(left_R, key=lambda rank: above_R[rank])
        if layer.loads(layer.row_P, layer.count())[busiest].max() <= layer.waterline:
            return
        slot, expert, second = _best_step(layer, busiest, free=price == 0.0)
        if slot < 0:
            layer.stuck.add(busiest)
            continue
        left = int(layer.row_P[slot])
        layer.row_P = layer.after(slot, second, expert)
        layer.stuck.clear()
        steps, since = steps + 1, since + 1
        moved, par = layer.moved(layer.row_P), layer.par()
        yield [slot, expert, second, left if second >= 0 else -1, moved], par
        if par + price * (moved - started) < best:
            best, since = par + price * (moved - started), 0


def _best_step(layer: Plain, busiest: int, free: bool) -> tuple[int, int, int]:
    """`_frontier._best_step`: slot, its new expert, second slot or -1."""
    swap = slot, expert, second = -1, -1, -1
    if not free:
        slot, expert, rate = _best_replace(layer, busiest, 0.0)
        swap, _ = _best_swap(layer, busiest, rate)
        return (slot, expert, -1) if swap[0] < 0 else swap
    swap, rate = _best_swap(layer, busiest, 0.0)
    if rate < CLEARS * layer.above(layer.row_P)[busiest]:
        slot, expert, _ = _best_replace(layer, busiest, rate)
    return swap if slot < 0 else (slot, expert, second)


def _cost(layer: Plain, row_P: IntArray) -> float:
    return max(1.0 * (layer.moved(row_P) - layer.moved(layer.row_P)), LEAST_COST)


def comers_of(layer: Plain, slot: int) -> dict[int, tuple[float, float, float]]:
    """Of each expert that may come to a slot: the fall, what it counts for per slot filled anew, and the charge of the step.

    The fall is that of the potential, but for ranks below the waterline that hold the expert, and not the one that goes.
    """
    row_P, count_E, now_R = layer.row_P, layer.count(), layer.above(layer.row_P)
    held, split_E = int(row_P[slot]), layer.spread * (layer.load_ET**2).sum(axis=1)
    over_R = layer.loads(row_P, count_E).max(axis=1) > layer.waterline
    merges = split_E[held] * (1 / (count_E[held] - 1) - 1 / count_E[held])
    found = {}
    for expert in range(len(count_E)):
        if count_E[expert] >= layer.most_replicas or not layer.may_hold(slot // layer.width, expert):
            continue
        after_P = layer.after(slot, -1, expert)
        counted_R = over_R | ~layer.hosts(expert) | layer.hosts(held)
        gain, cost = float((now_R - layer.above(after_P))[counted_R].sum()), _cost(layer, after_P)
        splits = split_E[expert] * (1 / count_E[expert] - 1 / (count_E[expert] + 1))
        found[expert] = gain, _favoured(gain, splits - merges) / cost, cost
    return found


def harm_of(layer: Plain, slot: int) -> float:
    """What the other ranks of a slot's expert get more when it goes."""
    row_P, count_E, held = layer.row_P, layer.count(), int(layer.row_P[slot])
    more_R = layer.above(row_P, count_E - (np.arange(len(count_E)) == held)) - layer.above(row_P)
    return float(np.delete(more_R, slot // layer.width).sum())


def _reliefs(layer: Plain) -> FloatArray:
    """What one more replica of each expert takes off those of its ranks that are above the waterline; 0 where it may get none."""
    count_E = layer.count()
    over_R = layer.loads(layer.row_P, count_E).max(axis=1) > layer.waterline
    relief_E = np.zeros(len(count_E))
    for expert in np.flatnonzero(count_E < layer.most_replicas):
        after_R = layer.above(layer.row_P, count_E + (np.arange(len(count_E)) == expert))
        relief_E[expert] = (layer.above(layer.row_P) - after_R)[over_R].sum()
    return relief_E


def _best_replace(layer: Plain, busiest: int, least: float) -> tuple[int, int, float]:
    """`_frontier_steps.best_replace`."""
    row_P, count_E, now_R, relief_E = layer.row_P, layer.count(), layer.above(layer.row_P), _reliefs(layer)
    split_E, here = layer.spread * (layer.load_ET**2).sum(axis=1), sorted(layer.holds(busiest, row_P))
    most_here, most_elsewhere = max(0.0, relief_E[here].max()), max(0.0, 0.0, *np.delete(relief_E, here))
    best_slot, best_expert, best = -1, -1, least
    for slot in [place for rank in (busiest, *_coolest(layer, busiest)[1]) for place in layer.slots(rank)]:
        held, rank = int(row_P[slot]), slot // layer.width
        if count_E[held] < 2:
            continue
        reach = now_R[rank] + (most_elsewhere if rank == busiest else most_here)
        least_cost = 1.0 if held in layer.holds(rank, layer.live_P) else LEAST_COST
        base = now_R[rank] - harm_of(layer, slot)
        if min(reach, reach - now_R[rank] + base) <= max(ENOUGH * best * least_cost / MOST_FAVOUR, LEAST_GAIN):
            continue
        comers = comers_of(layer, slot)
        for expert in comers if rank == busiest else row_P[layer.slots(busiest)].tolist():
            if expert not in comers:
                continue
            gain, rate, cost = comers[expert]
            rough = relief_E[expert] + base
            fewer = split_E[expert] * (1 / count_E[expert] - 1 / (count_E[expert] + 1))
            fewer -= split_E[held] * (1 / (count_E[held] - 1) - 1 / count_E[held])
            # of all experts the best is taken, of those of a rank only what may be so much better before the slot's rank is looked at
            if rank != busiest and (rough <= LEAST_GAIN or _favoured(rough, fewer) <= ENOUGH * best * cost):
                continue
            if gain > LEAST_GAIN and rate > best:
                best_slot, best_expert, best = slot, expert, rate
    return best_slot, best_expert, best


def _coolest(layer: Plain, busiest: int) -> tuple[FloatArray, list[int]]:
    """`_frontier._coolest`."""
    load_RT = layer.loads(layer.row_P, layer.count())
    over_T = np.maximum(load_RT[busiest] - layer.waterline, 0.0)
    slope_T = 2.0 * EVEN * (load_RT[busiest] - 1.0) + np.where(over_T > 0.0, STEEP + 2.0 * over_T, 0.0)
    heat_R = load_RT @ slope_T
    others = sorted((rank for rank in range(len(load_RT)) if rank != busiest), key=lambda rank: heat_R[rank])
    return slope_T, others[:COOL_RANKS]


def _favoured(gain: float, fewer: float) -> float:
    return float(np.clip(gain + fewer, LEAST_FAVOUR * gain, MOST_FAVOUR * gain))


def _best_swap(layer: Plain, busiest: int, least: float) -> tuple[tuple[int, int, int], float]:
    """`_frontier_steps.best_swap`: the step, and its fall per slot."""
    row_P, count_E, now_R = layer.row_P, layer.count(), layer.above(layer.row_P)
    slope_T, cool_C = _coolest(layer, busiest)
    best_step, best = (-1, -1, -1), least
    for rank in cool_C:
        both = now_R[busiest] + now_R[rank]
        for first in layer.slots(busiest):
            for second in layer.slots(rank):
                one, two = int(row_P[first]), int(row_P[second])
                if not layer.may_hold(rank, one) or not layer.may_hold(busiest, two):
                    continue
                leaves = slope_T @ layer.load_ET[one] / count_E[one] - slope_T @ layer.load_ET[two] / count_E[two]
                after_P = layer.after(first, second, two)
                cost = _cost(layer, after_P)
                if min(leaves, both) <= max(ENOUGH * best * cost, LEAST_GAIN):
                    continue
                gain = float((now_R - layer.above(after_P)).sum())
                if gain > LEAST_GAIN and gain > best * cost:
                    best_step, best = (first, two, second), gain / cost
    return best_step, best

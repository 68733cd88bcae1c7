"""What the `frontier` policy found: for each layer, how little PAR can be had for how many moves.

Shape suffixes: N searched layers, L layers, P slots, J steps of a journal.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Frontier", "Journals"]

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Journals:
    """Searches of some layers from one kind of start: which layers, where they started, and each step.

    Fields:
        layers: indices of the layers, [N].
        start_LP: the complete rows they started from, int32 [N, P].
        moved_L: slots filled anew at the start, against the live placement, [N].
        journal_LJ5: slot, its new expert, second slot or -1, its new expert, slots filled anew so far; int32 [N, J, 5].
        par_LJ: PAR at the start and after each step, [N, J + 1].
        steps_L: number of steps, [N].
    """

    layers: LongArray
    start_LP: IntArray
    moved_L: LongArray
    journal_LJ5: IntArray
    par_LJ: FloatArray
    steps_L: LongArray

    def cheapest(self, price: float) -> tuple[LongArray, FloatArray, LongArray]:
        """Steps, PAR + price * moves, and moves of the best point of each layer, for a price per slot."""
        from eplb_async.policies import _frontier_layers

        found = _frontier_layers.cheapest(self.journal_LJ5, self.par_LJ, self.steps_L, self.moved_L, price)
        return found[0], found[1], found[2]

    def points(self, row: int) -> list[tuple[int, float]]:
        """Slots filled anew and PAR at the start and after each step of one of the layers."""
        steps = int(self.steps_L[row])
        moved = [int(self.moved_L[row]), *self.journal_LJ5[row, :steps, 4].tolist()]
        return list(zip(moved, self.par_LJ[row, : steps + 1].tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What can be had for how many moves, in each layer.

    Fields:
        live_LP: the live placement.
        slots_per_rank: S.
        repair: searches from the live placement, of all layers that have one.
        fresh: searches from scratch, of the layers for which one was tried.
    """

    live_LP: IntArray
    slots_per_rank: int
    repair: Journals
    fresh: Journals

    def points(self, layer: int) -> list[tuple[int, float]]:
        """The frontier of a layer: slots filled anew and the least PAR for at most so many, ascending; no point is useless."""
        reached: list[tuple[int, float]] = []
        for journals in (self.repair, self.fresh):
            for row in np.flatnonzero(journals.layers == layer):
                reached += journals.points(int(row))
        frontier: list[tuple[int, float]] = []
        for moved, par in sorted(reached):
            if not frontier or par < frontier[-1][1]:
                frontier.append((moved, par))
        return frontier

    def placement(self, price: float) -> IntArray:
        """The placement with least PAR + price * (share of slots filled anew) in each layer. int32 [L, P]."""
        from eplb_async.policies import _frontier_layers, _matching

        chosen_LP = self.live_LP.copy()
        for journals, better_N, steps_N, _ in self._chosen(price):
            rows = _frontier_layers.rows_at(journals.start_LP, journals.journal_LJ5, steps_N)
            chosen_LP[journals.layers[better_N]] = rows[better_N]
        kept: IntArray = _matching.keep_slots(chosen_LP, self.live_LP, self.slots_per_rank)
        return kept

    def moved(self, price: float) -> int:
        """Slots that `placement(price)` fills anew, over all layers; never more for a higher price."""
        moved_L = np.zeros(len(self.live_LP), dtype=np.int64)
        for journals, better_N, _, moved_N in self._chosen(price):
            moved_L[journals.layers[better_N]] = moved_N[better_N]
        return int(moved_L.sum())

    def _chosen(self, price: float) -> Iterator[tuple[Journals, NDArray[np.bool_], LongArray, LongArray]]:
        """Each search in turn, with the layers where it beats the one before, and for each layer its best point's steps and moves."""
        best_L = np.full(len(self.live_LP), np.inf)
        for journals in (self.repair, self.fresh):
            steps_N, score_N, moved_N = journals.cheapest(price / self.live_LP.shape[1])
            better_N = score_N < best_L[journals.layers]
            best_L[journals.layers[better_N]] = score_N[better_N]
            yield journals, better_N, steps_N, moved_N

    def price_within(self, most_moved: int, least: float) -> float:
        """The lowest price, but at least `least`, whose placement fills no more slots anew than that, or as few as can be."""
        if self.moved(least) <= most_moved:
            return least
        low, high = least, max(2 * least, 1e-3)
        for _ in range(40):
            if self.moved(high) <= most_moved:
                break
            low, high = high, 2 * high
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if self.moved(middle) <= most_moved else (middle, high)
        return high

"""How long steps usually take: by those of the same phase, of about as many tokens, that ran without transfers.

Only such steps are remembered, so that transfers that make steps slow never become the usual. A median stands odd steps; what lasts is the
usual after some eight of them.

    decode, 100 tokens: 10.0, 10.2, 31, 9.9 ms; 900 tokens: 14 ms        usual of 110 tokens: 10.1 ms, scatter 0.15
"""

from collections import deque
from collections.abc import Callable
from statistics import median

from eplb_async.core.load import Phase

__all__ = ["UsualSteps"]

KEPT = 64
"""Steps remembered of each phase."""
COMPARED, LEAST = 15, 4
"""Newest steps like one that it is compared with, and how many there have to be."""
NEAR = 1.5
"""Factor between the tokens of two steps that are alike: batches of decode steps change by a few, those of prompts are cut to a size."""


class UsualSteps:
    """Steps without transfers, by phase.

    Attributes:
        add: by phase, to be called with (tokens, microseconds) when a step without transfers has ended; it happens at every step of a
            rank, so the caller has the bound method at hand.
    """

    def __init__(self) -> None:
        self._kept: dict[Phase, deque[tuple[int, int]]] = {phase: deque(maxlen=KEPT) for phase in Phase}
        self.add: dict[Phase, Callable[[tuple[int, int]], None]] = {
            phase: kept.append for phase, kept in self._kept.items()
        }

    def of(self, phase: Phase, tokens: int) -> tuple[float, float] | None:
        """Median and scatter (median distance from it) of steps like this one, microseconds; None as long as there are too few."""
        like: list[int] = []
        least, most = tokens / NEAR, tokens * NEAR
        for other, took_us in reversed(self._kept[phase]):
            if least <= other <= most:
                like.append(took_us)
                if len(like) == COMPARED:
                    break
        if len(like) < LEAST:
            return None
        usual = median(like)
        return usual, median(abs(took_us - usual) for took_us in like)

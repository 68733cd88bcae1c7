"""Plans as ranks hold them, and a transfer whose pulls and commits end when the test says so."""

from collections.abc import Sequence

import numpy as np
import torch

from eplb_async.core.spec import MoESpec
from eplb_async.rank.plan_reader import PreparedEntry, PreparedPlan, Snapshot
from eplb_async.rank.streams import Completion, HostStream
from eplb_async.rank.transfer.base import Copy, Pull, Transfer
from eplb_async.rank.weights import WeightRows

__all__ = ["ROW_BYTES", "HeldTransfer", "held_transfer", "prepared"]

SPEC = MoESpec(num_layers=2, num_experts=4, num_ranks=1)
ROW_BYTES = 8


class HeldTransfer(Transfer):
    """Nothing is copied; `pulls` and `commits` are what was asked for, with the completions to end."""

    name = "held"

    def __init__(self, weights: WeightRows, num_rows: int) -> None:
        super().__init__(weights, num_rows)
        self.stream = HostStream("held")
        self.pulls: list[tuple[int, Pull, int, Completion[None]]] = []
        self.commits: list[tuple[int, list[tuple[int, int]], Completion[None]]] = []

    def export(self) -> bytes:
        """See Transfer."""
        return b""

    def connect(self, rank: int, exported: bytes) -> None:
        """See Transfer."""

    def pull(self, layer: int, pull: Pull, row: int, fingerprints: Sequence[int] | None) -> Completion[None]:
        """See Transfer."""
        self.pulls.append((layer, pull, row, Completion()))
        return self.pulls[-1][-1]

    def flush(self) -> None:
        """See Transfer."""

    def commit(self, layer: int, rows: Sequence[tuple[int, int]], more: Sequence[Copy]) -> Completion[None]:
        """See Transfer."""
        self.commits.append((layer, list(rows), Completion()))
        return self.commits[-1][-1]

    def end_pulls(self, error: Exception | None = None) -> None:
        """All pulls so far end."""
        for *_, completion in self.pulls:
            completion.error = completion.error or error
            completion.done = True

    def close(self) -> None:
        """See Transfer."""
        self.stream.close()


def held_transfer(num_rows: int) -> HeldTransfer:
    """For rows of 8 bytes in 4 slots."""
    weights = WeightRows([torch.zeros(4, ROW_BYTES, dtype=torch.uint8)] * SPEC.num_layers, SPEC)
    return HeldTransfer(weights, num_rows)


def prepared(*entries: tuple[int, int], generation: int = 1) -> PreparedPlan:
    """A plan of (layer, number of pulls) each; version bases are not looked at."""
    made: list[PreparedEntry] = []
    for position, (layer, num_pulls) in enumerate(entries, start=1):
        before = [entry.position for entry in made if entry.layer == layer]
        row_P = np.roll(np.arange(4, dtype=np.int32), position)
        row = torch.from_numpy(row_P.astype(np.int64))
        pulls = tuple(Pull(slot, 0, slot, slot) for slot in range(num_pulls))
        table, count = row.argsort()[:, None], torch.ones(4, dtype=torch.int64)
        made.append(PreparedEntry(layer, position, before[-1] if before else 0, row_P, row, table, count, pulls))
    snapshot = Snapshot(np.zeros((2, 4), dtype=np.int32), (0, 0))
    return PreparedPlan(generation, 5, tuple(made), snapshot)

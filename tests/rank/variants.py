"""Traced ranks with one rule of the agreement left out each, for tests that must notice it."""

import dataclasses
from typing import Any

from eplb_async.rank.agreement import Agreement, Decision
from eplb_async.rank.assembly import Parts
from eplb_async.rank.exchange import SharedMemoryExchange
from eplb_async.rank.plan_reader import PlanReader, PreparedEntry, PreparedPlan, Snapshot
from eplb_async.rank.stager import Stager
from eplb_async.shm.words import AgreementWords, Reduced
from tests.rank.tracing import TracedAgreement, TracedHook

__all__ = [
    "CountersAtIssue",
    "DropAtOnce",
    "NewestWords",
    "NoBase",
    "NoDigest",
    "NoDrain",
    "OtherPlan",
    "RowsAtIssue",
    "SameLayerEarly",
]


class _DropAtOnce(TracedAgreement):
    def decide(self, words: Reduced) -> Decision:
        return super().decide(words._replace(error=max(words.error, self.error)))


class DropAtOnce(TracedHook):
    """Its own error is enough to drop a plan."""

    agreement_class = _DropAtOnce


class _NoDrain(TracedAgreement):
    def settle(self, busy: bool) -> None:
        super().settle(busy=False)


class NoDrain(TracedHook):
    """`committed` passes a dropped plan although pulls for it still run."""

    agreement_class = _NoDrain


class _NoDigest(TracedAgreement):
    def decide(self, words: Reduced) -> Decision:
        return super().decide(words._replace(greatest_digest=words.least_digest))


class _OtherReader(PlanReader):
    """Finds the entries of every plan in reverse order, under another digest, as if its board held another plan."""

    def _prepare(self, snapshot: Snapshot) -> Any:
        found = super()._prepare(snapshot)
        if not isinstance(found, PreparedPlan):
            return found
        turned = [
            dataclasses.replace(entry, position=position)
            for position, entry in enumerate(reversed(found.entries), start=1)
        ]
        return dataclasses.replace(found, digest=found.digest ^ 1, entries=tuple(turned))


class OtherPlan(TracedHook):
    """The protocol as it is, but ranks other than 0 read another plan of the same generation."""

    def __init__(self, parts: Parts) -> None:
        if parts.rank:
            parts.reader.__class__ = _OtherReader
        super().__init__(parts)


class NoDigest(OtherPlan):
    """The same, and nobody compares digests."""

    agreement_class = _NoDigest


class _NewestExchange(SharedMemoryExchange):
    def collect(self, step: int) -> Reduced:
        super().collect(step)
        words: AgreementWords = self._words
        found = [word for word in map(words.newest, range(words.num_ranks)) if word is not None]
        digests = [word.digest for word in found]
        return Reduced(
            min(word.staged for word in found),
            min(word.committed for word in found),
            max(word.error for word in found),
            min(digests),
            max(digests),
        )


class NewestWords(TracedHook):
    """Decides on the newest words of all ranks."""

    def __init__(self, parts: Parts) -> None:
        parts.exchange.__class__ = _NewestExchange
        super().__init__(parts)


class _StagedAtIssue(Stager):
    def poll(self) -> tuple[int, Exception | None]:
        for incoming in self._incoming:
            incoming.copies.clear()
        return super().poll()


class CountersAtIssue(TracedHook):
    """`staged` counts copies that were issued."""

    def __init__(self, parts: Parts) -> None:
        parts.stager.__class__ = _StagedAtIssue
        super().__init__(parts)


class _OwnCommitted(Stager):
    own: Agreement

    def issue(self, all_committed: int, budget_bytes: int | None = None) -> int:
        return super().issue(max(all_committed, self.own.committed), budget_bytes)


class SameLayerEarly(TracedHook):
    """The second entry of a layer waits for the own commit only."""

    def __init__(self, parts: Parts) -> None:
        parts.stager.__class__ = _OwnCommitted
        super().__init__(parts)
        vars(parts.stager)["own"] = self._agreement


class _RowsAtIssue(Stager):
    def take(self, position: int) -> list[tuple[int, int]]:
        rows = super().take(position)
        self._free += self._staged[position].rows
        self._staged[position].rows = []
        return rows


class RowsAtIssue(TracedHook):
    """Staging rows are free as soon as their commit is issued."""

    def __init__(self, parts: Parts) -> None:
        parts.stager.__class__ = _RowsAtIssue
        super().__init__(parts)


class _NoBaseReader(PlanReader):
    """Takes an entry's own word for what the layer held before."""

    def _entries(self, plan: Any, snapshot: Snapshot) -> tuple[PreparedEntry, ...]:
        seen: dict[int, int] = {}
        entries = []
        for position, entry in enumerate(plan.entries, start=1):
            entries.append(self._entry(entry, position, seen.get(entry.layer, 0)))
            seen[entry.layer] = position
        return tuple(entries)


class NoBase(TracedHook):
    """A plan is taken whatever maps it starts from."""

    def __init__(self, parts: Parts) -> None:
        parts.reader.__class__ = _NoBaseReader
        super().__init__(parts)

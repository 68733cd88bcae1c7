"""Held-out text of eight domains, and a stream of byte batches whose domain changes.

A `Stream` is a pure function of (step, rank): every rank, and the unsharded reference, can make any batch of it alone.
Steps run through a list of domains, `steps_per_domain` each; inside a domain, windows of `length` bytes follow one
another through its text, one window for each (step, rank, row), and wrap around at the end.

    2 ranks, batch 1: step 0 reads windows 0 (rank 0) and 1 (rank 1), step 1 windows 2 and 3, ...
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_async.core.errors import SpecError, UnknownName

__all__ = ["DOMAINS", "Stream", "load_domain"]

DOMAINS = ("python", "english", "web", "german", "russian", "arabic", "chinese", "japanese")
"""Names of the domains, each a file `text/<domain>.txt`; sources and licences in `text/SOURCES.md`."""


def load_domain(domain: str) -> NDArray[np.uint8]:
    """The held-out bytes (UTF-8) of a domain; about 24 KB, never trained on.

    Raises:
        UnknownName: no such domain.
    """
    if domain not in DOMAINS:
        raise UnknownName("domain", domain, DOMAINS)
    return np.frombuffer((resources.files("eplb_async.demo") / "text" / f"{domain}.txt").read_bytes(), dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Byte batches for `num_ranks` ranks over `num_steps` steps, the same on every machine.

    Attributes:
        domains: their order; a name may come back.
        steps_per_domain: steps before the domain changes.
        num_ranks: R; each rank reads its own windows.
        batch: B, sequences per rank and step.
        length: T, bytes per sequence.
    """

    domains: Sequence[str] = DOMAINS
    steps_per_domain: int = 32
    num_ranks: int = 4
    batch: int = 2
    length: int = 128

    def __post_init__(self) -> None:
        for name in ("steps_per_domain", "num_ranks", "batch", "length"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} of a stream is {getattr(self, name)}; it must be at least 1")
        object.__setattr__(self, "_text", {domain: load_domain(domain) for domain in self.domains})
        shortest = min((text.size for text in self._texts.values()), default=0)
        if self.length > shortest:
            raise SpecError(f"a stream of {self.length} bytes per sequence over {shortest} bytes of text")

    @property
    def num_steps(self) -> int:
        """Steps until the last domain ends."""
        return len(self.domains) * self.steps_per_domain

    def domain(self, step: int) -> str:
        """Which domain a step reads."""
        return self.domains[self._visit(step)]

    def tokens(self, step: int, rank: int) -> torch.Tensor:
        """The batch of one rank at one step: int64 [B, T].

        Raises:
            SpecError: a step or rank outside the stream.
        """
        if not 0 <= rank < self.num_ranks:
            raise SpecError(f"rank {rank} of a stream for {self.num_ranks} ranks")
        visit = self._visit(step)
        text = self._texts[self.domains[visit]]
        # a domain that comes back goes on where it left off
        earlier = sum(self.domains[other] == self.domains[visit] for other in range(visit))
        step_of_domain = earlier * self.steps_per_domain + step % self.steps_per_domain
        first = (step_of_domain * self.num_ranks + rank) * self.batch
        starts = (first + np.arange(self.batch)) % (text.size // self.length) * self.length
        return torch.from_numpy(text[starts[:, None] + np.arange(self.length)].astype(np.int64))

    def steps(self, rank: int) -> Iterator[torch.Tensor]:
        """All batches of one rank, in order."""
        for step in range(self.num_steps):
            yield self.tokens(step, rank)

    @property
    def _texts(self) -> dict[str, NDArray[np.uint8]]:
        texts: dict[str, NDArray[np.uint8]] = self.__dict__["_text"]
        return texts

    def _visit(self, step: int) -> int:
        if not 0 <= step < self.num_steps:
            raise SpecError(f"step {step} of a stream of {self.num_steps} steps")
        return step // self.steps_per_domain

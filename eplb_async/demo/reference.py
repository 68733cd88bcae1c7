"""The same model and stream without sharding, in one process: what serving with expert parallelism must reproduce.

Each rank's batch is a forward of its own, of the shape that the rank will run, since the dense parts of the model may
round differently for another batch (see demo/model.py). Compare results of processes with equal torch thread counts.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_async.demo.model import LocalExperts, MoEModel
from eplb_async.demo.text import Stream

__all__ = ["Reference", "logits_digest", "next_tokens", "run_reference"]


@dataclass(frozen=True)
class Reference:
    """Results of a whole stream.

    Attributes:
        next_tokens: the likeliest next byte at every position, uint8 [steps, R, B, T].
        digests: `logits_digest` of every forward, by (step, rank); equal digests mean equal bits.
        load_TLE: tokens per logical expert in every step, summed over ranks, int64 [steps, L, E].
    """

    next_tokens: NDArray[np.uint8]
    digests: tuple[tuple[str, ...], ...]
    load_TLE: NDArray[np.int64]


def run_reference(model: MoEModel, stream: Stream, progress: Callable[[int], None] | None = None) -> Reference:
    """Run every rank's batch of every step through all experts in this process.

    Args:
        model: loaded weights.
        stream: what the ranks will read.
        progress: called with the number of finished steps.
    """
    shape = model.shape
    tokens = np.empty((stream.num_steps, stream.num_ranks, stream.batch, stream.length), dtype=np.uint8)
    load_TLE = np.empty((stream.num_steps, shape.num_layers, shape.num_experts), dtype=np.int64)
    digests = []
    experts = LocalExperts(model)
    with torch.inference_mode():
        for step in range(stream.num_steps):
            experts.load_LE.zero_()
            of_step = []
            for rank in range(stream.num_ranks):
                logits_BTV = model(stream.tokens(step, rank), experts)
                tokens[step, rank] = next_tokens(logits_BTV).numpy()
                of_step.append(logits_digest(logits_BTV))
            digests.append(tuple(of_step))
            load_TLE[step] = experts.load_LE.numpy()
            if progress is not None:
                progress(step + 1)
    return Reference(next_tokens=tokens, digests=tuple(digests), load_TLE=load_TLE)


def next_tokens(logits_BTV: torch.Tensor) -> torch.Tensor:
    """The likeliest next byte at every position, uint8 [B, T]; of equal ones the smallest."""
    # numpy's argmax promises the first of equal values, torch's promises nothing
    return torch.from_numpy(logits_BTV.numpy().argmax(axis=-1).astype(np.uint8))


def logits_digest(logits_BTV: torch.Tensor) -> str:
    """16 hex digits of the bits of a forward's logits."""
    return hashlib.blake2b(logits_BTV.contiguous().numpy().tobytes(), digest_size=8).hexdigest()

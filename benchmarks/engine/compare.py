"""Are the outputs of two runs the same, bit for bit?

    python -m benchmarks.engine.compare OUT/static OUT/ours

Compares the digests that each rank chained over its steps: next tokens, and a checksum of the last hidden state. Exits with 1
and names the first step that differs, and whether its routing already did.
"""

from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

__all__ = ["Difference", "first_difference", "main"]


class Difference(NamedTuple):
    """Where two runs part: `what` is "outputs", "routing", or "number of steps"."""

    rank: int
    step: int
    what: str


def first_difference(first: Path, second: Path) -> Difference | None:
    """The earliest step in which any rank's digests differ; None if all are equal.

    Raises:
        FileNotFoundError: a directory holds no run, or one of another number of ranks.
    """
    names = {path.name for path in first.glob("rank*.digests.txt")}
    if not names or names != {path.name for path in second.glob("rank*.digests.txt")}:
        raise FileNotFoundError(f"{first} and {second} are not two runs of the same number of ranks")
    found: list[Difference] = []
    for name in sorted(names):
        rank = int(name.removeprefix("rank").partition(".")[0])
        ours, theirs = ((folder / name).read_text(encoding="ascii").split() for folder in (first, second))
        shorter = min(len(ours), len(theirs))
        step = next((step for step in range(shorter) if ours[step] != theirs[step]), None)
        if step is not None:
            found.append(Difference(rank, step, "outputs" if _same_ids(first, second, rank, step) else "routing"))
        elif len(ours) != len(theirs):
            found.append(Difference(rank, shorter, "number of steps"))
    return min(found, key=lambda difference: (difference.step, difference.rank), default=None)


def _same_ids(first: Path, second: Path, rank: int, step: int) -> bool:
    ids = []
    for folder in (first, second):
        with np.load(folder / f"rank{rank}.npz") as file:
            ids.append(file["ids_T"][: step + 1])
    return bool(np.array_equal(*ids))


def main(
    first: Annotated[Path, typer.Argument(help="Directory of a mode's files.")],
    second: Annotated[Path, typer.Argument(help="Directory of another's.")],
) -> None:
    """Compare, say so, and exit with 1 if they differ."""
    difference = first_difference(first, second)
    if difference is None:
        steps = len((first / "rank0.digests.txt").read_text(encoding="ascii").split())
        print(f"equal: all outputs of {steps} steps, bit for bit")
        return
    print(f"different from step {difference.step} on (rank {difference.rank}: {difference.what})")
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

"""Several ranks in one process: a call on each at once, as what they do together returns on none before all came."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["together"]

Result = TypeVar("Result")


def together(num_ranks: int, what: Callable[[int], Result]) -> list[Result]:
    """What each rank's call returned; raises what the first of them raised."""
    with ThreadPoolExecutor(num_ranks) as threads:
        return list(threads.map(what, range(num_ranks)))

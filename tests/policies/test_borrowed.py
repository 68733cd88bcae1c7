"""Borrowed arrays are the owner's memory without being counted, and the owner is there until it is no longer kept."""

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from eplb_async.policies._borrowed import borrowed, keep


class Pair(NamedTuple):
    """An array and a number, like the states that are borrowed."""

    values: NDArray[np.float64]
    number: float


@numba.njit(error_model="numpy")
def copy_of(pair: Pair) -> Pair:
    """What `borrowed` gives, for a look at it from outside."""
    copy: Pair = borrowed(pair)
    return copy


@numba.njit(error_model="numpy")
def sum_while_others_allocate(size: int) -> float:
    """Write to borrowed memory, while arrays of the same size come and go, and sum what the owner has then."""
    owner = Pair(np.zeros(size), 2.0)
    pair: Pair = borrowed(owner)
    for place in range(size):
        other = np.full(size, np.nan)
        pair.values[place] += pair.number + 0.0 * other.shape[0]
    total = float(pair.values.sum())
    keep(owner)
    return total


def test_borrowed_arrays_have_no_owner() -> None:
    """The same memory, shape and numbers; nothing that numba could count."""
    values = np.arange(4.0)
    found: Any = copy_of(Pair(values, 0.5))
    assert (found.values.tolist(), found.number) == (values.tolist(), 0.5)
    assert np.shares_memory(found.values, values)
    assert found.values.base is None
    assert not found.values.flags.owndata


def test_owners_are_there_until_they_are_no_longer_kept() -> None:
    """What is written to borrowed memory is what the owner has, whatever else is allocated in between."""
    assert [sum_while_others_allocate(size) for size in (10, 1000)] == [20.0, 2000.0]

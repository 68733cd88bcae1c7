"""Arrays whose references numba does not count, for loops that hand many arrays to functions that are called often.

numba counts the references of each array in a tuple whenever a function gets it, with atomic instructions: a search that hands 25 arrays
through three calls for each step spent a sixth to a quarter of its time on that. An array without an owner is not counted. Its memory must then be
kept by somebody else:

    owner = make_state(...)
    search(borrowed(owner))
    keep(owner)      # numba lets go of a variable after its last use, and that must not be the line before

Nothing that is borrowed may be returned or kept for longer than that.
"""

from typing import Any

import numba
from numba.extending import intrinsic, overload

from eplb_async.policies._kernels import CACHE

__all__ = ["borrowed", "keep"]


def borrowed(owner: Any) -> Any:
    """A tuple's copy whose arrays have no owner, to be used in compiled code while the tuple itself is there; in Python the tuple."""
    return owner


@numba.njit(error_model="numpy", cache=CACHE)
def keep(owner: Any) -> int:
    """Does nothing: what it is called with has been there until then."""
    return len(owner)


@overload(borrowed)
def _borrowed_when_compiled(owner: Any) -> Any:
    # annotated alike: numba compares the two signatures
    def compiled(owner: Any) -> Any:
        return _without_owner(owner)  # type: ignore[call-arg]

    return compiled


@intrinsic
def _without_owner(typing_context: Any, owner: Any) -> Any:
    """See `borrowed`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        copy = arguments[0]
        for index, kind in enumerate(signature.return_type.types):
            if not isinstance(kind, numba.types.Array):
                continue
            array = context.make_array(kind)(context, builder, value=builder.extract_value(copy, index))
            array.meminfo = array.meminfo.type(None)
            array.parent = array.parent.type(None)
            copy = builder.insert_value(copy, array._getvalue(), index)
        return copy

    return owner(owner), generate

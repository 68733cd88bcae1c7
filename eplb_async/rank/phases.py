"""The phase of a step, by its name or as it is."""

from eplb_async.core.errors import UnknownName
from eplb_async.core.load import Phase

__all__ = ["phase_of"]

_PHASES = {phase.value: phase for phase in Phase}


def phase_of(phase: str | Phase) -> Phase:
    """The phase.

    Raises:
        UnknownName: no such phase; names all.
    """
    found = _PHASES.get(phase) if isinstance(phase, str) else phase
    if found is None:
        raise UnknownName("phase", str(phase), _PHASES)
    return found

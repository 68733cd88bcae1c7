"""vLLM balances with us: `pip install eplb-async`, `--enable-eplb`, nothing else.

vLLM loads this in each of its processes (entry point group vllm.general_plugins). In those that import its EplbState, a subclass takes
the place of the class. Its instances attach to our group when a model is added, on all ranks or on none; see vllm_state.py.

If anything does not fit, a warning says what, and vLLM's own EPLB stays: all of it, or nothing of it.
"""

import sys
from types import ModuleType

from eplb_async.integrations.registration import misfit, register_once
from eplb_async.integrations.vllm_surface import VLLM, expectations

__all__ = ["register"]

STATE_MODULE = "vllm.distributed.eplb.eplb_state"


def register() -> None:
    """The entry point; see `register_once`."""
    register_once(VLLM, STATE_MODULE, _replace)


def _replace(module: ModuleType) -> None:
    """Put our class where vLLM's is, in its own module and wherever its name has been imported from there."""
    if why := misfit(VLLM, expectations()):
        VLLM.stays(why)
        return
    from eplb_async.integrations.vllm_state import state_class

    theirs = module.EplbState
    ours = state_class(theirs)
    for other in list(sys.modules.values()):
        if getattr(other, "__dict__", {}).get("EplbState") is theirs:
            setattr(other, "EplbState", ours)  # noqa: B010
    VLLM.taken()

"""SGLang balances with us: `pip install eplb-async`, `--enable-eplb`, nothing else.

SGLang loads this in each of its processes (entry point group sglang.srt.plugins). In those that import its ModelRunner, a subclass takes the
place of EPLBManager, through SGLang's own HookRegistry; see sglang_balancer.py. Three more hooks tell it what it must know: a model is
loaded, a forward begins, weights are about to be replaced.

If anything does not fit, a warning says what, and SGLang's own EPLB stays: all of it, or nothing of it.

This was checked against the sources of SGLang 0.5.23 and run with stand-ins on CPUs. It has not been run on GPUs.
"""

from collections import defaultdict
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

from eplb_async.integrations.registration import misfit, register_once
from eplb_async.integrations.sglang_surface import SGLANG, WEIGHT_CHANGES, expectations

__all__ = ["register"]

RUNNER_MODULE = "sglang.srt.model_executor.model_runner"
RUNNER = f"{RUNNER_MODULE}.ModelRunner"
BALANCER = "sglang.srt.eplb.eplb_manager.EPLBManager"
UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"


def register() -> None:
    """The entry point; see `register_once`."""
    register_once(SGLANG, RUNNER_MODULE, _install)


def _install(runner_module: ModuleType) -> None:
    """Put our class where SGLang's is, in its own module and in those that have imported it by name."""
    if why := _misfit():
        SGLANG.stays(why)
        return
    from eplb_async.integrations.sglang_balancer import balancer_class

    owner = import_module(BALANCER.rpartition(".")[0])
    theirs = owner.EPLBManager
    if theirs.__module__ != owner.__name__:
        SGLANG.stays(f"another plugin has replaced it by {theirs!r}")
        return
    ours, registry = balancer_class(theirs), _own_registry()
    registry.add(BALANCER, ours, "REPLACE")
    registry.add(f"{RUNNER}.initialize", _after_initialize, "AFTER")
    registry.add(f"{RUNNER}.forward", _before_forward, "BEFORE")
    for change in WEIGHT_CHANGES:
        registry.add(f"{UPDATER}.{change}", _before_weights_change, "BEFORE")
    registry.apply_hooks()
    # the registry logs what fails, and goes on
    missing = sorted(set(registry._hooks) - registry._patched)
    if missing or runner_module.__dict__.get("EPLBManager") is not ours:
        SGLANG.stays(f"hooks could not be applied: {', '.join(missing) or BALANCER}")
        return
    ours.eplb_async_complete = True
    SGLANG.taken()


def _own_registry() -> Any:
    """SGLang's HookRegistry, for our hooks only.

    We may be called while the registry applies hooks of other plugins, since that imports what they hook: applying all there would wrap
    theirs twice.
    """
    module = import_module("sglang.srt.plugins.hook_registry")
    source = module.HookSource("eplb_async", "eplb-async")

    class OwnRegistry(module.HookRegistry):  # type: ignore[misc, name-defined]
        _hooks: ClassVar[dict[str, Any]] = defaultdict(list)
        _patched: ClassVar[set[str]] = set()

        @classmethod
        def add(cls, target: str, hook: Any, kind: str) -> None:
            cls.register(target, hook, module.HookType[kind], source=source)

    return OwnRegistry


def _after_initialize(result: None, runner: Any, *args: Any, **kwargs: Any) -> None:
    """The model is loaded, and its KV cache not sized yet: what we allocate is counted."""
    join = getattr(_balancer_of(runner), "eplb_async_join", None)
    if join is not None:
        join()


def _before_forward(runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    balancer = getattr(_balancer_of(runner), "eplb_async", None)
    if balancer is not None:
        balancer.note(forward_batch)


def _before_weights_change(updater: Any, *args: Any, **kwargs: Any) -> None:
    """Staged copies and fingerprints are of the weights that go: a commit after this would bring them back."""
    leave = getattr(_balancer_of(updater.get_model_runner()), "eplb_async_leave", None)
    if leave is not None:
        leave("weights are about to be replaced")


def _balancer_of(runner: Any) -> Any:
    """The runner's EPLBManager; None for a draft model's runner, and without --enable-eplb."""
    return getattr(runner, "eplb_manager", None)


def _misfit() -> str:
    return misfit(SGLANG, expectations())

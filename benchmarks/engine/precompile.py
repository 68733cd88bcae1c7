"""Compiles the policies of a run before it is measured, into the cache that daemon and ranks share.

A policy's own warm-up may leave parts to the first real plan, which then takes seconds more; so this plans once.
"""

import multiprocessing
import time
from collections.abc import Mapping

import numpy as np

from eplb_async.core.errors import PolicyError
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.policies.registry import load_policy, run_dispatch, run_policy

__all__ = ["Choice", "compile_policies", "plan_once"]

DEADLINE_S = 300.0

Choice = tuple[str, Mapping[str, object]]


def compile_policies(choices: list[Choice], spec: MoESpec) -> float:
    """Plan once with each policy and its options in a process of its own; the seconds that it took."""
    start = time.monotonic()
    process = multiprocessing.get_context("spawn").Process(target=plan_once, args=(choices, spec), daemon=True)
    process.start()
    process.join(DEADLINE_S)
    if process.is_alive():
        process.kill()
        process.join()
    return time.monotonic() - start


def plan_once(choices: list[Choice], spec: MoESpec) -> None:
    """Two plans of each policy for made-up loads, the second from the state of the first."""
    windows_TLE = np.random.default_rng(0).lognormal(sigma=1.0, size=(4, spec.num_layers, spec.num_experts)) * 100
    for name, options in choices:
        live_LP, state = initial_placement(spec), b""
        load_policy(name).warm_up()
        try:
            for _ in range(2):
                live_LP, state = run_policy(name, windows_TLE, live_LP, spec, options, state)
                run_dispatch(name, windows_TLE, live_LP, spec, options)
        except PolicyError as error:
            # a plan for made-up loads may be impossible where one for real loads is not
            print(f"policy {name!r} was not compiled in full: {error}", flush=True)

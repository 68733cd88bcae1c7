"""What ranks of tests do on their GPU, as functions that a RankGroup's processes run."""

import gc
import os
from typing import Any

import torch

from eplb_async.core.errors import EplbError
from tests.rank.harness import Actor

__all__ = [
    "commit_many",
    "counted_calls",
    "device_memory",
    "graph_reads_new_maps",
    "open_files",
    "try_attach",
    "unsynchronised_steps",
]


def device_memory(actor: Actor) -> int:
    """Bytes of the device in use by anybody, after a clean-up here."""
    gc.collect()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def open_files(actor: Actor) -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def try_attach(actor: Actor) -> str:
    """The error of an attach that must fail."""
    try:
        actor.attach()
    except EplbError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def capture(actor: Actor) -> None:
    """Record a forward that reads the maps, through a graph."""
    hook, seen = actor.hook, vars(actor)
    seen["copy"] = torch.empty_like(hook.slot_to_expert_LP)
    seen["graph"] = torch.cuda.CUDAGraph()
    # the hook's calls in a capture do nothing
    with torch.cuda.graph(seen["graph"]), hook.step("decode"):
        seen["copy"].copy_(hook.slot_to_expert_LP)


def graph_reads_new_maps(actor: Actor, count: int) -> list[bool]:
    """Steps whose forward is a replay: does it see the maps as they are now?"""
    hook, seen, same = actor.hook, vars(actor), []
    if "graph" not in seen:
        capture(actor)
    for _ in range(count):
        with hook.step("decode"):
            seen["graph"].replay()
        same.append(torch.equal(seen["copy"], hook.slot_to_expert_LP))
    return same


def unsynchronised_steps(actor: Actor, count: int) -> int:
    """Steps in which torch would raise if something waited for the device; returns how many were made."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(count):
            with actor.hook.step("decode", num_tokens=7):
                actor.load += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return count


def counted_calls(actor: Actor, count: int) -> dict[str, int]:
    """Calls into the CUDA runtime and driver during steps, by name, from torch's profiler."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(count):
            with actor.hook.step("decode", num_tokens=7):
                actor.load += 1
    calls: dict[str, int] = {}
    for event in profile.events() or ():
        name = str(event.name)
        if name.startswith("cu"):
            calls[name] = calls.get(name, 0) + 1
    torch.cuda.synchronize()
    return calls


def commit_many(actor: Actor, count: int) -> Any:
    """Plain steps, without a look at the maps; returns the counters."""
    for _ in range(count):
        with actor.hook.step("decode", num_tokens=7):
            actor.load += 1
        actor.step_number += 1
    statistics = actor.hook.statistics()
    return statistics.num_commits, statistics.num_drops

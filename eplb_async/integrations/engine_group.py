"""All ranks of an engine take our balancing, or none does: attach with an agreement around it, and steps in an engine's order.

    every rank looks at what it has  ->  all tell all  ->  all attach  ->  all tell all  ->  serving
                   `--- one declines: all raise EngineDeclined, nothing is left, the engine's own balancing stays ---'

Engines call their balancer once a step, behind the forward. So `step` ends the hook's step and begins the next.
"""

import logging
import os
import platform
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from eplb_async.core.config import Settings, load_settings
from eplb_async.core.errors import EngineDeclined, EplbError
from eplb_async.core.load import LoadKind, Phase
from eplb_async.core.placement import IntArray
from eplb_async.core.spec import MoESpec
from eplb_async.rank.hook import RankHook
from eplb_async.rank.weights import LayerTensors
from eplb_async.runtime.client import ControlClient

__all__ = [
    "ENGINE_DEFAULTS",
    "EngineGroup",
    "Offer",
    "Ranks",
    "TorchRanks",
    "agree",
    "as_expected",
    "engine_settings",
    "host_identity",
    "spec_of",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENGINE_DEFAULTS = {
    # ranks of an engine may wait for one that compiles a kernel; its collectives would wait ten minutes
    "hook": {"peer_deadline_s": 300.0, "attach_deadline_s": 60.0},
    "daemon": {"exit_when_idle_s": 10.0},
}
"""Settings of plugins, where the user's say nothing. All ranks of an engine attach together, and its daemon ends with it."""


def engine_settings(overrides: object = None) -> Settings:
    """The settings of this process, with what the engine's own command line says of us over them.

    Raises:
        ConfigError: a setting is unknown or does not fit.
    """
    if overrides is not None and not isinstance(overrides, dict):
        raise EngineDeclined([f"eplb_async's settings are {overrides!r}; needed a JSON object with tables of settings"])
    return load_settings(defaults=ENGINE_DEFAULTS, overrides=overrides)


class Ranks(Protocol):
    """The ranks that serve a model together, as the engine knows them."""

    rank: int
    size: int

    def gather(self, value: T) -> list[T]:
        """The values of all ranks. All call this together."""
        ...


class TorchRanks:
    """Ranks of a process group of torch.distributed whose backend works on the CPU."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()

    def gather(self, value: T) -> list[T]:
        """See Ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What one rank of an engine has: see RankHook.attach.

    Attributes:
        model: its name, for people.
        part: what tells apart the groups of one engine that has several models; "" for the first.
    """

    model: str
    part: str = ""
    spec: MoESpec
    weights: Sequence[LayerTensors]
    load: torch.Tensor
    placement: IntArray
    load_kind: LoadKind = LoadKind.GLOBAL_SLOTS


def spec_of(num_layers: int, num_experts: int, num_slots: int, num_ranks: int, num_groups: int | None) -> MoESpec:
    """What is balanced, in the numbers that engines have. Expert groups that do not divide, and none, count as one."""
    return MoESpec(
        num_layers=num_layers,
        num_experts=num_experts,
        num_redundant=num_slots - num_experts,
        num_ranks=num_ranks,
        num_expert_groups=num_groups if num_groups and num_experts % num_groups == 0 else 1,
    )


class EngineGroup:
    """One model of an engine, balanced by us. Its methods belong to the thread that runs the forwards.

    Attributes:
        hook: its map tensors are what the engine's router must read.
    """

    def __init__(self, hook: RankHook, load: torch.Tensor, settings: Settings) -> None:
        """Use `join`."""
        self.hook, self._load, self._settings = hook, load, settings
        self._started = False
        self._asking: threading.Thread | None = None
        # not atexit: worker processes of multiprocessing end without it, and all others run finalizers in it
        self._leave = Finalize(self, hook.detach, exitpriority=100)

    @classmethod
    def join(cls, ranks: Ranks, offer: Callable[[], Offer], settings: Settings) -> "EngineGroup":
        """Attach on all ranks or on none; all call this together.

        Args:
            ranks: of the engine.
            offer: looks at what this rank has; may raise EplbError.
            settings: see `engine_settings`.

        Raises:
            EngineDeclined: on all ranks, if one of them cannot; says which, and why.
        """
        made, problem = _attempt(lambda: _checked(offer(), ranks))
        told = agree(ranks, problem, (host_identity(), _group_name(settings, made) if made else ""))
        name, num_hosts = told[0][1], len({host for host, _ in told})
        if num_hosts > 1:
            raise EngineDeclined(
                [f"its {ranks.size} ranks run on {num_hosts} hosts, and daemons do not plan for several yet"]
            )
        hook, problem = _attempt(lambda: _attach(name, ranks.rank, made, settings))
        try:
            agree(ranks, problem, None)
        except BaseException:  # also of the engine's own collective, when a rank has died
            if hook is not None:
                hook.detach()
            raise
        if hook is None or made is None:
            raise AssertionError("all ranks agreed, and this one has no hook")
        return cls(hook, made.load, settings)

    def step(self, phase: Phase, num_tokens: int) -> None:
        """A forward of the engine has ended, and the next may come after this.

        Args:
            phase: of the forward that has ended.
            num_tokens: its tokens.

        Raises:
            PeerLost, StepDrift: another rank is gone; the engine must stop, as its collectives would.
        """
        if self._started:
            self.hook.after_forward(phase, num_tokens)
        else:
            self._load.zero_()  # what warm-up counted before anybody listened
            self._started = True
        self.hook.before_forward(phase)

    def ask_for_plan(self) -> None:
        """Have the daemon decide now. Returns at once; what comes of it is in the log and in `eplb-async history`."""
        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=self._ask, name=f"eplb-ask-{self.hook.group}", daemon=True)
            self._asking.start()

    def close(self) -> None:
        """Leave the group. Idempotent."""
        self._leave()

    def _ask(self) -> None:
        try:
            with ControlClient(self._settings) as client:
                decision = client.rebalance(self.hook.group)
            logger.info("group %s: decision %d: %s", self.hook.group, decision.number, decision.outcome.value)
        except EplbError as error:
            logger.warning("group %s: the daemon was asked for a plan: %s", self.hook.group, error)


def _attempt(act: Callable[[], T]) -> tuple[T | None, str]:
    """The result and "", or None and why there is none."""
    try:
        return act(), ""
    except EplbError as error:
        return None, f"{type(error).__name__}: {error}"


def as_expected(engine: str, look: Callable[[], T]) -> T:
    """What a look at an engine's objects gives.

    Raises:
        EngineDeclined: something is not there, or is not what it was when this was written. A rank that raised anything else
            here would leave the others waiting for it.
    """
    try:
        return look()
    except EplbError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise EngineDeclined(
            [f"what {engine} has is not what was expected: {type(error).__name__}: {error}"]
        ) from error


def agree(ranks: Ranks, problem: str, value: T) -> list[T]:
    """The values of all ranks, if none has a problem. All call this together.

    Raises:
        EngineDeclined: on all ranks, if one has; says which, and what.
    """
    found = ranks.gather((problem, value))
    if any(problem for problem, _ in found):
        raise EngineDeclined([f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(found) if problem])
    return [value for _, value in found]


def _checked(offer: Offer, ranks: Ranks) -> Offer:
    if offer.spec.num_ranks != ranks.size:
        raise EngineDeclined([f"the model has {offer.spec.num_ranks} expert-parallel ranks, the engine {ranks.size}"])
    return offer


def _attach(name: str, rank: int, offer: Offer | None, settings: Settings) -> RankHook:
    if offer is None:
        raise AssertionError("a rank without an offer has declined")
    return RankHook.attach(
        group=name,
        rank=rank,
        spec=offer.spec,
        weights=offer.weights,
        load=offer.load,
        placement=offer.placement,
        load_kind=offer.load_kind,
        daemon=settings.integration.daemon,
        settings=settings,
    )


def _group_name(settings: Settings, offer: Offer) -> str:
    """As set, else the model's and the process's: "Qwen/Qwen3-30B-A3B" in process 4711: Qwen3-30B-A3B-4711."""
    part = f"-{offer.part}" if offer.part else ""
    if settings.integration.group:
        return settings.integration.group + part
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", offer.model.rstrip("/").rpartition("/")[2]).strip(".-")
    return f"{plain[:40] or 'model'}{part}-{os.getpid()}"


def host_identity() -> str:
    """The same for processes of one host that can share memory, different otherwise."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{platform.node()} {boot} {os.stat('/dev/shm').st_dev}"

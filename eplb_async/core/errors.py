"""Every exception that eplb_async raises on purpose, split by whose move is next.

    EplbError
    |-- SettingError (also ValueError)    you gave us something that does not fit; change it
    |   |-- ConfigError                   a settings file, an environment variable or an option
    |   |-- SpecError                     a model's shape, its weights or its load tensor
    |   |-- PlacementError                a placement that would lose an expert, or is not one
    |   |-- UnknownName                   a policy, phase or backend that nobody registered
    |   `-- SpecMismatch                  this rank describes another model than the running group
    |-- LifecycleError                    right call, wrong moment
    |   |-- HookClosed                    the hook was detached
    |   |-- RankTaken                     a living process is attached as this rank
    |   `-- AttachTimeout                 the other ranks did not come
    |-- PeerError                         another rank of the group is the cause; end this incarnation
    |   |-- PeerLost                      its word did not come in time
    |   `-- StepDrift                     it does not step as often as we do
    |-- SegmentError                      shared memory
    |   |-- SegmentMissing                no such segment
    |   |-- SegmentRefused                foreign, damaged, or not ours: it was not read
    |   `-- NoSharedMemory                no room, or no permission, to create one
    |-- DaemonError                       the daemon or its control socket
    |   |-- DaemonUnavailable             none runs
    |   |-- DaemonRunning                 one runs already
    |   `-- ControlError                  it refused or did not understand a request
    |-- PlanError                         a plan that must not be applied; it is dropped everywhere
    |   |-- PlanInvalid                   it contradicts itself or the live placement
    |   `-- TransferFailed                bytes could not be copied, or were not those of the expert
    |-- PolicyError                       a policy raised, returned nonsense, or took too long
    |-- EngineDeclined                    an engine whose own balancing stays, and why
    |-- DeviceCallFailed                  a call into a GPU's driver that should work did not
    `-- InternalError                     our bug; please report it

The classes own the wording: a message says what was found, what was needed, and what to do.
"""

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "AttachTimeout",
    "ConfigError",
    "ControlError",
    "DaemonError",
    "DaemonRunning",
    "DaemonUnavailable",
    "DeviceCallFailed",
    "EngineDeclined",
    "EplbError",
    "HookClosed",
    "InternalError",
    "LifecycleError",
    "NoSharedMemory",
    "PeerError",
    "PeerLost",
    "PlacementError",
    "PlanError",
    "PlanInvalid",
    "PolicyError",
    "RankTaken",
    "SegmentError",
    "SegmentMissing",
    "SegmentRefused",
    "SettingError",
    "SpecError",
    "SpecMismatch",
    "StepDrift",
    "TransferFailed",
    "UnknownName",
]


class EplbError(Exception):
    """Base of everything below. All of them can be pickled: engines and process pools send them between processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        # the default would call the class with the finished message, which is not what these constructors take
        return _rebuilt, (type(self), self.args, self.__dict__)


class SettingError(EplbError, ValueError):
    """What you gave does not fit."""


class ConfigError(SettingError):
    """A setting from a file, the environment or the command line.

    `where` names the file or variable, `what` says what is wrong with it and what would be right.
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where


class SpecError(SettingError):
    """The model's shape, its weights or its load tensor do not fit together."""


class PlacementError(SettingError):
    """Not a valid placement: a wrong shape, an unknown expert, or an expert without a slot."""


class UnknownName(SettingError):
    """A name that no registry knows."""

    def __init__(self, family: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown {family} {name!r}; known: {', '.join(sorted(known))}")
        self.family, self.name = family, name


class SpecMismatch(SettingError):
    """This rank and the running group describe different models."""

    def __init__(self, group: str, differences: Sequence[str]) -> None:
        super().__init__(
            f"group {group!r} runs with another description than this rank gave: {'; '.join(differences)}. "
            "Attach every rank with the same spec, settings and weights, or use another group name."
        )


class LifecycleError(EplbError):
    """A right call at the wrong moment."""


class HookClosed(LifecycleError):
    """The hook was detached, or its group has ended."""

    def __init__(self, group: str, rank: int, why: str) -> None:
        super().__init__(f"group {group!r} rank {rank}: the hook is closed ({why}); attach again to go on")


class RankTaken(LifecycleError):
    """A living process is attached as this rank already."""

    def __init__(self, group: str, rank: int, pid: int) -> None:
        super().__init__(
            f"group {group!r} rank {rank} is attached already by process {pid}; "
            "detach it first, or give this process its own rank"
        )
        self.pid = pid


class AttachTimeout(LifecycleError):
    """The group did not become complete in time."""

    def __init__(self, group: str, missing: Sequence[int], num_ranks: int, waited_s: float) -> None:
        super().__init__(
            f"group {group!r}: ranks {list(missing)} of {num_ranks} did not attach within {waited_s:g} s. "
            "All ranks of a group must attach as the same user, on this host or, with one rendezvous, on the hosts of its nodes; "
            "raise hook.attach_deadline_s if they load for longer."
        )
        self.missing = tuple(missing)


class PeerError(EplbError):
    """Another rank of the group is the cause. This incarnation has ended: detach, and attach all ranks again."""


class PeerLost(PeerError):
    """A rank's word for a step did not come in time. Do not run the forward: others may have committed already.

    `rank` is the one that is missing; -1 where it can only be told that it is one of `ranks`.
    """

    def __init__(self, group: str, lost: int | Sequence[int], step: int, waited_s: float, why: str) -> None:
        ranks = (lost,) if isinstance(lost, int) else tuple(lost)
        who = f"rank {ranks[0]} is" if len(ranks) == 1 else f"one of the ranks {', '.join(map(str, ranks))} is"
        super().__init__(
            f"group {group!r}: {who} lost: no word for step {step} after {waited_s:.3g} s ({why}). "
            "Do not run this forward; detach, and attach all ranks of the group again."
        )
        self.rank, self.ranks = ranks[0] if len(ranks) == 1 else -1, ranks
        self.step, self.why = step, why


class StepDrift(PeerError):
    """Ranks of one group called step a different number of times."""

    def __init__(self, group: str, rank: int, peer: int, step: int, peer_step: int, history: int) -> None:
        super().__init__(
            f"group {group!r}: rank {rank} needs the word of rank {peer} for step {step}, but that rank is at step "
            f"{peer_step} and words are kept for {history} steps. Every rank must step the same number of times: "
            "give idle ranks dummy steps."
        )
        self.peer, self.step, self.peer_step = peer, step, peer_step


class SegmentError(EplbError):
    """Shared memory."""


class SegmentMissing(SegmentError):
    """No segment of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no shared segment {name}; is the group attached on this host, as this user?")


class SegmentRefused(SegmentError):
    """A segment that is not what its name says. Nothing of it was used."""

    def __init__(self, name: str, found: str, needed: str) -> None:
        super().__init__(
            f"shared segment {name} refused: found {found}, needed {needed}. "
            "Stop the processes that use it and run 'eplb-async gc', or use another group name."
        )


class NoSharedMemory(SegmentError):
    """A segment could not be created."""

    def __init__(self, name: str, num_bytes: int, why: str) -> None:
        super().__init__(
            f"cannot create shared segment {name} of {num_bytes:,} bytes: {why}. Free or enlarge /dev/shm "
            "(in a container: --shm-size or an emptyDir of medium Memory), or run 'eplb-async gc' for stale segments."
        )


class DaemonError(EplbError):
    """The daemon or its control socket."""


class DaemonUnavailable(DaemonError):
    """No daemon answers on this node."""

    def __init__(self, where: str, why: str = "nothing listens there") -> None:
        super().__init__(f"no eplb-async daemon at {where}: {why}; start one with 'eplb-async serve'")


class DaemonRunning(DaemonError):
    """A second daemon for the same runtime directory."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"a daemon serves {where} already; see 'eplb-async status', or give this one its own runtime_dir"
        )


class ControlError(DaemonError):
    """The daemon refused a request, or the answer was not one."""


class PlanError(EplbError):
    """A plan that must not be applied. All ranks drop the rest of it at the same step."""


class PlanInvalid(PlanError):
    """A plan that contradicts itself, the model or the live placement."""


class TransferFailed(PlanError):
    """Bytes could not be copied, or are not those of the expert."""


class PolicyError(EplbError):
    """A policy raised, returned an invalid placement, or did not return in time."""

    def __init__(self, policy: str, why: str) -> None:
        super().__init__(f"policy {policy!r} {why}; the live placement stays as it is")
        self.policy, self.why = policy, why


class EngineDeclined(EplbError):
    """A plugin does not take an engine over: something does not fit, and the engine's own balancing stays."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = list(reasons)


class DeviceCallFailed(EplbError):
    """A call into the driver of a GPU failed."""

    def __init__(self, call: str, why: str) -> None:
        super().__init__(f"{call} failed: {why}; look at the driver's log (dmesg, nvidia-smi -q) and at earlier errors")
        self.call, self.why = call, why


class InternalError(EplbError):
    """A broken promise inside eplb_async."""


def _rebuilt(kind: type[EplbError], args: tuple[Any, ...], fields: dict[str, Any]) -> EplbError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error

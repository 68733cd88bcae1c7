"""Settings: a TOML file, then environment variables over it. The only module that reads the environment.

    # eplb_async.toml                       # the same, from the environment
    runtime_dir = "/run/eplb_async"         EPLB_ASYNC_RUNTIME_DIR=/run/eplb_async
    [hook]
    lag = 2                                 EPLB_ASYNC_HOOK_LAG=2
    [daemon]
    policy = "default"                      EPLB_ASYNC_DAEMON_POLICY=default

`EPLB_ASYNC_CONFIG` names the file. Every setting is checked; unknown ones are errors that name the known ones.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from eplb_async.core.daemon_settings import DaemonSettings
from eplb_async.core.errors import ConfigError
from eplb_async.core.setting_checks import at_least, positive

__all__ = [
    "DaemonSettings",
    "HookSettings",
    "IntegrationSettings",
    "Settings",
    "check_group_name",
    "child_environment",
    "config_path",
    "daemon_variables",
    "load_settings",
    "notify_socket",
    "policy_cache",
    "settings_environment",
]

PREFIX = "EPLB_ASYNC_"


class HookSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the hook in each rank. `lag`, `history`, `staging_rows`, `reduce_every` and `one_peer_at_a_time` must be
    equal on all ranks of a group.

    Fields:
        lag: steps between a word and the decision on it; 1 decides soonest, 2 leaves a step for the words to arrive.
        history: steps for which words are kept; at least 2 * lag + 2.
        peer_deadline_s: how long to wait for a rank's word before PeerLost. Keep it below the collectives' time-out.
        attach_deadline_s: how long attach waits for the other ranks, which may load for longer.
        ring_records: steps of load that wait for the daemon before the oldest is overwritten.
        staging_rows: rows per rank that can be received before a commit; 0 means S, one whole layer.
        pull_bytes_per_step: most bytes whose copies are issued in one step; a row that is larger goes alone.
        adapt_pace: issue less while steps with transfers run longer than usual ones without, more again once they do not. Off: as much as
            `pull_bytes_per_step` allows, but for `slow_step_ratio`.
        pace_tolerance: by how much of the usual time steps with transfers may be longer before less is issued.
        least_pull_bytes_per_step: what pacing never goes below while it issues anything.
        idle_pull_bytes_per_step: most bytes in a step in which the rank is idle: a dummy one, or after a wait for requests; 0: as
            `pull_bytes_per_step`.
        copies_per_step: most copies issued in one step.
        plan_deadline_steps: a plan that is not done after so many steps is given up by the rank itself.
        plan_deadline_s: the same in seconds.
        drain_deadline_s: pulls of a dropped plan that have not ended after this are given up, where the transfer can do that
            (shared memory; not between nodes or on GPUs). No plan begins before.
        pull_bytes_in_flight: most bytes whose copies have been issued and have not ended.
        slow_step_ratio: no copies are issued in a step if the one before took more than this times the usual one of its phase and number of
            tokens; three of them in a row make a pause. 0: no step is slow.
        verify: all, or sample (one in eight), or off: which received rows are compared with the fingerprints taken at attach.
        reduce_every: of a group on several nodes: steps from one all-reduce of the words to the next.
        one_peer_at_a_time: of a group on several nodes: a rank exchanges experts of one entry with one other rank at a time,
            instead of with all at once.
    """

    lag: int = 2
    history: int = 64
    peer_deadline_s: float = 30.0
    attach_deadline_s: float = 600.0
    ring_records: int = 256
    staging_rows: int = 0
    pull_bytes_per_step: int = 64 << 20
    adapt_pace: bool = True
    pace_tolerance: float = 0.03
    least_pull_bytes_per_step: int = 4 << 20
    idle_pull_bytes_per_step: int = 0
    copies_per_step: int = 32
    plan_deadline_steps: int = 10_000
    plan_deadline_s: float = 120.0
    drain_deadline_s: float = 300.0
    pull_bytes_in_flight: int = 512 << 20
    slow_step_ratio: float = 1.5
    verify: Literal["all", "sample", "off"] = "all"
    reduce_every: int = 1
    one_peer_at_a_time: bool = True

    def __post_init__(self) -> None:
        at_least(self, 1, "lag", "pull_bytes_per_step", "pull_bytes_in_flight", "copies_per_step")
        at_least(self, 1, "plan_deadline_steps", "reduce_every")
        at_least(self, 2, "ring_records")
        at_least(self, 1, "least_pull_bytes_per_step")
        at_least(self, 0, "staging_rows", "slow_step_ratio", "pace_tolerance")
        if 0 != self.idle_pull_bytes_per_step < self.pull_bytes_per_step:
            raise ValueError(
                f"`idle_pull_bytes_per_step` is {self.idle_pull_bytes_per_step}; it must be 0 or at least `pull_bytes_per_step`, "
                f"{self.pull_bytes_per_step}"
            )
        if 0 < self.slow_step_ratio < 1:
            raise ValueError(f"`slow_step_ratio` is {self.slow_step_ratio}; it must be 0 or at least 1")
        positive(self, "peer_deadline_s", "attach_deadline_s", "plan_deadline_s", "drain_deadline_s")
        if self.history < 2 * self.lag + 2:
            raise ValueError(f"`history` is {self.history}; words of lag {self.lag} need at least {2 * self.lag + 2}")


class IntegrationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the plugins that put the hook into other engines.

    Fields:
        enabled: false leaves the engine's own balancing in place.
        any_version: try also releases of the engine that this version was not checked against; what is touched is checked all
            the same.
        group: name of the model in `eplb-async status`; "" makes one of the model's name and a process id.
        daemon: auto starts this node's daemon if none runs, required leaves the engine's own balancing in place if none does,
            optional serves on until one comes.
    """

    enabled: bool = True
    any_version: bool = False
    group: str = ""
    daemon: Literal["auto", "optional", "required"] = "auto"

    def __post_init__(self) -> None:
        if self.group:
            check_group_name(self.group)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of one node.

    Fields:
        runtime_dir: directory of the control socket and lock files, mode 0700; "" picks $XDG_RUNTIME_DIR/eplb_async,
            else eplb_async-<uid> in the system's temporary directory. Daemon and ranks must agree on it.
        hook, daemon, integration: see there.
    """

    runtime_dir: str = ""
    hook: HookSettings = msgspec.field(default_factory=HookSettings)
    daemon: DaemonSettings = msgspec.field(default_factory=DaemonSettings)
    integration: IntegrationSettings = msgspec.field(default_factory=IntegrationSettings)

    @property
    def directory(self) -> Path:
        """The runtime directory with the default filled in; it need not exist."""
        if self.runtime_dir:
            return Path(self.runtime_dir)
        if base := os.environ.get("XDG_RUNTIME_DIR"):
            return Path(base) / "eplb_async"
        return Path(tempfile.gettempdir()) / f"eplb_async-{os.getuid()}"


TABLES: Mapping[str, type[msgspec.Struct]] = {
    "hook": HookSettings,
    "daemon": DaemonSettings,
    "integration": IntegrationSettings,
}


def load_settings(
    path: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from a file and the environment.

    Args:
        path: a TOML file; None takes the one that EPLB_ASYNC_CONFIG names, if any.
        environ: instead of the process's environment.
        defaults: tables of settings, as in the file, where neither file nor environment says anything.
        overrides: tables of settings that go before both.

    Raises:
        ConfigError: the file cannot be read or is not TOML, a key or variable is unknown, a value is bad.
    """
    environ = os.environ if environ is None else environ
    path = path or environ.get(PREFIX + "CONFIG") or None
    data: dict[str, Any] = _merged({}, defaults or {})
    if path is not None:
        try:
            given = msgspec.toml.decode(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(str(path), f"cannot be read ({error.strerror}); name an existing TOML file") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(str(path), f"is not TOML: {error}") from error
        _convert(given, str(path))
        data = _merged(data, given)
    names = sorted(name for name in environ if name.startswith(PREFIX) and name != PREFIX + "CONFIG")
    for name in names:
        _set_from_environment(data, name, environ[name])
    if overrides:
        _convert(dict(overrides), "settings given by the engine")
        data = _merged(data, overrides)
    # checked together: a pair such as lag and history may only fit once both are set
    return _convert(data, ", ".join([*([str(path)] if path else []), *names]) or "settings")


def config_path() -> str | None:
    """The settings file that EPLB_ASYNC_CONFIG names, if any."""
    return os.environ.get(PREFIX + "CONFIG") or None


def notify_socket() -> str | None:
    """Where systemd waits to be told that a service is ready (NOTIFY_SOCKET), if it does."""
    return os.environ.get("NOTIFY_SOCKET") or None


def child_environment(overrides: Mapping[str, str], python_path: str) -> dict[str, str]:
    """This process's environment for a child of ours.

    Args:
        overrides: variables to set.
        python_path: a directory that the child's interpreter must import from first.
    """
    paths = [python_path, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **overrides, "PYTHONPATH": os.pathsep.join(paths)}


def policy_cache(directory: Path) -> Path:
    """Where compiled policies are kept: NUMBA_CACHE_DIR if it is set, else a folder of the runtime directory.

    The folder's name changes with every source file of the policies: numba compares only the file of the function that it
    loads, not those of the functions compiled into it, and would go on running old code after an upgrade.
    """
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given:
        return Path(given)
    digest = hashlib.sha256()
    for source in sorted((Path(__file__).resolve().parents[1] / "policies").glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return directory / f"compiled-{digest.hexdigest()[:12]}"


def settings_environment(settings: Settings) -> dict[str, str]:
    """Variables that make `load_settings` of a child return these settings, whatever file and variables say here."""
    variables = {PREFIX + "RUNTIME_DIR": str(settings.directory)}
    inherited = load_settings()
    for table in TABLES:
        ours, theirs = getattr(settings, table), getattr(inherited, table)
        for field in ours.__struct_fields__:
            if (value := getattr(ours, field)) != getattr(theirs, field):
                variables[f"{PREFIX}{table.upper()}_{field.upper()}"] = _as_text(value)
    return variables


def daemon_variables(daemon: Mapping[str, Any]) -> dict[str, str]:
    """Variables that say what a table `daemon` says."""
    return {f"{PREFIX}DAEMON_{name.upper()}": _as_text(value) for name, value in daemon.items()}


def check_group_name(group: str) -> str:
    """The name if it can be part of a segment's name.

    Raises:
        ConfigError: it is empty, longer than 64, or has characters other than letters, digits, '.', '_' and '-'.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", group):
        raise ConfigError(
            f"group {group!r}",
            "a group's name has 1 to 64 letters, digits, '.', '_' or '-', and does not start with '.'",
        )
    return group


def _as_text(value: Any) -> str:
    """A value as a variable holds it; JSON has no inf, which is a deadline that never comes."""
    plain = value if isinstance(value, str) else repr(value) if isinstance(value, float) else None
    return plain if plain is not None else msgspec.json.encode(value).decode()


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of both, those of `over` first; tables are merged, values are not. Its tables are its own, to be written to."""
    result = dict(under)
    for name, value in over.items():
        below = under.get(name)
        result[name] = (
            {**(below if isinstance(below, Mapping) else {}), **value} if isinstance(value, Mapping) else value
        )
    return result


def _convert(data: dict[str, Any], where: str) -> Settings:
    try:
        return msgspec.convert(data, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(where, f"{error}. {_known(str(error))}".strip()) from error


def _known(message: str) -> str:
    """The fields that would have been right, for an unknown one."""
    if "unknown field" not in message:
        return ""
    table = next((kind for name, kind in TABLES.items() if f"$.{name}" in message), Settings)
    return f"Known: {', '.join(table.__struct_fields__)}"


def _set_from_environment(data: dict[str, Any], name: str, text: str) -> None:
    key = name.removeprefix(PREFIX).lower()
    if key == "runtime_dir":
        data["runtime_dir"] = text
        return
    for table, settings in TABLES.items():
        field = key.removeprefix(table + "_")
        if key.startswith(table + "_") and field in settings.__struct_fields__:
            kind = settings.__annotations__[field]
            try:
                value = (
                    msgspec.json.decode(text) if kind == dict[str, Any] else msgspec.convert(text, kind, strict=False)
                )
            except (msgspec.DecodeError, msgspec.ValidationError, UnicodeEncodeError) as error:
                raise ConfigError(name, f"{text!r} does not fit: {error}") from error
            data.setdefault(table, {})[field] = value
            return
    known = [PREFIX + "CONFIG", PREFIX + "RUNTIME_DIR"]
    known += [
        f"{PREFIX}{table.upper()}_{field.upper()}" for table in TABLES for field in TABLES[table].__struct_fields__
    ]
    raise ConfigError(name, f"no such setting. Known: {', '.join(known)}")

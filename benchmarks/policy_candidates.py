"""Which policies are compared: built-in ones, third parties', other engines', and sweeps over an option."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import msgspec

from eplb_async.core.spec import MoESpec
from eplb_async.policies.base import Policy
from eplb_async.policies.dispatch import DispatchOptions, warm_up
from eplb_async.policies.registry import BUILT_IN, decode_dispatch, decode_options, load_policy

__all__ = ["Candidate", "chosen_candidates", "load_peers_from", "parse_candidate", "parse_sweep", "peer_versions"]

NOT_PLANNING = ("static",)
"""Built-in policies that need a file to say anything."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A policy with options.

    Fields:
        label: as the command line gave it.
        policy: the policy.
        options: by name.
        sweep: what the candidates of one sweep have in common, "" for none: "random: seed".
    """

    label: str
    policy: Policy
    options: Mapping[str, object] = field(default_factory=dict)
    sweep: str = ""

    def prepared(self, spec: MoESpec) -> Any:
        """What the policy function gets as its options.

        Raises:
            EplbError: the options are wrong, for this spec or at all.
        """
        settings: Any = decode_options(self.policy, self.options)
        if self.policy.prepare_options is not None:
            settings = self.policy.prepare_options(settings, spec)
        return settings

    @property
    def dispatch(self) -> DispatchOptions:
        """The options that every policy has; checked by `prepared`."""
        return decode_dispatch(self.policy.name, self.options)

    def warm_up(self) -> None:
        """Compile what its plans need."""
        self.policy.warm_up()
        if self.dispatch.dispatch == "weighted":
            warm_up()


def chosen_candidates(policies: Sequence[str], sweeps: Sequence[str], peers: Mapping[str, Policy]) -> list[Candidate]:
    """The named policies (or all built-in ones and all peers), then those of the sweeps; their options are checked.

    Raises:
        EplbError, ValueError: as `parse_candidate` and `parse_sweep`.
    """
    names = policies or [*(name for name in BUILT_IN if name not in NOT_PLANNING), *peers]
    candidates = [parse_candidate(text, peers) for text in names]
    for text in sweeps:
        candidates += parse_sweep(text, peers)
    for candidate in candidates:
        decode_options(candidate.policy, candidate.options)
    return candidates


def parse_candidate(text: str, peers: Mapping[str, Policy]) -> Candidate:
    """`name` or `name:option=value,...` with JSON values; a list may hold commas.

    Raises:
        EplbError: an unknown policy.
        ValueError: a value that is no JSON.
    """
    name, _, settings = text.partition(":")
    options: dict[str, object] = {}
    # at commas outside of brackets
    for setting in filter(None, re.split(r",(?![^\[]*\])", settings)):
        key, _, value = setting.partition("=")
        try:
            options[key] = msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            raise ValueError(f"{setting!r} of policy {text!r} is not option=JSON value: {error}") from error
    policy = peers[name] if name in peers else load_policy(name)
    return Candidate(label=text, policy=policy, options=options)


def parse_sweep(text: str, peers: Mapping[str, Policy]) -> list[Candidate]:
    """One candidate for each value of the option that is given as a list: "random:seed=[1,2]".

    Raises:
        EplbError: an unknown policy.
        ValueError: a value that is no JSON, or not exactly one list.
    """
    template = parse_candidate(text, peers)
    swept = {key: values for key, values in template.options.items() if isinstance(values, list)}
    if len(swept) != 1:
        raise ValueError(f"sweep {text!r} has {len(swept)} options with a list of values; needed exactly one")
    name, [(key, values)] = template.policy.name, swept.items()
    fixed = [f"{other}={_json(value)}" for other, value in template.options.items() if other != key]
    return [
        Candidate(
            label=f"{name}:" + ",".join([*fixed, f"{key}={_json(value)}"]),
            policy=template.policy,
            options={**template.options, key: value},
            sweep=f"{name}: " + ", ".join([*fixed, key]),
        )
        for value in values
    ]


def load_peers_from(folder: Path | None) -> dict[str, Policy]:
    """The policies of other engines; none without a folder. Imports torch and numba only with one.

    Raises:
        ConfigError: see `benchmarks.peers.load_peers`.
    """
    if folder is None:
        return {}
    from benchmarks.peers import load_peers

    return load_peers(folder)


def peer_versions(folder: Path | None) -> dict[str, str]:
    """Versions of the wheels that are unpacked in the folder, or in folders of it, where their metadata is there too."""
    if folder is None:
        return {}
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = distributions(path=[str(path) for path in folders])
    return {str(distribution.name): distribution.version for distribution in found}


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()

"""All policies that this interpreter can run, with their options: what `eplb-async policies` tells."""

import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, get_origin

import msgspec

from eplb_async.core.errors import PolicyError
from eplb_async.policies.dispatch import DispatchOptions
from eplb_async.policies.registry import BUILT_IN, ENTRY_POINT_GROUP, load_policy, policy_names

__all__ = ["OptionInfo", "PolicyInfo", "list_policies", "option_docs", "options_of_every_policy"]


class OptionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One option: its name, type as Python writes it, default as JSON, and what the options' docstring says of it."""

    name: str
    type: str
    default: Any
    doc: str


class PolicyInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One policy.

    Fields:
        name: to ask for it by.
        summary: one line; empty if it cannot be loaded.
        source: "built in", or the distribution, its version and the object that registered it.
        options: in the order of declaration.
        problem: why it cannot be loaded; empty if it can.
    """

    name: str
    summary: str
    source: str
    options: Sequence[OptionInfo]
    problem: str = ""


def list_policies() -> list[PolicyInfo]:
    """Every registered policy, built-in ones first. A third party's that cannot be loaded is listed with the reason."""
    return [_info(name) for name in policy_names()]


def options_of_every_policy() -> list[OptionInfo]:
    """Those that can be given to any policy beside its own."""
    return _options(DispatchOptions)


def option_docs(options_type: type[msgspec.Struct]) -> dict[str, str]:
    """What a struct's docstring says of each field, in one line each; "" for a field that it does not mention.

    `name: text` begins a field's text, wherever in the docstring; deeper lines go on with it, another one ends it.
    """
    names = [field.name for field in msgspec.structs.fields(options_type)]
    docs: dict[str, list[str]] = {name: [] for name in names}
    current, indent = "", 0
    for line in inspect.cleandoc(options_type.__doc__ or "").splitlines():
        text, depth = line.strip(), len(line) - len(line.lstrip())
        name, colon, rest = text.partition(":")
        if colon and name.strip("` ") in docs:
            current, indent = name.strip("` "), depth
            docs[current] = [rest.strip()]
        elif current and text and depth > indent:
            docs[current].append(text)
        else:
            current = ""
    return {name: " ".join(filter(None, lines)) for name, lines in docs.items()}


def _info(name: str) -> PolicyInfo:
    source = _source(name)
    try:
        policy = load_policy(name)
    except PolicyError as error:
        return PolicyInfo(name=name, summary="", source=source, options=[], problem=error.why)
    return PolicyInfo(name=name, summary=policy.summary, source=source, options=_options(policy.options_type))


def _options(options_type: type[msgspec.Struct]) -> list[OptionInfo]:
    docs = option_docs(options_type)
    return [_option(field, docs) for field in msgspec.structs.fields(options_type)]


def _option(field: msgspec.structs.FieldInfo, docs: Mapping[str, str]) -> OptionInfo:
    made = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    default = msgspec.to_builtins(made, enc_hook=str)
    return OptionInfo(name=field.name, type=_type_name(field.type), default=default, doc=docs[field.name])


def _type_name(kind: Any) -> str:
    """As it is written: "bool", "dict[str, int]", "int | None"; without module names."""
    return kind.__name__ if get_origin(kind) is None and isinstance(kind, type) else str(kind).replace("typing.", "")


def _source(name: str) -> str:
    if name in BUILT_IN:
        return "built in"
    points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name]
    origins = [f"{p.dist.name} {p.dist.version} ({p.value})" if p.dist else p.value for p in points]
    return " and ".join(sorted(set(origins)))

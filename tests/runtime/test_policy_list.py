"""The list of policies says what can be asked for, with which options, and what is broken."""

from pathlib import Path
from typing import Literal

import msgspec
import pytest

from eplb_async.policies.registry import load_policy, policy_names
from eplb_async.runtime.policy_list import OptionInfo, list_policies, option_docs, options_of_every_policy
from tests.policies.third_party import install

__all__: list[str] = []

MODULE = '''
from typing import Literal
import msgspec
from eplb_async.policies import Policy
class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """step: ranks to rotate by."""
    step: int = 1
    way: Literal["left", "right"] = "left"
    limit: float | None = None
    weights: dict[str, float] = msgspec.field(default_factory=lambda: {"a": 1.0})
def stay(windows_TLE, slot_to_expert_LP, topology, options, state):
    return slot_to_expert_LP.copy(), state
POLICY = Policy(name="stay", function=stay, options_type=Options, summary="moves nothing")
'''


class Documented(msgspec.Struct, kw_only=True):
    """Settings of nothing.

    Fields:
        first: what it is: a number, and
            more of it.
        second: another one.
    And then something else.

    Not a field: of that name.
    """

    first: int = 1
    second: int = 2
    third: int = 3


def test_docs_come_from_the_docstring() -> None:
    """A field's text goes on over deeper lines and ends with them; a field that is not mentioned has none."""
    assert option_docs(Documented) == {
        "first": "what it is: a number, and more of it.",
        "second": "another one.",
        "third": "",
    }


def test_every_built_in_policy_and_option_is_described() -> None:
    """Each has its summary, and a text, type and default for each of its options."""
    listed = {info.name: info for info in list_policies()}
    assert list(listed) == policy_names()
    for name, info in listed.items():
        policy = load_policy(name)
        assert (info.source, info.summary, info.problem) == ("built in", policy.summary, "")
        assert [option.name for option in info.options] == list(policy.options_type.__struct_fields__)
        assert all(option.doc and option.type for option in info.options)
    assert all(option.doc and option.type for option in options_of_every_policy())
    assert listed["random"].options[0].type == "int"
    assert (listed["random"].options[0].default, listed["static"].options[0].default) == (0, "")


def test_third_parties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third party's policy is listed with where it comes from, a broken one with the reason; built-in names stay ours."""
    module = "eplb_async_listed_policies"
    points = f"stay = {module}:POLICY\nbroken = {module}:NOTHING\ndefault = {module}:POLICY\n"
    install(tmp_path, module, MODULE, f"[eplb_async.policies]\n{points}")
    monkeypatch.syspath_prepend(tmp_path)
    listed = {info.name: info for info in list_policies()}
    assert listed["default"].source == "built in"
    assert listed["stay"].source == f"eplb_async_listed_policies 1.0 ({module}:POLICY)"
    assert listed["stay"].problem == ""
    assert listed["stay"].options == [
        OptionInfo(name="step", type="int", default=1, doc="ranks to rotate by."),
        OptionInfo(name="way", type=str(Literal["left", "right"]).removeprefix("typing."), default="left", doc=""),
        OptionInfo(name="limit", type="float | None", default=None, doc=""),
        OptionInfo(name="weights", type="dict[str, float]", default={"a": 1.0}, doc=""),
    ]
    assert listed["broken"].summary == ""
    assert "cannot be imported: AttributeError" in listed["broken"].problem

"""docs/policies.md: its example works as written, and it names what there is."""

import re
import sys
from pathlib import Path

import msgspec
import pytest

from eplb_async.policies import load_policy, policy_names
from eplb_async.testing import check_policy
from tests.policies.third_party import install

TEXT = (Path(__file__).resolve().parents[2] / "docs/policies.md").read_text(encoding="utf-8")


def block(language: str, start: str) -> str:
    """The code block of that language whose text begins so."""
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return next(code for code in blocks if code.startswith(start))


def test_the_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module and the entry point of the docs, installed, make a policy that passes the contract as they say."""
    module = "eplb_async_documented_policy"
    toml = block("toml", "[project.entry-points").replace("my_package.rotate", module)
    name, _, target = toml.splitlines()[1].replace('"', "").partition(" = ")
    install(tmp_path, module, block("python", '"""Rotates'), f"[eplb_async.policies]\n{name} = {target}\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert "rotate" in policy_names()
        exec(block("python", "from eplb_async.testing"), {})  # noqa: S102 - the documented lines themselves
        assert check_policy(load_policy("rotate"), {"step": 2}) > 200
    finally:
        sys.modules.pop(module, None)


def test_built_in_policies_and_options_are_listed() -> None:
    """The table has each built-in policy, with all its options."""
    listed = re.findall(r"^\| `(\w+)` \| (.*?) \|", TEXT.partition("## Built in")[2], re.MULTILINE)
    assert [name for name, _ in listed] == ["default", "flashlb", "frontier", "random", "static", "swift_balancer"]
    for name, options in listed:
        fields = [field.name for field in msgspec.structs.fields(load_policy(name).options_type)]
        assert re.findall(r"`(\w+)`", options) == fields

"""What the documentation says of settings is so: each one that it names exists, and each example of them loads."""

import json
import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from eplb_async.core.config import Settings, load_settings
from eplb_async.core.errors import ConfigError
from eplb_async.integrations.engine_group import ENGINE_DEFAULTS, engine_settings
from examples.vllm_offline import engine_arguments

__all__: list[str] = []

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
TABLES = {field.name: field.type for field in msgspec.structs.fields(Settings) if field.name != "runtime_dir"}
KNOWN = {"EPLB_ASYNC_CONFIG", "EPLB_ASYNC_RUNTIME_DIR"} | {
    f"EPLB_ASYNC_{table}_{field.name}".upper()
    for table, kind in TABLES.items()
    for field in msgspec.structs.fields(kind)
}
VARIABLE = re.compile(r"\bEPLB_ASYNC_[A-Z][A-Z_]*\b")
ASSIGNMENT = re.compile(r"\b(EPLB_ASYNC_[A-Z_]+)=([\w./-]+)")
ADDITIONAL = re.compile(r"--additional-config '(\{.*?\})'", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def additional_configs(text: str) -> list[str]:
    """Complete JSON of --additional-config; one with "..." is no example."""
    return [given for given in ADDITIONAL.findall(text) if "..." not in given]


@pytest.mark.parametrize("page", TEXTS)
def test_variables_exist(page: str) -> None:
    """Every EPLB_ASYNC_ variable of a page is one, and its examples have values that fit."""
    assert set(VARIABLE.findall(TEXTS[page])) <= KNOWN
    given = {name: value for name, value in ASSIGNMENT.findall(TEXTS[page]) if name != "EPLB_ASYNC_CONFIG"}
    load_settings(environ=given)


def test_additional_configs_load() -> None:
    """What is given to vLLM as --additional-config are settings that say something."""
    found = [json.loads(given)["eplb_async"] for text in TEXTS.values() for given in additional_configs(text)]
    assert {"daemon": {"move_cost": 300}} in found
    for given in found:
        assert engine_settings(given) != engine_settings()


def test_offline_example_gives_settings() -> None:
    """The policy named on its command line is the one of the daemon that the engine starts."""
    arguments = engine_arguments("model", 4, 16, "frontier")
    additional = arguments["additional_config"]
    assert isinstance(additional, dict)
    assert engine_settings(additional["eplb_async"]).daemon.policy == "frontier"


def test_readme_shows_defaults() -> None:
    """The TOML of the README loads, and all it has are the defaults, apart from where the runtime directory is."""
    text = TEXTS["README.md"]
    shown = tomllib.loads(text[text.index("```toml\n") + len("```toml\n") :].partition("```")[0])
    assert msgspec.structs.replace(msgspec.convert(shown, Settings), runtime_dir="") == Settings()
    assert shown["integration"] == msgspec.to_builtins(Settings().integration)


def test_integration_page_names_all() -> None:
    """The page for engines has every setting of [integration], and the plugins' own defaults as they are."""
    page = TEXTS["docs/integrations.md"]
    assert all(f"| `{field.name}` (" in page for field in msgspec.structs.fields(TABLES["integration"]))
    stated = dict(re.findall(r"`(\w+\.\w+)` (\d+)", page))
    assert stated == {
        f"{table}.{name}": f"{value:g}" for table, fields in ENGINE_DEFAULTS.items() for name, value in fields.items()
    }


def test_order_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page says: additional-config over environment over file over the plugins' defaults over ours."""
    file = tmp_path / "settings.toml"
    file.write_text("[hook]\npeer_deadline_s = 1\nattach_deadline_s = 1\n[daemon]\nexit_when_idle_s = 1\n")
    assert engine_settings().hook.peer_deadline_s == ENGINE_DEFAULTS["hook"]["peer_deadline_s"]
    assert engine_settings().hook.lag == Settings().hook.lag
    monkeypatch.setenv("EPLB_ASYNC_CONFIG", str(file))
    monkeypatch.setenv("EPLB_ASYNC_HOOK_ATTACH_DEADLINE_S", "2")
    monkeypatch.setenv("EPLB_ASYNC_DAEMON_EXIT_WHEN_IDLE_S", "2")
    settings = engine_settings({"daemon": {"exit_when_idle_s": 3}})
    assert (settings.hook.peer_deadline_s, settings.hook.attach_deadline_s) == (1, 2)
    assert settings.daemon.exit_when_idle_s == 3
    with pytest.raises(ConfigError, match=r"Known: .*policy"):
        engine_settings({"daemon": {"polciy": "frontier"}})


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    """Files that a page links to exist, and so do the headings named in them."""
    for path, anchor in LINK.findall(TEXTS[page]):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", target.read_text(encoding="utf-8"))
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor

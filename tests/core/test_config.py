"""Settings: the file, then the environment over it; nothing unknown or senseless gets through."""

import math
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from eplb_async.core import config
from eplb_async.core.config import (
    DaemonSettings,
    HookSettings,
    IntegrationSettings,
    Settings,
    daemon_variables,
    load_settings,
    policy_cache,
)
from eplb_async.core.daemon_settings import EAGER
from eplb_async.core.errors import ConfigError
from eplb_async.policies.registry import BUILT_IN, check_choice

EXAMPLE = """
runtime_dir = "/run/file"
[hook]
lag = 3
verify = "off"
peer_deadline_s = 5
[daemon]
policy = "static"
policy_options = { path = "x.npz", layers = [1, 2] }
min_gain = 0.5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A settings file."""
    path = tmp_path / "eplb_async.toml"
    path.write_text(EXAMPLE)
    return path


def test_defaults_without_file_and_environment() -> None:
    """Nothing given is the documented defaults."""
    settings = load_settings(None, {})
    assert settings == Settings()
    assert (settings.hook.lag, settings.hook.history, settings.hook.verify) == (2, 64, "all")
    assert (settings.daemon.policy, settings.daemon.policy_options, settings.daemon.exit_when_idle_s) == (
        "frontier",
        {},
        0,
    )


@pytest.mark.parametrize("policy", sorted(BUILT_IN))
def test_a_policy_alone_is_enough(policy: str) -> None:
    """No default belongs to one policy only: its name is all that a user has to set."""
    settings = load_settings(None, {"EPLB_ASYNC_DAEMON_POLICY": policy})
    check_choice(settings.daemon.policy, settings.daemon.policy_options)


def test_a_table_as_variables() -> None:
    """Every kind of value arrives as it is: text, numbers, inf, options."""
    daemon = {
        **EAGER,
        "policy_options": {"seed": 3},
        "window_steps": 7,
        "plan_deadline_s": float("inf"),
        "shadow": True,
    }
    assert load_settings(None, daemon_variables(daemon)).daemon == DaemonSettings(**daemon)
    assert set(EAGER) <= set(DaemonSettings.__struct_fields__)


def test_file_goes_over_defaults(file: Path) -> None:
    """What the file says holds, the rest keeps its default; a whole number is a fine number of seconds."""
    settings = load_settings(file, {})
    assert settings.runtime_dir == "/run/file"
    assert settings.hook == HookSettings(lag=3, verify="off", peer_deadline_s=5.0)
    options = {"path": "x.npz", "layers": [1, 2]}
    assert settings.daemon == DaemonSettings(policy="static", policy_options=options, min_gain=0.5)


def test_environment_goes_over_the_file(file: Path) -> None:
    """Variables of every type replace what the file says, and other programs' variables are left alone."""
    environ = {
        "EPLB_ASYNC_CONFIG": str(file),
        "EPLB_ASYNC_RUNTIME_DIR": "/run/environ",
        "EPLB_ASYNC_HOOK_LAG": "4",
        "EPLB_ASYNC_HOOK_VERIFY": "all",
        "EPLB_ASYNC_HOOK_PEER_DEADLINE_S": "2.5",
        "EPLB_ASYNC_DAEMON_POLICY": "random",
        "EPLB_ASYNC_DAEMON_POLICY_OPTIONS": '{"seed": 3}',
        "EPLB_OTHER": "1",
        "PATH": "/bin",
    }
    settings = load_settings(None, environ)
    assert settings.runtime_dir == "/run/environ"
    assert settings.hook == HookSettings(lag=4, verify="all", peer_deadline_s=2.5)
    assert settings.daemon == DaemonSettings(policy="random", policy_options={"seed": 3}, min_gain=0.5)


def test_named_file_goes_over_the_variable(file: Path, tmp_path: Path) -> None:
    """A path that is passed is read instead of the one that EPLB_ASYNC_CONFIG names."""
    other = tmp_path / "other.toml"
    other.write_text("[hook]\nlag = 9\n")
    assert load_settings(other, {"EPLB_ASYNC_CONFIG": str(file)}).hook.lag == 9


def test_pair_that_fits_only_together_is_accepted() -> None:
    """Lag and history are checked once both are set, in whatever order variables are read."""
    for lag, history in ((1, 4), (40, 82)):
        environ = {"EPLB_ASYNC_HOOK_LAG": str(lag), "EPLB_ASYNC_HOOK_HISTORY": str(history)}
        assert load_settings(None, environ).hook == HookSettings(lag=lag, history=history)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[hook]\nlagg = 3", ["unknown field `lagg`", "Known: lag, history"]),
        ("[daemon]\nlag = 3", ["unknown field `lag`", "Known: policy"]),
        ("[hooks]\nlag = 3", ["unknown field `hooks`", "Known: runtime_dir, hook, daemon"]),
        ('[hook]\nlag = "3"', ["Expected `int`", "$.hook.lag"]),
        ("[hook]\nlag = 2.5", ["Expected `int`"]),
        ("[hook]\nverify = true", ["Expected `str`"]),
        ("hook = 3", ["Expected `object`"]),
        ("[hook]\nlag = 0", ["`lag` is 0", "at least 1"]),
        ("[hook]\nlag = 32", ["`history` is 64", "at least 66"]),
        ("[hook]\nring_records = 1", ["`ring_records` is 1"]),
        ("[hook]\npeer_deadline_s = 0", ["`peer_deadline_s` is 0", "more than 0"]),
        ("[hook]\npeer_deadline_s = nan", ["`peer_deadline_s` is nan"]),
        ("[hook]\nidle_pull_bytes_per_step = 5", ["`idle_pull_bytes_per_step` is 5", "0 or at least", "67108864"]),
        ("[hook]\nleast_pull_bytes_per_step = 0", ["`least_pull_bytes_per_step` is 0"]),
        ("[hook]\npace_tolerance = -0.1", ["`pace_tolerance` is -0.1"]),
        ("[daemon]\npar_threshold = 0.9", ["`par_threshold` is 0.9"]),
        ("[daemon]\npar_threshold = nan", ["`par_threshold` is nan"]),
        ("[daemon]\nmin_gain = -0.1", ["`min_gain` is -0.1"]),
        ("[daemon]\nprefill_weight = -0.1", ["`prefill_weight` is -0.1"]),
        ("[daemon]\ndecode_weight = nan", ["`decode_weight` is nan"]),
        ("[daemon]\nprefill_weight = 1.5", ["(1.5, 1.0)", "the greater of them must be 1"]),
        ("[daemon]\nprefill_weight = 0.5\ndecode_weight = 0.25", ["(0.5, 0.25)", "must be 1"]),
        ('[daemon]\nserve = "decode"\nprefill_weight = 0.5', ["`serve` is 'decode'", 'for `serve` "all"']),
        ('[daemon]\nlog_level = "LOUD"', ["'LOUD'", "DEBUG, INFO"]),
        ("[hook\n", ["is not TOML"]),
        ("lag = \x00", ["is not TOML"]),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    """Unknown keys, other types and senseless values are errors that name the file, what was found and what is right."""
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path, {})
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    """No file, a directory, and bytes that are not UTF-8 are errors that name the path."""
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff = 1")
    for path, word in ((tmp_path / "none.toml", "cannot be read"), (tmp_path, "cannot be read"), (binary, "not TOML")):
        with pytest.raises(ConfigError, match=word) as caught:
            load_settings(None, {"EPLB_ASYNC_CONFIG": str(path)})
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("EPLB_ASYNC_HOOK_LAGG", "3", ["no such setting", "EPLB_ASYNC_HOOK_LAG,", "EPLB_ASYNC_DAEMON_POLICY,"]),
        ("EPLB_ASYNC_LAG", "3", ["no such setting"]),
        ("EPLB_ASYNC_", "3", ["no such setting"]),
        ("EPLB_ASYNC_HOOK", "{}", ["no such setting"]),
        ("EPLB_ASYNC_HOOK_LAG", "two", ["'two' does not fit", "`int`"]),
        ("EPLB_ASYNC_HOOK_LAG", "", ["'' does not fit"]),
        ("EPLB_ASYNC_HOOK_VERIFY", "perhaps", ["'perhaps' does not fit"]),
        ("EPLB_ASYNC_HOOK_LAG", "0", ["`lag` is 0"]),
        ("EPLB_ASYNC_DAEMON_PAR_THRESHOLD", "nan", ["`par_threshold` is nan"]),
        ("EPLB_ASYNC_DAEMON_POLICY_OPTIONS", "{seed: 3}", ["does not fit"]),
        ("EPLB_ASYNC_DAEMON_POLICY_OPTIONS", "[1]", ["Expected `object`"]),
        ("EPLB_ASYNC_DAEMON_POLICY_OPTIONS", '{"a": "\udcff"}', ["does not fit"]),
    ],
)
def test_bad_variables_are_refused(name: str, text: str, words: list[str]) -> None:
    """A variable that starts with our prefix must be a setting and fit; the error names it."""
    with pytest.raises(ConfigError) as caught:
        load_settings(None, {name: text})
    for word in [name, *words]:
        assert word in str(caught.value)


def test_settings_are_frozen() -> None:
    """Nobody changes settings after they were checked."""
    with pytest.raises(AttributeError):
        HookSettings().lag = 3  # type: ignore[misc]


def _some(names: type[msgspec.Struct], **values: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    assert set(values) <= set(names.__struct_fields__)
    return st.fixed_dictionaries({}, optional=values)


SECONDS = st.floats(min_value=1e-9, allow_nan=False) | st.just(math.inf)


@hypothesis_settings(max_examples=40)
@given(
    hook=_some(
        HookSettings,
        lag=st.integers(1, 31),
        verify=st.sampled_from(["all", "sample", "off"]),
        peer_deadline_s=SECONDS,
        plan_deadline_s=SECONDS,
    ),
    daemon=_some(
        DaemonSettings,
        policy=st.text("abc-_ é\n", max_size=5),
        policy_options=st.dictionaries(st.text(max_size=3), st.integers() | st.booleans() | st.text(max_size=3)),
        log_level=st.sampled_from(["DEBUG", "ERROR"]),
        poll_interval_s=SECONDS,
    ),
)
def test_a_child_gets_the_same_settings(hook: dict[str, object], daemon: dict[str, object]) -> None:
    """`settings_environment` makes load_settings of a child return these settings, over other files and variables."""
    settings = msgspec.convert({"runtime_dir": "/run/x", "hook": hook, "daemon": daemon}, Settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPLB_ASYNC_HOOK_LAG", "5")
        patch.setenv("EPLB_ASYNC_HOOK_PEER_DEADLINE_S", "7")
        patch.setenv("EPLB_ASYNC_DAEMON_POLICY", "static")
        child = {**os.environ, **config.settings_environment(settings)}
    assert load_settings(None, child) == settings


def test_a_child_gets_a_pair_that_fits_only_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for settings of which one alone does not fit what the child inherits."""
    monkeypatch.setenv("EPLB_ASYNC_HOOK_LAG", "5")
    settings = Settings(runtime_dir="/run/x", hook=HookSettings(lag=1, history=4))
    assert load_settings(None, {**os.environ, **config.settings_environment(settings)}) == settings


def test_defaults_of_plugins_lie_under_all_else(file: Path) -> None:
    """A table of defaults counts only for what neither file nor environment says, field by field."""
    defaults = {"hook": {"lag": 1, "copies_per_step": 9, "pull_bytes_per_step": 5}, "daemon": {"min_gain": 0.1}}
    environ = {"EPLB_ASYNC_HOOK_COPIES_PER_STEP": "7"}
    hook = load_settings(file, environ, defaults=defaults).hook
    assert (hook.lag, hook.copies_per_step, hook.pull_bytes_per_step) == (3, 7, 5)
    assert load_settings(file, environ, defaults=defaults).daemon.min_gain == 0.5
    assert load_settings(None, {}, defaults=defaults).daemon == DaemonSettings(min_gain=0.1)
    # the caller's tables are constants of a module
    assert defaults["hook"] == {"lag": 1, "copies_per_step": 9, "pull_bytes_per_step": 5}


def test_overrides_of_an_engine_go_over_all_else(file: Path) -> None:
    """What the engine's command line says replaces single fields of file and environment."""
    overrides = {"runtime_dir": "/run/engine", "hook": {"lag": 5}, "integration": {"enabled": False}}
    environ = {"EPLB_ASYNC_HOOK_LAG": "4", "EPLB_ASYNC_HOOK_COPIES_PER_STEP": "7"}
    settings = load_settings(file, environ, defaults={"hook": {"lag": 1}}, overrides=overrides)
    assert settings.runtime_dir == "/run/engine"
    assert settings.hook == HookSettings(lag=5, verify="off", peer_deadline_s=5.0, copies_per_step=7)
    assert settings.integration == IntegrationSettings(enabled=False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"hooks": {}}, ["settings given by the engine", "hooks", "Known: runtime_dir, hook, daemon, integration"]),
        ({"integration": {"enable": True}}, ["enable", "Known: enabled, any_version, group, daemon"]),
        ({"integration": {"daemon": "maybe"}}, ["maybe", "settings given by the engine"]),
        ({"hook": {"lag": "two"}}, ["settings given by the engine", "$.hook.lag"]),
        ({"hook": 3}, ["settings given by the engine", "$.hook"]),
    ],
)
def test_bad_overrides_are_refused(overrides: dict[str, object], words: list[str]) -> None:
    """The message says that the engine gave them, and what would be right."""
    with pytest.raises(ConfigError) as caught:
        load_settings(None, {}, overrides=overrides)
    assert [word for word in words if word not in str(caught.value)] == []


def test_settings_of_plugins() -> None:
    """On by default, for known releases, with a name of its own and a daemon that starts by itself; variables change each."""
    assert load_settings(None, {}).integration == IntegrationSettings(
        enabled=True, any_version=False, group="", daemon="auto"
    )
    environ = {
        "EPLB_ASYNC_INTEGRATION_ENABLED": "0",
        "EPLB_ASYNC_INTEGRATION_ANY_VERSION": "true",
        "EPLB_ASYNC_INTEGRATION_GROUP": "chat",
        "EPLB_ASYNC_INTEGRATION_DAEMON": "required",
    }
    settings = load_settings(None, environ)
    assert settings.integration == IntegrationSettings(enabled=False, any_version=True, group="chat", daemon="required")
    child = load_settings(None, config.settings_environment(settings))
    assert child.integration == settings.integration


@pytest.mark.parametrize(
    ("field", "text"), [("GROUP", "a/b"), ("GROUP", "x" * 65), ("DAEMON", "maybe"), ("ENABLED", "perhaps")]
)
def test_bad_settings_of_plugins_are_refused(field: str, text: str) -> None:
    """The message names the variable."""
    with pytest.raises(ConfigError, match=f"EPLB_ASYNC_INTEGRATION_{field}"):
        load_settings(None, {f"EPLB_ASYNC_INTEGRATION_{field}": text})


def test_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As set, else below XDG_RUNTIME_DIR, else in the temporary directory with the user's number."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert Settings(runtime_dir="/run/x").directory == Path("/run/x")
    assert Settings().directory == Path("/run/user/7/eplb_async")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert Settings().directory.name == f"eplb_async-{os.getuid()}"


def test_other_readings_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's name, systemd's socket, and a child's environment with our directory first on its import path."""
    for name in ("EPLB_ASYNC_CONFIG", "NOTIFY_SOCKET", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    assert (config.config_path(), config.notify_socket()) == (None, None)
    assert config.child_environment({}, "/a")["PYTHONPATH"] == "/a"
    monkeypatch.setenv("EPLB_ASYNC_CONFIG", "/etc/x.toml")
    monkeypatch.setenv("NOTIFY_SOCKET", "@systemd")
    monkeypatch.setenv("PYTHONPATH", "/b")
    assert (config.config_path(), config.notify_socket()) == ("/etc/x.toml", "@systemd")
    child = config.child_environment({"NOTIFY_SOCKET": "/c", "NEW": "1"}, "/a")
    assert (child["PYTHONPATH"], child["NOTIFY_SOCKET"], child["NEW"]) == ("/a:/b", "/c", "1")


@pytest.mark.parametrize("name", ["a", "deepseek-v3", "A.b_c-9", "-x", "x" * 64])
def test_group_names(name: str) -> None:
    """A name that can be part of a segment's name is returned."""
    assert config.check_group_name(name) == name


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "é", "x" * 65, "a\n", "../x", "a\0"])
def test_group_names_that_are_refused(name: str) -> None:
    """What could leave the directory of segments or be misread there is an error."""
    with pytest.raises(ConfigError, match="1 to 64 letters"):
        config.check_group_name(name)


def test_compiled_policies_of_other_sources_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each state of the policies' sources has its own folder of compiled code, unless NUMBA_CACHE_DIR names one."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    before = policy_cache(tmp_path)
    assert before == policy_cache(tmp_path)
    assert before.parent == tmp_path
    read_bytes = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: read_bytes(self) + (b"#" if self.name == "_kernels.py" else b"")
    )
    assert policy_cache(tmp_path) != before
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/somewhere")
    assert policy_cache(tmp_path) == Path("/somewhere")


def test_the_environment_leaves_the_given_defaults_alone() -> None:
    """Defaults are a constant of their caller: what one call reads over them must not be there at the next."""
    defaults = {"hook": {"lag": 3}}
    assert load_settings(environ={"EPLB_ASYNC_HOOK_LAG": "5"}, defaults=defaults).hook.lag == 5
    assert defaults == {"hook": {"lag": 3}}
    assert load_settings(environ={}, defaults=defaults).hook.lag == 3


@pytest.mark.parametrize("value", ["inf", "[1, nan]", "2026-01-02", "{ at = 07:30:00 }"])
def test_policy_options_that_json_cannot_hold_are_refused(tmp_path: Path, value: str) -> None:
    """They go to child processes as JSON, where inf would arrive as null and a date as text."""
    path = tmp_path / "settings.toml"
    path.write_text(f"[daemon.policy_options]\nlimit = {value}\n")
    with pytest.raises(ConfigError, match=r"policy_options.*JSON"):
        load_settings(path, environ={})

"""Policies are found by name, and whatever a policy or its caller does wrong is a clear error."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from eplb_async.core.errors import ConfigError, EplbError, PlacementError, PolicyError, SpecError, UnknownName
from eplb_async.core.placement import initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.policies import Policy, decode_options, load_policy, policy_names, run_policy
from eplb_async.policies.registry import (
    BUILT_IN,
    ENTRY_POINT_GROUP,
    check_choice,
    decode_dispatch,
    run_dispatch,
    run_loaded,
)
from tests.policies.third_party import install

SPEC = MoESpec(num_layers=2, num_experts=4, num_redundant=2, num_ranks=2)
LIVE = initial_placement(SPEC)
WINDOWS = np.ones((1, 2, 4))

MODULE = """
import msgspec
from eplb_async.policies import Policy
class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    factor: float = 1.0
class Bare(msgspec.Struct):
    factor: float = 1.0
class Needy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    factor: float
class Greedy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"mine": "dispatch"}):
    mine: float = 1.0
def stay(windows_TLE, slot_to_expert_LP, topology, options, state):
    return slot_to_expert_LP.copy(), state
def make(name, options=Options):
    return Policy(name=name, function=stay, options_type=options, summary="moves nothing")
good = make("stay")
misnamed = make("other")
loose = make("loose", Bare)
needy = make("needy", Needy)
greedy = make("greedy", Greedy)
mine = make("default")
"""


class NoOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """None."""


def policy_of(function: Callable[..., Any]) -> Policy:
    """An unregistered policy around a function."""
    return Policy(name="tested", function=function, options_type=NoOptions, summary="of a test")


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs MODULE as a distribution of its own, with the given entry points (lines `name = module:attribute`)."""
    number = 0

    def add(lines: str) -> None:
        nonlocal number
        number += 1
        module = f"eplb_async_test_policies_{number}"
        install(tmp_path / str(number), module, MODULE, f"[{ENTRY_POINT_GROUP}]\n{lines.replace('MODULE', module)}\n")
        monkeypatch.syspath_prepend(tmp_path / str(number))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return add


@pytest.mark.parametrize("module", ["eplb_async.policies", "eplb_async.policies.registry", "eplb_async.testing"])
def test_imports_no_numba(module: str) -> None:
    """Neither importing the registry nor loading the built-in policies by name loads numba; warming up does."""
    code = (
        f"import sys, {module}\n"
        "from eplb_async.policies import load_policy, policy_names\n"
        "assert 'eplb_async.policies.default' not in sys.modules\n"
        "policies = [load_policy(name) for name in policy_names()]\n"
        "assert 'numba' not in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_built_in_names() -> None:
    """The built-in policies come first, in the order of the alphabet, and carry the name they are found by."""
    names = policy_names()
    assert names[: len(BUILT_IN)] == sorted(BUILT_IN)
    assert {"default", "random", "static"} <= BUILT_IN.keys()
    assert [load_policy(name).name for name in BUILT_IN] == list(BUILT_IN)
    assert all(load_policy(name).summary.count("\n") == 0 for name in BUILT_IN)


def test_unknown_name_lists_the_known() -> None:
    """A misspelt name is answered with those that exist."""
    with pytest.raises(UnknownName, match=f"unknown policy 'defualt'; known: {', '.join(sorted(BUILT_IN))}"):
        load_policy("defualt")


def test_third_party_policy(third_party: Callable[[str], None]) -> None:
    """An entry point makes a policy known by its name, with its options decoded and its result checked."""
    third_party("stay = MODULE:good")
    assert policy_names() == [*sorted(BUILT_IN), "stay"]
    placement, state = run_policy("stay", WINDOWS, LIVE, SPEC, {"factor": 2}, b"kept")
    np.testing.assert_array_equal(placement, LIVE)
    assert state == b"kept"


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("stay", "MODULE:absent", "cannot be imported: AttributeError"),
        ("stay", "no_such_module_at_all:x", "cannot be imported: ModuleNotFoundError"),
        ("stay", "MODULE:stay", "is a function; needed an eplb_async Policy"),
        ("stay", "MODULE:misnamed", "calls itself 'other'"),
        ("loose", "MODULE:loose", "forbid_unknown_fields=True"),
        ("needy", "MODULE:needy", "without a default: factor"),
        ("greedy", "MODULE:greedy", "has an option 'dispatch', which every policy has already; rename it"),
    ],
)
def test_broken_third_party(third_party: Callable[[str], None], name: str, target: str, message: str) -> None:
    """A broken entry point is listed, and loading it says what is wrong with which distribution."""
    third_party(f"{name} = {target}")
    assert name in policy_names()
    with pytest.raises(PolicyError, match=message) as caught:
        load_policy(name)
    assert "eplb_async_test_policies_1" in str(caught.value)


def test_two_third_parties_with_one_name(third_party: Callable[[str], None]) -> None:
    """Which of two distributions is meant is not guessed."""
    third_party("stay = MODULE:good")
    third_party("stay = MODULE:good")
    with pytest.raises(PolicyError, match="is registered twice, by eplb_async_test_policies_"):
        load_policy("stay")


def test_built_in_names_cannot_be_taken_over(third_party: Callable[[str], None]) -> None:
    """A third party's `default` is not ours."""
    third_party("default = MODULE:mine")
    assert policy_names().count("default") == 1
    assert load_policy("default").summary != "moves nothing"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random", {"seeds": 1}, r"options of policy 'random'.*unknown field `seeds`.*its options: seed"),
        ("random", {"seeds": 1}, r"of every policy: dispatch, dispatch_strength"),
        (
            "random",
            {"dispatch": "weigthed"},
            r"options of policy 'random'.*'weigthed' - at `\$\.dispatch` .*\"weighted\"",
        ),
        ("random", {"dispatch": True}, r"Expected `str`, got `bool` - at `\$\.dispatch`"),
        ("random", {"dispatch_strength": "half"}, r"Expected `float`, got `str` - at `\$\.dispatch_strength`"),
        ("random", {"dispatch_strength": 1.5}, r"dispatch_strength is 1\.5; it must be from 0 to 1"),
        ("random", {"dispatch_strength": float("nan")}, r"dispatch_strength is nan"),
        ("random", {"seed": "1"}, r"Expected `int`, got `str` - at `\$\.seed`"),
        ("random", {"seed": -1}, "seed is -1; it must be at least 0"),
        ("default", {"relabel_ranks": 1}, r"Expected `bool`, got `int` - at `\$\.relabel_ranks`"),
    ],
)
def test_wrong_options(name: str, options: dict[str, object], message: str) -> None:
    """Options are decoded strictly, and the message names the field."""
    with pytest.raises(ConfigError, match=message):
        decode_options(load_policy(name), options)
    with pytest.raises(ConfigError, match=message):
        run_policy(name, WINDOWS, LIVE, SPEC, options)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (np.ones((2, 4)), r"shape \[2, 4\]"),
        (np.ones((0, 2, 4)), "at least 1"),
        (np.ones((1, 2, 5)), r"needed \[T, L, E\] = \[at least 1, 2, 4\]"),
        (np.full((1, 2, 4), np.nan), "window 0 has load nan for layer 0 expert 0"),
        (np.full((1, 2, 4), np.inf), "has load inf"),
        (np.concatenate([WINDOWS, -WINDOWS]), r"window 1 has load -1\.0"),
        (np.full((1, 2, 4), 1e308), "more than a float64 holds"),
        (np.ones((1, 2, 4), dtype=bool), "token counts, not bool"),
        (np.ones((1, 2, 4), dtype=complex), "token counts, not complex"),
    ],
)
def test_wrong_windows(windows: Any, message: str) -> None:
    """Windows that are no loads are refused before any policy sees them."""
    with pytest.raises(SpecError, match=message):
        run_policy("default", windows, LIVE, SPEC, {})


def test_wrong_live_placement() -> None:
    """A live placement that is none, or of other layers, is the caller's error and not the policy's."""
    with pytest.raises(PlacementError, match="needed"):
        run_policy("default", WINDOWS, LIVE[:, :-1], SPEC, {})
    with pytest.raises(PlacementError, match="1 layers"):
        run_policy("default", WINDOWS, LIVE[:1], SPEC, {})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (LIVE, r"returned ndarray; needed a tuple \(placement, state\)"),
        ((LIVE.tolist(), b""), r"returned \(list, bytes\)"),
        ((LIVE, "state"), r"returned \(ndarray, str\)"),
        ((LIVE[:1], b""), "a placement of 1 layers; needed 2"),
        ((LIVE.astype(float), b""), "an invalid placement: .*integers"),
        ((np.zeros_like(LIVE), b""), "an invalid placement: .*no slot for expert 1"),
        ((LIVE + 1, b""), "an invalid placement: .*names expert 4"),
        ((LIVE[:, :-1], b""), "an invalid placement: .*needed"),
    ],
)
def test_nonsense_from_a_policy(result: Any, message: str) -> None:
    """Whatever a policy returns is checked; the error names the policy and what is wrong."""
    with pytest.raises(PolicyError, match=f"policy 'tested' .*{message}"):
        run_loaded(policy_of(lambda *_: result), WINDOWS, LIVE, SPEC, {})


@pytest.mark.parametrize("error", [ValueError("too hot"), AssertionError(), EplbError("inner"), MemoryError()])
def test_a_policy_that_raises(error: Exception) -> None:
    """Any exception becomes a PolicyError with its type and text."""

    def fail(*_: Any) -> None:
        raise error

    with pytest.raises(PolicyError, match=f"raised {type(error).__name__}: {error}") as caught:
        run_loaded(policy_of(fail), WINDOWS, LIVE, SPEC, {})
    assert caught.value.__cause__ is error


def test_inputs_are_safe_from_a_policy() -> None:
    """A policy that writes to its inputs fails, and the caller's arrays are as they were."""

    def vandal(windows: Any, placement: Any, *_: Any) -> Any:
        windows[:] = 0
        return placement, b""

    windows, live = WINDOWS.copy(), LIVE.copy()
    with pytest.raises(PolicyError, match="read-only"):
        run_loaded(policy_of(vandal), windows, live, SPEC, {})
    np.testing.assert_array_equal(windows, WINDOWS)
    np.testing.assert_array_equal(live, LIVE)


def test_result_is_the_callers_own() -> None:
    """The returned placement is int32, contiguous, writable and shares no memory with what went in."""
    placement, _ = run_loaded(policy_of(lambda _w, live, *_: (live.astype(np.int64), b"")), WINDOWS, LIVE, SPEC, {})
    assert placement.dtype == np.int32
    assert placement.flags.c_contiguous
    assert placement.flags.writeable
    same, _ = run_loaded(policy_of(lambda _w, live, *_: (live, b"")), WINDOWS, LIVE, SPEC, {})
    assert same.flags.writeable
    assert not np.shares_memory(same, LIVE)


def test_integer_windows_are_counts() -> None:
    """Loads may come in any real dtype; the policy sees float64."""
    seen = []

    def look(windows: Any, live: Any, *_: Any) -> Any:
        seen.append(windows.dtype)
        return live.copy(), b""

    run_loaded(policy_of(look), WINDOWS.astype(np.int32), LIVE, SPEC, {})
    assert seen == [np.float64]


def test_prepared_options_reach_the_policy() -> None:
    """`prepare_options` runs before the function, which gets what it made; its own crash is a PolicyError."""

    def look(windows_TLE: Any, slot_to_expert_LP: Any, topology: Any, options: Any, state: bytes) -> Any:
        return slot_to_expert_LP.copy(), options

    good = Policy(
        name="tested",
        function=look,
        options_type=NoOptions,
        summary="of a test",
        prepare_options=lambda _options, spec: bytes([spec.num_experts]),
    )
    assert run_loaded(good, WINDOWS, LIVE, SPEC, {})[1] == b"\x04"
    bad = Policy(name="tested", function=look, options_type=NoOptions, summary="", prepare_options=lambda *_: 1 // 0)
    with pytest.raises(PolicyError, match="cannot prepare its options: ZeroDivisionError"):
        run_loaded(bad, WINDOWS, LIVE, SPEC, {})


def test_check_choice_names_what_is_wrong() -> None:
    """A daemon refuses an unknown policy and bad options of a built-in one at its start; good ones pass."""
    check_choice("default", {"relabel_ranks": True})
    with pytest.raises(UnknownName, match=f"'nope'; known: {', '.join(sorted(BUILT_IN))}"):
        check_choice("nope", {})
    with pytest.raises(ConfigError, match="relabel"):
        check_choice("default", {"relabel_ranks": "much"})


def test_check_choice_looks_at_planning_options_of_third_parties(third_party: Callable[[str], None]) -> None:
    """What every policy has is checked for a third party's too, without importing it; its own options are not."""
    third_party("stay = MODULE:absent")
    check_choice("stay", {"anything": 1, "dispatch": "weighted"})
    with pytest.raises(ConfigError, match=r"options of policy 'stay': .*dispatch_strength"):
        check_choice("stay", {"dispatch_strength": 2})


@pytest.mark.parametrize("name", ["default", "random", "stay"])
def test_a_policy_does_not_see_planning_options(third_party: Callable[[str], None], name: str) -> None:
    """They go with the options of any policy, built in or not, and change nothing about its placement."""
    third_party("stay = MODULE:good")
    options = {"dispatch": "weighted", "dispatch_strength": 0.5}
    placement, _ = run_policy(name, WINDOWS, LIVE, SPEC, options)
    np.testing.assert_array_equal(placement, run_policy(name, WINDOWS, LIVE, SPEC, {})[0])
    assert decode_options(load_policy(name), options) == decode_options(load_policy(name), {})
    assert decode_dispatch(name, options).dispatch_strength == 0.5


def test_run_dispatch_gives_tables_where_they_are_asked_for() -> None:
    """None for an even split; else tables that use the given strength; wrong input is refused as by run_policy."""
    spec = MoESpec(num_layers=1, num_experts=2, num_redundant=2, num_ranks=2, table_length=4)
    windows, rows_LP = np.array([[[80, 40]]]), np.array([[0, 1, 0, -1]], dtype=np.int32)
    assert run_dispatch("random", windows, rows_LP, spec, {}) is None
    fitted = run_dispatch("random", windows, rows_LP, spec, {"dispatch": "weighted", "dispatch_strength": 1, "seed": 1})
    assert fitted is not None
    assert fitted.table_LEK.tolist() == [[[0, 2, 2, 2], [1, -1, -1, -1]]]
    hedged = run_dispatch("random", windows, rows_LP, spec, {"dispatch": "weighted"})
    assert hedged is not None
    assert hedged.table_LEK[0, 0].tolist() == [0, 2, 2, -1]
    none = run_dispatch("random", windows, rows_LP, spec, {"dispatch": "weighted", "dispatch_strength": 0})
    assert none is not None
    assert none.even_L.all()
    with pytest.raises(ConfigError, match="dispatch"):
        run_dispatch("random", windows, rows_LP, spec, {"dispatch": "none"})
    with pytest.raises(SpecError, match="load -80"):
        run_dispatch("random", -windows, rows_LP, spec, {"dispatch": "weighted"})
    with pytest.raises(PlacementError, match="no slot for expert 1"):
        run_dispatch("random", windows, 0 * rows_LP, spec, {"dispatch": "weighted"})

"""Offline planning: the report is about the windows and maps that were asked for, whatever policy made the plan."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from eplb_async.core.errors import ConfigError, EplbError, PolicyError, SpecError, UnknownName
from eplb_async.core.placement import initial_placement, validate_placement
from eplb_async.core.score import windows_par
from eplb_async.policies.base import Policy
from eplb_async.policies.registry import run_policy
from eplb_async.runtime import offline
from eplb_async.runtime.offline import OfflineRequest, Shape, Span, chosen_windows, plan_offline

__all__: list[str] = []

SHAPE = Shape(num_slots=12, num_ranks=4)
TRACE = np.random.default_rng(5).poisson(
    np.random.default_rng(1).lognormal(sigma=1.2, size=(3, 8)) * 90, size=(6, 3, 8)
)
PUBLISHED = [600, 560, 120, 120, 20, 10, 10, 10]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """A trace of 6 windows, 3 layers and 8 experts, as a file."""
    np.savez_compressed(tmp_path / "trace.npz", counts=TRACE.astype(np.int32), model="m")
    return str(tmp_path / "trace.npz")


@pytest.mark.parametrize(
    ("planned", "following", "expected"),
    [
        (None, None, ((0, 10), None)),
        ((0, 4), None, ((0, 4), (4, 8))),
        ((-3, None), None, ((7, 10), None)),
        ((None, 6), None, ((0, 6), (6, 10))),
        ((2, 3), None, ((2, 3), (3, 4))),
        ((2, -6), (-1, None), ((2, 4), (9, 10))),
        (None, (0, 1), ((0, 10), (0, 1))),
    ],
)
def test_chosen_windows(
    planned: Span | None, following: Span | None, expected: tuple[tuple[int, int], tuple[int, int] | None]
) -> None:
    """All by default; next are as many as were planned on, as far as the trace goes, unless they are chosen too."""
    assert chosen_windows(10, planned, following) == expected


@pytest.mark.parametrize("span", [(4, 4), (5, 2), (0, 11), (-11, None), (10, None), (None, -10)])
def test_windows_beyond_the_trace(span: Span) -> None:
    """What selects nothing, or reaches beyond, is an error that says how many there are."""
    with pytest.raises(ConfigError, match=r"--windows \S*: does not fit 10 windows"):
        chosen_windows(10, span, None)
    with pytest.raises(ConfigError, match="--next"):
        chosen_windows(10, None, span)


def test_the_published_example(tmp_path: Path) -> None:
    """The small example of the literature: the greedy reaches 232 where the mean is 181.25."""
    (tmp_path / "loads.json").write_text(json.dumps(PUBLISHED))
    request = OfflineRequest(
        loads=str(tmp_path / "loads.json"), policy="default", shape=Shape(num_slots=16, num_ranks=8)
    )
    report = plan_offline(request)
    assert (report.max_load, report.par, report.max_load_before) == (232.0, 1.28, 580.0)
    assert report.bound >= 181.25
    assert report.gap == pytest.approx(232 / report.bound - 1)
    assert (report.num_layers, report.num_windows, report.windows, report.next_windows) == (1, 1, (0, 1), None)


def test_report_is_of_the_chosen_windows(trace: str) -> None:
    """The policy sees the windows planned on and no others; PAR is of these, and of those that come next."""
    request = OfflineRequest(loads=trace, policy="default", shape=SHAPE, windows=(1, 3), slot_bytes=10)
    report = plan_offline(request)
    spec = SHAPE.spec(3, 8)
    live = initial_placement(spec)
    placement, _ = run_policy("default", TRACE[1:3], live, spec, {})
    assert report.slot_to_expert == placement.tolist()
    assert (report.windows, report.next_windows, report.num_windows) == ((1, 3), (3, 5), 6)
    assert report.par_L == windows_par(TRACE[1:3].astype(float), placement, spec.topology).tolist()
    assert report.par_before_L == windows_par(TRACE[1:3].astype(float), live, spec.topology).tolist()
    assert report.par_next_L == windows_par(TRACE[3:5].astype(float), placement, spec.topology).tolist()
    assert report.par_next_before_L == windows_par(TRACE[3:5].astype(float), live, spec.topology).tolist()
    assert report.transfer_bytes == 10 * report.moved
    assert (report.options["relabel_ranks"], report.options["dispatch"]) == (False, "even")
    assert report.table_length == spec.max_replicas
    assert 0 <= report.gap < report.par_before - 1


def test_a_written_map_is_where_the_next_plan_starts(trace: str, tmp_path: Path) -> None:
    """`out` of one run is `current` of the next, and a file for the policy `static`."""
    out = tmp_path / "map.json"
    first = plan_offline(OfflineRequest(loads=trace, policy="random", shape=SHAPE, options={"seed": 3}, out=out))
    assert json.loads(out.read_text()) == first.slot_to_expert
    kept = OfflineRequest(loads=trace, policy="static", shape=SHAPE, options={"path": str(out)}, current=out)
    second = plan_offline(kept)
    assert second.slot_to_expert == first.slot_to_expert
    assert (second.moved, second.slots_changed, second.layers_changed) == (0, 0, 0)
    assert second.par == second.par_before == first.par


def test_weighted_dispatch_is_fitted_and_scored(trace: str) -> None:
    """With the option of every policy, tables come with the placement and the balance is theirs."""
    options = {"seed": 2, "dispatch": "weighted"}
    request = OfflineRequest(loads=trace, policy="random", shape=SHAPE, options=options, windows=(0, 3), repeats=1)
    weighted, even = plan_offline(request), plan_offline(replace(request, options={"seed": 2}))
    assert weighted.slot_to_expert == even.slot_to_expert
    assert (even.dispatch, even.dispatch_ms, even.weighted_layers) == (None, None, 0)
    assert weighted.options == {"seed": 2, "dispatch": "weighted", "dispatch_strength": 0.75}
    assert weighted.dispatch is not None
    assert weighted.dispatch_ms is not None
    for rows, row_P in zip(weighted.dispatch, weighted.slot_to_expert, strict=True):
        assert [sorted(set(row)) for row in rows] == [
            [slot for slot, held in enumerate(row_P) if held == expert] for expert in range(8)
        ]
    assert weighted.weighted_layers > 0
    assert weighted.par < even.par
    assert weighted.par_before == even.par_before
    assert weighted.par_next != even.par_next


@pytest.mark.parametrize("policy", ["default", "random"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(num_slots=8, num_ranks=1),
        Shape(num_slots=8, num_ranks=8),
        Shape(num_slots=16, num_ranks=4, num_nodes=2, num_expert_groups=4),
        Shape(num_slots=40, num_ranks=4),
        Shape(num_slots=16, num_ranks=8, table_length=2),
    ],
)
def test_any_shape(trace: str, policy: str, shape: Shape) -> None:
    """Every valid shape gives a valid placement, no better than the bound, and a report that is JSON."""
    report = plan_offline(OfflineRequest(loads=trace, policy=policy, shape=shape, repeats=1))
    validate_placement(np.array(report.slot_to_expert), shape.spec(3, 8))
    assert min(report.gap_L) >= 0
    assert (report.par >= 1, report.par_max >= report.par) == (True, True)
    assert msgspec.json.decode(msgspec.json.encode(report), type=type(report)) == report


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(num_slots=7, num_ranks=1), "7 slots are too few for 8 experts"),
        (Shape(num_slots=10, num_ranks=4), "10 slots do not divide over 4 ranks; use 12 slots or 8"),
        (Shape(num_slots=9, num_ranks=6), "9 slots do not divide over 6 ranks; use 12 slots$"),
        (Shape(num_slots=12, num_ranks=4, num_nodes=3), "4 ranks do not divide over 3 nodes"),
        (Shape(num_slots=12, num_ranks=4, num_expert_groups=3), "8 experts do not divide into 3 expert groups"),
        (Shape(num_slots=12, num_ranks=4, num_expert_groups=9), "8 experts do not divide into 9 expert groups"),
        (Shape(num_slots=24, num_ranks=4, table_length=2), "table_length is 2, but 24 slots for 8 experts need 3"),
    ],
)
def test_shapes_that_do_not_fit(trace: str, shape: Shape, message: str) -> None:
    """An error says which numbers do not fit together, in the words of the request."""
    with pytest.raises(SpecError, match=message):
        plan_offline(OfflineRequest(loads=trace, policy="default", shape=shape))


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"policy": "nope"}, UnknownName),
        ({"options": {"nope": 1}}, ConfigError),
        ({"windows": (7, 8)}, ConfigError),
        ({"loads": "/no/such.json"}, ConfigError),
        ({"current": Path("/no/such.json")}, ConfigError),
        ({"policy": "static"}, ConfigError),
        ({"policy": "static", "options": {"path": "/no/such.json"}}, ConfigError),
        ({"shape": Shape(num_slots=10, num_ranks=4)}, SpecError),
    ],
)
def test_nothing_is_written_when_it_fails(trace: str, tmp_path: Path, changed: dict[str, Any], kind: type) -> None:
    """Whatever is wrong, a map that was there is as it was."""
    out = tmp_path / "out.json"
    out.write_text("as it was")
    arguments: dict[str, Any] = {"loads": trace, "policy": "default", "shape": SHAPE, "out": out}
    with pytest.raises(EplbError) as caught:
        plan_offline(OfflineRequest(**(arguments | changed)))
    assert type(caught.value) is kind
    assert out.read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "trace.npz"]


class NoOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """None."""


def test_times_are_of_warm_plans(trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up and one plan come before the timed ones, each from the same input and without state; progress tells."""
    calls: list[str] = []

    def plan(windows_TLE: Any, slot_to_expert_LP: Any, topology: Any, options: Any, state: bytes) -> tuple[Any, bytes]:
        calls.append(f"{windows_TLE.shape} {state!r}")
        return slot_to_expert_LP.copy(), b"more"

    policy = Policy(name="p", function=plan, options_type=NoOptions, summary="s", warm_up=lambda: calls.append("warm"))
    monkeypatch.setattr(offline, "load_policy", lambda _: policy)
    told: list[str] = []
    report = plan_offline(OfflineRequest(loads=trace, policy="p", shape=SHAPE, windows=(0, 2), repeats=4), told.append)
    assert calls == ["warm", *["(2, 3, 8) b''"] * 5]
    assert (report.repeats, report.moved) == (4, 0)
    assert 0 <= report.ms < report.warm_up_ms + 1e3
    assert told[0] == "reading"
    assert [text for text in told if "seconds the first time" in text]


@pytest.mark.parametrize("fails", ["warm_up", "function"])
def test_a_policy_that_fails(trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """A policy that cannot be warmed up, or cannot plan, is a PolicyError; nothing is written."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("too hot")

    fine: dict[str, Any] = {"warm_up": lambda: None, "function": lambda _w, live, *_: (live.copy(), b"")}
    policy = Policy(name="p", options_type=NoOptions, summary="s", **(fine | {fails: fail}))
    monkeypatch.setattr(offline, "load_policy", lambda _: policy)
    with pytest.raises(PolicyError, match="RuntimeError: too hot"):
        plan_offline(OfflineRequest(loads=trace, policy="p", shape=SHAPE, out=tmp_path / "out.json"))
    assert not (tmp_path / "out.json").exists()

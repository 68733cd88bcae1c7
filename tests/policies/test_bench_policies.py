"""The policy benchmark measures what it says, goes on when a policy fails, and writes its tables, rows and pictures."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import typer
from numpy.typing import NDArray

from benchmarks import bench_policies, policy_cases, policy_plots
from benchmarks.policy_candidates import Candidate, chosen_candidates, parse_candidate, parse_sweep, peer_versions
from benchmarks.policy_cases import Case, Trace, chosen_cases, domain, synthetic_case, trace_case
from benchmarks.policy_measure import (
    Planned,
    interval_bound,
    interval_par,
    measure,
    moved_share,
    reference_rows,
    timed,
)
from benchmarks.policy_scaling import SERIES, Point, measure_scaling, scaling_table
from benchmarks.reporting import Column, markdown_tables
from eplb_async.core.errors import PolicyError
from eplb_async.core.spec import MoESpec, Topology
from eplb_async.policies.base import Policy
from eplb_async.policies.random_placement import RandomOptions

ROOT = Path(__file__).resolve().parents[2]
TINY = {"num_layers": 2, "num_experts": 8, "num_redundant": 4, "num_ranks": 4}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two synthetic cases that plan in no time, and nothing else to choose from; no other engine is looked for."""
    monkeypatch.setattr(policy_cases, "SYNTHETIC", {"tiny": TINY, "calm": TINY})
    monkeypatch.delenv("EPLB_PEERS", raising=False)


def stub(name: str, *placements: object) -> Candidate:
    """A policy that returns these in turn, counted by its state; exceptions are raised."""

    def function(
        windows_TLE: NDArray[np.float64],
        slot_to_expert_LP: NDArray[np.int32],
        topology: Topology,
        options: Any,
        state: bytes,
    ) -> tuple[NDArray[np.int32], bytes]:
        placed = placements[len(state)]
        if isinstance(placed, Exception):
            raise placed
        return np.array(placed, dtype=np.int32), state + b"."

    return Candidate(label=name, policy=Policy(name=name, function=function, options_type=RandomOptions, summary=name))


def one_layer(windows_TE: list[list[float]], interval: int = 1, domains: str = "") -> Case:
    """Two experts on two ranks, with a spare slot each."""
    spec = MoESpec(num_layers=1, num_experts=2, num_redundant=2, num_ranks=2)
    return Case(
        name="by-hand",
        spec=spec,
        windows_TLE=np.array(windows_TE)[:, None],
        interval=interval,
        domains=[frozenset([letter]) for letter in domains] or None,
    )


def test_command_prints_and_writes_rows(tmp_path: Path) -> None:
    """As a user runs it: a table with ratios and the machine above it, the same rows in the file, progress on stderr."""
    file = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/bench_policies.py", "--case", "qwen3-235b", "--repeats", "1"]
    command += ["--policy", "random", "--policy", "random:seed=3", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "python benchmarks/bench_policies.py" in done.stdout
    assert "(1.00x)" in done.stdout
    assert "[1/1] qwen3-235b: random:seed=3:" in done.stderr
    written = msgspec.json.decode(file.read_bytes())
    assert written["header"]["numpy"] == np.__version__
    labels = ["random", "random:seed=3", "(initial placement)", "(lower bound)"]
    assert [row["policy"] for row in written["rows"]] == labels
    assert all(row["par_planned"] >= 1 for row in written["rows"])


@pytest.mark.usefixtures("tiny")
def test_markdown_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep adds a row per value; each case has a picture."""
    pytest.importorskip("matplotlib")
    markdown = tmp_path / "tables.md"
    sweep, pictures = ["random:seed=[1,2]"], tmp_path / "pictures"
    bench_policies.main(policy=["random"], case=["tiny"], sweep=sweep, markdown=markdown, plots=pictures, repeats=1)
    text = markdown.read_text()
    assert "numpy: " in text
    for line in ("**tiny: 2 x 8 -> 12 on 4, 9 windows**", "| random | ", "| random:seed=2 | "):
        assert line in text
    assert (pictures / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert f"drew {pictures / 'tiny.png'}" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_no_pictures_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without matplotlib the rest is done, and a message says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bench_policies.main(policy=["random"], case=["tiny"], json=tmp_path / "rows.json", plots=tmp_path / "pictures")
    assert policy_plots.MISSING in capsys.readouterr().err
    assert (tmp_path / "rows.json").exists()
    assert not (tmp_path / "pictures").exists()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"case": ["nothing"]}, "unknown case 'nothing'; known: tiny, calm"),
        ({"policy": ["nothing"]}, "default"),
        ({"policy": ["random:sed=1"]}, "sed"),
        ({"policy": ["random:seed=x"]}, "JSON"),
        ({"sweep": ["random:seed=1"]}, "0 options with a list"),
        ({"peers_dir": Path("/nowhere/at/all")}, "/nowhere/at/all"),
        ({"json": Path("/nowhere/at/all.json")}, "/nowhere/at is not a folder"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Whatever is wrong is said before anything is measured, with what there is to choose from."""
    with pytest.raises(typer.BadParameter, match=message):
        bench_policies.main(traces=tmp_path, **arguments)


def test_failing_policies_are_shown_and_the_run_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that raises or is invalid counts as failed and leaves the placement; the other policies are not touched."""
    case = one_layer([[6, 2]] * 4)
    sometimes = stub("sometimes", [[0, 0, 1, 1]], PolicyError("sometimes", "is out of luck"))
    never = stub("never", [[0, 0, 0, 0]])
    policies = {
        "sometimes": sometimes.policy,
        "never": never.policy,
        "always": stub("always", *[[[0, 1, 0, 1]]] * 3).policy,
    }
    monkeypatch.setattr(bench_policies, "load_peers_from", lambda folder: policies)
    monkeypatch.setattr(bench_policies, "chosen_cases", lambda *_: [case])
    bench_policies.main(policy=["sometimes", "never", "always"], repeats=1)
    output = capsys.readouterr()
    assert "by-hand: sometimes: 0.0 s, failed: 2 of 3" in output.err
    assert "is out of luck" in output.out
    assert "has no slot for expert 1" in output.out
    rows = {row["policy"]: row for row in bench_policies.measure_cases([case], [sometimes, never], 1)}
    assert rows["sometimes"]["failures"] == "2 of 3"
    # the first plan's placement holds, one expert on each rank (initially each rank has both, and PAR is 1)
    assert rows["sometimes"]["par_next"] == 1.5
    assert rows["never"]["failures"] == "3 of 3"
    assert "par_next" not in rows["never"]


def test_interval_is_the_mean_of_its_windows() -> None:
    """Windows count alike, however many tokens they have: the example of the docstring, through a whole case.

    Interval 1 has loads [3, 1] and [40, 40] on a rank each: PAR 1.5 and 1, mean 1.25. Interval 2 has [1, 3] and [30, 10]:
    1.5 twice. Balancedness of the second: (2 + 20) / (3 + 30).
    """
    case = one_layer([[3, 1], [40, 40], [1, 3], [30, 10], [9, 9]], interval=2)
    assert case.num_intervals == 2
    apart = [[0, 0, 1, 1]]
    np.testing.assert_allclose(
        interval_par(case.windows(0), Planned(np.array(apart, np.int32)), case.spec.topology), 1.25
    )
    row = measure(case, stub("apart", apart), repeats=1, bound=1.25)
    assert (row["par_planned"], row["par_next"]) == (1.25, 1.5)
    assert row["balancedness"] == pytest.approx(22 / 33)
    assert row["gap"] == 0
    # initially [0, 1 | 0, 1]: rank 0 gets a second 0 for its 1, rank 1 a second 1
    assert row["moved_share"] == 0.5
    # a rank has as many slots as there are experts, so it need not repeat one
    assert row["duplicates"] == 2


def test_bound_is_below_any_placement() -> None:
    """The bound of an interval is the mean of its windows' bounds: with one slot per expert, the hottest's share."""
    topology = Topology(num_ranks=2, slots_per_rank=1)
    windows_TLE = np.array([[[3.0, 1.0]], [[40.0, 40.0]]])
    assert interval_bound(windows_TLE, topology) == (1.5 + 1) / 2
    rows = reference_rows(one_layer([[3, 1], [40, 40]]))
    assert [row["par_planned"] for row in rows] == [1.0, 1.0]


def test_split_by_domain() -> None:
    """Next is split into intervals of the same domain and those where one of the two intervals has another."""
    assert [one_layer([[1, 1]] * 4, domains="aabb").changes_after(plan) for plan in range(3)] == [False, True, False]
    two = one_layer([[1, 1]] * 6, interval=2, domains="aaaabb")
    assert [two.changes_after(plan) for plan in range(2)] == [False, True]
    assert one_layer([[1, 1]] * 2).changes_after(0) is None
    # kept apart, rank loads are the windows': PAR 1 next in the same domain, 1.5 at the change
    row = measure(one_layer([[2, 2], [2, 2], [3, 1]], domains="aab"), stub("apart", *[[[0, 0, 1, 1]]] * 2), 1, 1.0)
    assert (row["par_same"], row["par_change"], row["par_next"]) == (1.0, 1.5, 1.25)
    assert "par_same" not in measure(one_layer([[2, 2], [3, 1]]), stub("apart", [[0, 0, 1, 1]]), 1, 1.0)


def test_domain_of_a_label() -> None:
    """All before a slash, without the number at the end."""
    labels = ["code_raw_07", "gpqa_diamond/Genetics/False_True", "iter121", "french-qa", "gsm8k"]
    assert [domain(label) for label in labels] == ["code_raw", "gpqa_diamond", "iter", "french-qa", "gsm8k"]


def test_trace_as_summed_windows_and_as_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace is two cases: windows summed, their domains united, and intervals of the windows as recorded."""
    monkeypatch.setattr(policy_cases, "SYNTHETIC", {})
    monkeypatch.setattr(policy_cases, "TRACES", {"t": Trace(redundant=2, ranks=2, most_windows=2, interval=3)})
    counts = np.arange(24, dtype=np.int32).reshape(6, 1, 4)
    np.savez(tmp_path / "t.npz", counts=counts, window_labels=np.array(["a_1", "a_2", "b_1", "b_2", "b_3", "b_4"]))
    summed, steps = chosen_cases([], tmp_path)
    np.testing.assert_array_equal(summed.windows_TLE, [counts[:3].sum(axis=0), counts[3:].sum(axis=0)])
    assert summed.domains == [frozenset("ab"), frozenset("b")]
    assert summed.label == "t: 1 x 4 -> 6 on 2, 2 windows, each the sum of 3"
    assert (steps.name, steps.num_intervals, steps.label) == (
        "t@steps",
        2,
        "t@steps: 1 x 4 -> 6 on 2, 2 intervals of 3 windows",
    )
    np.testing.assert_array_equal(steps.windows(1), counts[3:])
    [shorter] = chosen_cases(["t@steps"], tmp_path, interval=2)
    assert (shorter.interval, shorter.num_intervals) == (2, 3)
    np.savez(tmp_path / "t.npz", counts=counts, window_labels=np.array([f"iter{step}" for step in range(6)]))
    assert trace_case(tmp_path / "t.npz").domains is None
    with pytest.raises(ValueError, match="two intervals of 4 need 8"):
        trace_case(tmp_path / "t.npz", 4)


def test_calm_differs_by_noise_alone() -> None:
    """The calm case's windows are samples of one load; the others drift away from it."""
    calm, drifting = (synthetic_case(name).windows_TLE for name in ("calm", "deepseek-v3"))
    changed = [np.abs(windows[8] - windows[0]).sum() / windows[0].sum() for windows in (calm, drifting)]
    assert changed[0] < 0.03
    assert changed[1] > 0.2


def test_moved_share() -> None:
    """Slot order inside a rank costs nothing; an expert new to a rank, or there once more, costs its slot."""
    spec = MoESpec(num_layers=1, num_experts=3, num_redundant=1, num_ranks=2)
    before = np.array([[0, 1, 2, 0]], dtype=np.int32)
    assert moved_share(before, np.array([[1, 0, 0, 2]], dtype=np.int32), spec) == 0
    assert moved_share(before, np.array([[0, 2, 1, 0]], dtype=np.int32), spec) == 0.5


def test_moves_with_and_without_the_first_plan() -> None:
    """The first plan leaves the initial placement, which says little of those that follow: they have a mean of their own."""
    apart, both = [[0, 0, 1, 1]], [[0, 1, 0, 1]]
    case = one_layer([[1, 1]] * 5)
    row = measure(case, stub("settles", apart, both, both, both), repeats=1, bound=1.0)
    assert (row["moved_share"], row["moved_later"]) == (1 / 4, pytest.approx(1 / 6))
    assert "moved_later" not in measure(one_layer([[1, 1]] * 2), stub("once", apart), repeats=1, bound=1.0)


def test_weighted_dispatch_is_scored_and_timed() -> None:
    """With fitted tables an expert's tokens are split as they say, in the score too."""
    case = one_layer([[12, 4], [12, 4]])
    even, weighted = (
        measure(case, Candidate(label=name, policy=stub(name, [[0, 1, 0, -1]]).policy, options=options), 1, 1.0)
        for name, options in (("even", {}), ("weighted", {"dispatch": "weighted"}))
    )
    assert even["par_planned"] == 10 / 8
    assert weighted["par_planned"] < 1.1


def test_long_plans_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is repeated only while it is quick."""
    case, apart = one_layer([[1, 1], [1, 1]]), stub("apart", [[0, 0, 1, 1]])
    given = (case.windows(0), Planned(np.array([[0, 1, 0, 1]], np.int32)), case.spec)
    assert len(timed(apart, RandomOptions(), given, 4)[1]) == 4
    monkeypatch.setattr("benchmarks.policy_measure.LONG_MS", 0.0)
    assert len(timed(apart, RandomOptions(), given, 4)[1]) == 1


def test_lists_in_options_and_sweeps() -> None:
    """A list may hold commas; a sweep is one candidate per value, the other options as given."""
    peers = {"peer": Policy(name="peer", function=stub("peer").policy.function, options_type=RandomOptions, summary="")}
    assert parse_candidate("peer:a=[1,2],b=true", peers).options == {"a": [1, 2], "b": True}
    swept = parse_sweep("random:seed=[1,20]", {})
    assert [(one.label, one.options, one.sweep) for one in swept] == [
        ("random:seed=1", {"seed": 1}, "random: seed"),
        ("random:seed=20", {"seed": 20}, "random: seed"),
    ]
    assert [one.label for one in parse_sweep("peer:fixed=2,seed=[3]", peers)] == ["peer:fixed=2,seed=3"]
    labels = [one.label for one in chosen_candidates([], [], peers)]
    assert labels[-1] == "peer"
    assert {"default", "random"} < set(labels)
    assert "static" not in labels


def test_versions_of_unpacked_wheels(tmp_path: Path) -> None:
    """They are read from the metadata in the folder, or in folders of it."""
    for folder in ("engine/engine-1.2.dist-info", "other-3.4.dist-info"):
        (tmp_path / folder).mkdir(parents=True)
        name, version = Path(folder).name.removesuffix(".dist-info").split("-")
        (tmp_path / folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    assert peer_versions(tmp_path) == {"engine": "1.2", "other": "3.4"}
    assert peer_versions(None) == {}


def test_scaling_leaves_out_what_takes_long() -> None:
    """After a plan over the limit larger points are left out, smaller ones and other policies are not; failures are said."""
    small, middle, large = Point(8, 2, 2), Point(8, 4, 4), Point(16, 4, 4, 2)
    assert large.at_least(middle)
    assert not Point(8, 4, 4, 2).at_least(large)
    random, broken = parse_candidate("random", {}), stub("broken", ValueError("cannot"))
    said: list[str] = []
    series = {"both": [middle, large], "again": [small, large]}
    rows = measure_scaling([random, broken], 0.0, 1, said.append, series)
    assert len(rows) == 8
    assert len(said) == 6
    columns, table = scaling_table(rows)
    assert [column.key for column in columns] == ["point", "random", "broken"]
    assert (table[0]["series"], table[0]["point"]) == ("both", "E 8, R 4, P 12, T 1")
    assert isinstance(table[0]["random"], float)
    assert [line["random"] for line in table if line["point"] == str(large)] == ["over", "over"]
    assert isinstance(table[2]["random"], float)
    assert {line["broken"] for line in table} == {"failed"}
    assert rows[-1]["error"].startswith("policy 'broken' raised ValueError: cannot")


@pytest.mark.usefixtures("tiny")
def test_scaling_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--scaling measures times instead of cases, in all three kinds of file."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench_policies, "SERIES", {"one": [Point(8, 2, 2)]})
    json, markdown = tmp_path / "rows.json", tmp_path / "tables.md"
    bench_policies.main(policy=["random"], scaling=True, json=json, markdown=markdown, plots=tmp_path)
    [row] = msgspec.json.decode(json.read_bytes())["rows"]
    assert row["cpu_ms"] > 0
    assert "| E 8, R 2, P 10, T 1 | " in markdown.read_text()
    assert (tmp_path / "scaling.png").exists()


def test_largest_point() -> None:
    """The series reach 1,024 experts on 1,024 ranks, with a redundant slot on each."""
    assert Point(1024, 1024, 1024) in [point for points in SERIES.values() for point in points]


def test_markdown_table() -> None:
    """The example of the docstring; a bar in a name does not end its cell."""
    columns = [Column(key="what", title="what"), Column(key="ms", title="ms", digits=1)]
    lines = markdown_tables(
        columns, [{"case": "a", "what": "x|y", "ms": 1.25}, {"case": "a", "what": "z"}], "case"
    ).split("\n")
    assert lines == ["**a**", "", "| what | ms |", "|---|---:|", "| x\\|y | 1.2 |", "| z | - |", ""]

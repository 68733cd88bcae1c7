"""The replay benchmark runs every curve on the same steps, puts bytes in relation to vLLM's schedule, and writes what it shows."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import typer

from benchmarks import bench_replay, replay_cases
from benchmarks.replay_cases import ReplayCase, chosen_series
from eplb_async.runtime.offline import Shape
from eplb_async.runtime.replay_request import ReplayRequest

__all__: list[str] = []


CASE = ReplayCase(
    trace="small",
    shape=Shape(num_slots=20, num_ranks=4),
    slot_bytes=1 << 20,
    steps_per_window=2000,
    vllm_bytes_per_step=1000.0,
)


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one small trace, the only case."""
    np.savez(tmp_path / "small.npz", counts=np.random.default_rng(0).lognormal(5, 1, (4, 2, 16)).astype(np.int64))
    monkeypatch.setattr(bench_replay, "CASES", {"small": CASE})
    return tmp_path


def test_rows_tables_and_pictures(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row per point, bytes as shares of vLLM's schedule, in the table, the JSON and the Markdown alike."""
    rows_file, table = traces / "rows.json", traces / "table.md"
    bench_replay.main(curve=["default", "still"], traces=traces, json=rows_file, output=(table, traces / "pictures"))
    rows = msgspec.json.decode(rows_file.read_bytes())["rows"]
    names = ["vllm", "still", "default every 1000", "default every 300"]
    assert [row["configuration"] for row in rows] == names
    vllm, still, often = rows[0], rows[1], rows[-1]
    assert (vllm["bytes_share"], still["bytes_share"], still["moves"]) == (1.0, 0.0, 0)
    assert often["bytes_share"] == often["moves"] / vllm["moves"] > 1
    assert often["par_mean"] < still["par_mean"]
    assert "| default every 300 |" in table.read_text()
    captured = capsys.readouterr()
    assert "default every 300" in captured.out
    assert "drew" in captured.err or "matplotlib is not installed" in captured.err


def test_unknown_names(traces: Path) -> None:
    """An unknown case or curve, or a folder without the trace, is the user's error and names what there is."""
    for arguments, message in (({"case": ["x"]}, "small"), ({"curve": ["y"]}, "frontier")):
        with pytest.raises(typer.BadParameter, match=message):
            bench_replay.main(traces=traces, **arguments)  # type: ignore[arg-type]
    with pytest.raises(typer.BadParameter, match="cannot be read"):
        bench_replay.main(traces=traces / "nowhere")


def test_all_curves_are_settings() -> None:
    """Every point of every curve has a name of its own and settings that the daemon would take."""
    names = [name for series in replay_cases.CURVES for name, _ in series.configurations(CASE)]
    assert len(set(names)) == len(names)
    assert [series.name for series in chosen_series(["flashlb"])] == ["vllm", "flashlb"]
    settings = [configuration for series in replay_cases.CURVES for configuration in series.configurations(CASE)]
    within = {name: configuration.daemon.bytes_per_step for name, configuration in settings}
    assert within["ours within a fifth"] == 200
    ReplayRequest(configurations=settings, shape=Shape(num_slots=4, num_ranks=2), slot_bytes=1)

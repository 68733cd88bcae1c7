"""The engine in real processes on the CPU, tiny: every mode computes the same bits, and plans are really committed."""

import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.engine.__main__ import TINY, Options, run_modes
from benchmarks.engine.compare import Difference, first_difference
from benchmarks.engine.config import EngineConfig
from benchmarks.engine.model import Engine
from benchmarks.engine.results import read_run
from eplb_async.core.placement import initial_placement
from eplb_async.rank.maps import Maps

__all__: list[str] = []

STEPS = 90


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, object]]]:
    """One run of all modes on two ranks: the directory and the rows by mode."""
    output = tmp_path_factory.mktemp("runs")
    options = Options(
        modes=("none", "static", "sync", "ours"),
        config=EngineConfig(**TINY, tokens_per_rank=16, steps_per_window=30),  # type: ignore[arg-type]
        steps=STEPS,
        skip=5,
        interval=20,
        ahead=1,
        device="cpu",
        output=output,
        settings={
            "EPLB_ASYNC_DAEMON_PAR_THRESHOLD": "1.0",
            "EPLB_ASYNC_DAEMON_MIN_GAIN": "0.0",
            "EPLB_ASYNC_DAEMON_POLL_INTERVAL_S": "0.01",
        },
        environ={},
        deadline_s=100.0,
    )
    rows, _ = run_modes(options)
    return output, {str(row["mode"]): row for row in rows}


@pytest.mark.timeout(300)
def test_all_modes_have_the_same_outputs(runs: tuple[Path, dict[str, dict[str, object]]]) -> None:
    """Bit for bit, whatever moved; nothing is left in shared memory."""
    output, rows = runs
    assert [rows[mode]["outputs"] for mode in ("static", "sync", "ours")] == ["equal"] * 3
    for mode in ("static", "sync", "ours"):
        assert first_difference(output / "none", output / mode) is None
    start = f"eplb_async.{os.getuid()}.engine-{os.getpid()}-"
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(start)]


@pytest.mark.timeout(300)
def test_experts_really_move(runs: tuple[Path, dict[str, dict[str, object]]]) -> None:
    """`ours` and `sync` commit and lower the PAR; `none` and `static` never change; tokens vary from step to step."""
    output, rows = runs
    for mode in ("sync", "ours"):
        row = rows[mode]
        assert isinstance(row["plans"], int)
        assert isinstance(row["commits"], int)
        assert row["plans"] >= 1
        assert row["commits"] >= 2
        assert row["par"] < rows["none"]["par"]  # type: ignore[operator]
    assert rows["none"]["commits"] == rows["static"]["commits"] == 0
    assert any(decision["outcome"] == "finished" for decision in rows["ours"]["decisions"])  # type: ignore[attr-defined]
    digests = (output / "none" / "rank0.digests.txt").read_text().split()
    assert len(set(digests)) == STEPS


@pytest.mark.timeout(300)
def test_compare_finds_a_planted_difference(runs: tuple[Path, dict[str, dict[str, object]]], tmp_path: Path) -> None:
    """It names the step and what differed; a shorter run is not equal either."""
    output, _ = runs
    planted = tmp_path / "planted"
    shutil.copytree(output / "none", planted)
    digests = planted / "rank1.digests.txt"
    lines = digests.read_text().splitlines()
    lines[41:] = [f"{index:064x}" for index in range(len(lines) - 41)]
    digests.write_text("\n".join(lines) + "\n")
    assert first_difference(output / "none", planted) == Difference(rank=1, step=41, what="outputs")
    digests.write_text("\n".join((output / "none" / "rank1.digests.txt").read_text().splitlines()[:50]) + "\n")
    assert first_difference(output / "none", planted) == Difference(rank=1, step=50, what="number of steps")
    shutil.copyfile(output / "none" / "rank1.digests.txt", digests)
    with np.load(planted / "rank1.npz") as file:
        arrays = dict(file)
    arrays["ids_T"][6] += 1
    np.savez(planted / "rank1.npz", **arrays)
    assert first_difference(output / "none", planted) is None
    lines = digests.read_text().splitlines()
    digests.write_text("\n".join([*lines[:8], *lines[:1], *lines[9:]]) + "\n")
    assert first_difference(output / "none", planted) == Difference(rank=1, step=8, what="routing")
    with pytest.raises(FileNotFoundError):
        first_difference(output / "none", tmp_path)


@pytest.mark.timeout(300)
def test_files_say_what_each_rank_computed(runs: tuple[Path, dict[str, dict[str, object]]]) -> None:
    """All pairs of each step and layer are computed once; the loads of the ranks add up to them."""
    output, _ = runs
    run = read_run(output / "ours")
    assert (run.rows_TLR.sum(axis=2) == 2 * 16 * TINY["top_k"]).all()
    assert (run.step_ms_RT > 0).all()
    assert run.maps_TLP.shape == (STEPS, TINY["num_layers"], TINY["num_experts"] + TINY["num_redundant"])
    assert {step for step, _, _ in run.commits} <= set(range(STEPS))
    broken = output / "broken"
    shutil.copytree(output / "ours", broken)
    with np.load(broken / "rank1.npz") as file:
        arrays = dict(file)
    arrays["maps_TLP"][7, 0, 0] += 1
    np.savez(broken / "rank1.npz", **arrays)
    with pytest.raises(ValueError, match="another placement than rank 0 at step 7"):
        read_run(broken)


def test_one_rank_as_a_library() -> None:
    """Without other ranks no process group is needed; the load counts this rank's pairs, and a reset starts anew."""
    torch.set_num_threads(1)
    config = EngineConfig(**TINY, num_ranks=1, tokens_per_rank=8)  # type: ignore[arg-type]
    engine = Engine(config, 0, torch.device("cpu"))
    engine.use(Maps(initial_placement(engine.spec), engine.spec, engine.device))
    engine.prepare(first_step=3, count=4)
    with pytest.raises(ValueError, match="step 7 is not prepared"):
        engine.run_step(7)
    engine.warm_up()
    records = []
    for _ in range(2):
        engine.reset()
        for step in range(3, 7):
            engine.run_step(step)
        records.append(engine.record.clone())
        assert engine.load.sum(dim=1).tolist() == [4 * config.num_pairs] * config.num_layers
    assert torch.equal(*records)
    assert torch.equal(engine.record[: config.tokens_per_rank], engine.tokens)


def test_compare_command(tmp_path: Path) -> None:
    """Status 0 for equal runs, 1 and the step for others."""
    import typer

    from benchmarks.engine.compare import main

    app = typer.Typer()
    app.command()(main)
    for name, word in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank0.digests.txt").write_text(f"0\n{word}\n")
        np.savez(tmp_path / name / "rank0.npz", ids_T=np.zeros(2))
    equal = CliRunner().invoke(app, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert (equal.exit_code, "equal: all outputs of 2 steps" in equal.output) == (0, True)
    other = CliRunner().invoke(app, [str(tmp_path / "a"), str(tmp_path / "c")])
    assert (other.exit_code, "different from step 1 on (rank 0: outputs)" in other.output) == (1, True)


def test_configuration_can_be_told_in_json() -> None:
    """As the files of a run do."""
    config = EngineConfig()
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config
    assert config.weight_bytes == 16 * 72 * 3 * 4096 * 1536 * 2 + 32_768 * 4096 * 2

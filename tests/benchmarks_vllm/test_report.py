"""What the tables of benchmarks/vllm are made from; on runs that are written by hand."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vllm.config import MODES, SCENARIOS, engine_arguments, parse_case
from benchmarks.vllm.report import rebalances, report, steps_of
from benchmarks.vllm.serving import slots_checked

__all__: list[str] = []


def run_of(
    plan_steps: range, *, changes: list[list[float]] | None = None, slow: float = 0.0, steps: int = 100
) -> dict[str, Any]:
    """A run of steps of 10 ms on two ranks, with a plan of 16 entries under way in some, which are longer by `slow` seconds."""
    begin = [0.0]
    for step in range(steps):
        begin.append(begin[-1] + 0.01 + (slow if step in plan_steps else 0.0))
    eplb = [[when + 0.005, 1e-5, int(step in plan_steps), 0, 16] for step, when in enumerate(begin)]
    worker = {
        "begin": begin,
        "tokens": [256] * (steps + 1),
        "device_ms": [1e3 * (after - before) for before, after in pairwise(begin)],
        "eplb": eplb,
        "par": [],
    }
    return {
        "mode": "ours",
        "scenario": {"batch": 256, "layers": 16},
        "marks": {"begin": 0.0, "end": begin[-1]},
        "changes": changes or [],
        "workers": [worker, worker],
    }


def test_steps_around_a_change_of_the_router_are_left_out() -> None:
    """A change from 0.505 to 0.515 s hides what touches 0.485 to 0.535 s: 6 of 100 steps, on both ranks."""
    assert len(steps_of(run_of(range(0))).ms) == 200
    steps = steps_of(run_of(range(0), changes=[[0.505, 0.515]]))
    assert len(steps.ms) == 188
    assert not ((steps.starts > 0.476) & (steps.starts < 0.534)).any()


def test_a_plan_is_counted_in_steps_and_its_steps_are_told_apart() -> None:
    """Steps 20 to 29 have a plan and take 12 ms instead of 10."""
    run = run_of(range(20, 30), slow=0.002)
    assert rebalances(run) == [(10, 16)]
    steps = steps_of(run)
    assert steps.with_plan.sum() == 20
    assert steps.device_ms[steps.with_plan].min() == pytest.approx(12)
    assert steps.device_ms[~steps.with_plan].max() == pytest.approx(10)


def test_tables_are_made_of_what_lies_in_a_folder(tmp_path: Path) -> None:
    """Two runs of one mode give a median and a range, and the steps with a plan a row of their own."""
    for number, slow in enumerate((0.0, 0.002)):
        (tmp_path / f"decode-ours-{number}.json").write_text(json.dumps(run_of(range(20, 30), slow=slow)))
    text = report(tmp_path)
    assert "| ours | 2 | 10.000 |" in text
    assert "99.02 (98.04 to 100.00)" in text  # 10 of 100 steps 20 % longer: 10.0 / 10.2


def test_long_steps_are_told_from_the_median_around_them(tmp_path: Path) -> None:
    """Steps grow from 10 to 16 ms, which makes none long; one of 2 ms more is, on both ranks."""
    run = run_of(range(300, 301), slow=0.002, steps=600)
    worker = run["workers"][0]  # both ranks share it
    worker["device_ms"] = [took + 0.01 * step for step, took in enumerate(worker["device_ms"])]
    (tmp_path / "decode-ours-0.json").write_text(json.dumps(run))
    head, _, row = report(tmp_path).splitlines()[2:5]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["more than 1 ms, % of steps"] == "0.17"
    assert float(cells["max ms"]) == pytest.approx(2, abs=0.02)


def test_every_slot_is_compared_with_the_expert_that_the_map_names() -> None:
    """Experts 0 to 3 on two ranks; after the run slots 0 and 3 have changed places, and slot 1 has bytes that are not its expert's."""
    sums = [[[[10], [11]]], [[[12], [13]]]]
    maps = [{"experts": [[0, 1, 2, 3]], "wrong_entries": 0}] * 2
    after = [[[[13], [99]]], [[[12], [10]]]]
    maps_after = [{"experts": [[3, 1, 2, 0]], "wrong_entries": 0}, {"experts": [[3, 1, 0, 2]], "wrong_entries": 2}]
    found = slots_checked(sums, maps, after, maps_after)
    assert (found["slots"], found["wrong_slots"], found["slots_off_initial"]) == (4, 1, 2)
    assert (found["wrong_map_entries"], found["ranks_with_other_maps"]) == (2, 1)


@pytest.mark.parametrize(
    "text", ["decode", "decode:nobody", "nothing:ours", "decode:ours:steps=few", "decode:ours:kind=1"]
)
def test_a_case_that_does_not_exist_is_named(text: str) -> None:
    """The message has the text and what there is."""
    with pytest.raises(ValueError, match=text):
        parse_case(text)


def test_vllm_is_started_as_the_mode_says(tmp_path: Path) -> None:
    """EPLB off, never, every `interval` steps, or ours with the scenario's settings."""
    name, scenario, _ = parse_case("decode:off:interval=70")
    assert name == "decode"
    made = {mode: engine_arguments(scenario, mode, tmp_path) for mode in MODES}
    assert "enable_eplb" not in made["off"]
    assert made["async"]["eplb_config"]["step_interval"] == 70
    assert made["static"]["eplb_config"]["step_interval"] > 1_000_000
    assert "additional_config" not in made["static"]
    assert made["ours"]["additional_config"]["eplb_async"]["daemon"]["interval_steps"] == 70
    assert made["ours_all"]["additional_config"]["eplb_async"]["daemon"]["policy"] == "default"
    assert json.loads((tmp_path / "config.json").read_text())["num_experts_per_tok"] == SCENARIOS["decode"].top_k

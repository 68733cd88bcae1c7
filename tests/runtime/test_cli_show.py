"""What people read of decisions."""

from typing import Any

import msgspec
import pytest

from eplb_async.observability.history import Decision, Outcome
from eplb_async.runtime.cli_show import show_history, show_status
from eplb_async.runtime.messages import CostStatus, DaemonStatus, GroupStatus, PhaseStatus, RankStatus

__all__: list[str] = []


def test_the_history_says_whether_a_plan_paid(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdict with its numbers, and the trust before and after; nothing of it for a plan that was not judged."""
    monkeypatch.setenv("COLUMNS", "200")
    decision = Decision(
        number=4,
        group="g",
        incarnation=1,
        time_unix_s=0.0,
        trigger="PAR 1.4 > 1.05 after 100 steps",
        policy="default",
        outcome=Outcome.FINISHED,
        num_committed=3,
        verdict="harmed: PAR of its layers fell by -0.121 +- 0.008, predicted 0.377",
        trust=1.0,
        trust_after=0.7,
    )
    show_history({"g": [decision]})
    assert f"{decision.verdict}; trust 1.00 -> 0.70" in capsys.readouterr().out
    show_history({"g": [Decision(**{**{f: getattr(decision, f) for f in decision.__struct_fields__}, "verdict": ""})]})
    assert "trust" not in capsys.readouterr().out


def status_of(**fields: Any) -> DaemonStatus:
    """A daemon with one group of one rank, and these fields of the group."""
    rank = RankStatus(
        rank=0,
        pid=77,
        state="ready",
        step=5,
        staged=(1, 0),
        committed=(1, 0),
        records=5,
        lost=0,
        missed=0,
        damaged=0,
        unfolded=0,
        budget_bytes=3 << 20,
        pauses=8,
        slowdowns=9,
    )
    group = GroupStatus(group="g", incarnation=1, state="serving", problems=(), ranks=(rank,), **fields)
    return DaemonStatus(
        pid=1,
        release="0",
        uptime_s=1.0,
        cpu_s=0.1,
        cpu_share=0.01,
        memory_bytes=1,
        loop_lag_s=0.0,
        loop_lag_worst_s=0.0,
        policy="default",
        pool={},
        groups=(group,),
    )


def test_the_pace_of_each_rank_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Budget per step, pauses, and how often it was cut."""
    monkeypatch.setenv("COLUMNS", "200")
    show_status(status_of())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    head = next(line for line in lines if "budget" in line)
    assert head[-3:] == ["budget", "pauses", "slowed"]
    assert next(line for line in lines if "77" in line)[-4:] == ["3.0", "MiB", "8", "9"]


COST = CostStatus(
    windows=240,
    known=True,
    step_ms=10.2,
    fixed_ms=5.1,
    even_ms=1.0,
    tokens_ms=4.0,
    tokens_error_ms=0.2,
    pulls_ms=0.06,
    commits_ms=0.04,
)


def test_what_a_step_costs_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a step, or that they are not known yet; nothing where no step was timed."""
    monkeypatch.setenv("COLUMNS", "200")
    show_status(status_of(cost=COST))
    parts = "5.10 fixed, 1.00 of all tokens, 4.00 +- 0.20 of the busiest rank's, 0.06 of pulls, 0.04 of commits"
    assert f"a step of 10.20 ms: {parts} (240 windows)" in capsys.readouterr().out
    show_status(status_of(cost=msgspec.structs.replace(COST, known=False)))
    assert "a step of 10.20 ms; what tokens cost is not known yet" in capsys.readouterr().out
    show_status(status_of())
    assert "a step of" not in capsys.readouterr().out


def test_the_history_says_what_time_was_saved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was predicted, by which fit, and what steps took; each as far as it is known."""
    monkeypatch.setenv("COLUMNS", "200")
    decision = Decision(
        number=4, group="g", incarnation=1, time_unix_s=0.0, trigger="t", policy="p", outcome=Outcome.FINISHED
    )
    show_history({"g": [decision]})
    assert "ms" not in capsys.readouterr().out
    time = {"saved_ms_per_step": 0.41, "moving_ms": 12.0, "cost_fit": "240 windows: tokens are 40 +- 2 % of 10.20 ms"}
    decision = msgspec.structs.replace(decision, **time)
    show_history({"g": [decision]})
    told = f"predicted to save 0.410 ms per step for 12.0 ms of moves ({decision.cost_fit})"
    assert told in capsys.readouterr().out
    show_history({"g": [msgspec.structs.replace(decision, step_ms_before=10.2, step_ms_after=9.8)]})
    assert f"{told}; a step took 10.200 ms before, 9.800 after" in capsys.readouterr().out


def test_the_status_says_what_each_phase_wants(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, steps and PAR of each phase, and what its tokens count where that is not 1."""
    monkeypatch.setenv("COLUMNS", "200")
    loads = (
        PhaseStatus(phase="prefill", weight=0.1, steps=1200, tokens=4915200, windows=16, par_live=1.412),
        PhaseStatus(phase="decode", weight=1.0, steps=9000, tokens=576000, windows=0, par_live=None),
    )
    show_status(status_of(phase_loads=loads))
    out = capsys.readouterr().out
    assert "prefill: PAR live 1.412 (16 windows), 4,915,200 tokens in 1,200 steps; a token counts 0.1\n" in out
    assert "576,000 tokens in 9,000 steps\n" in out

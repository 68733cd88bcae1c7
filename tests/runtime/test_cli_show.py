"""What people read of decisions."""

import pytest

from eplb_async.observability.history import Decision, Outcome
from eplb_async.runtime.cli_show import show_history, show_status
from eplb_async.runtime.messages import DaemonStatus, GroupStatus, PhaseStatus

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


def test_the_status_says_what_each_phase_wants(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, steps and PAR of each phase, and what its tokens count where that is not 1."""
    monkeypatch.setenv("COLUMNS", "200")
    loads = (
        PhaseStatus(phase="prefill", weight=0.1, steps=1200, tokens=4915200, windows=16, par_live=1.412),
        PhaseStatus(phase="decode", weight=1.0, steps=9000, tokens=576000, windows=0, par_live=None),
    )
    group = GroupStatus(group="g", incarnation=1, state="serving", problems=(), ranks=(), phase_loads=loads)
    show_status(
        DaemonStatus(
            pid=1,
            release="0.1",
            uptime_s=1.0,
            cpu_s=0.0,
            cpu_share=0.0,
            memory_bytes=0,
            loop_lag_s=0.0,
            loop_lag_worst_s=0.0,
            policy="frontier",
            pool={},
            groups=(group,),
        )
    )
    out = capsys.readouterr().out
    assert "prefill: PAR live 1.412 (16 windows), 4,915,200 tokens in 1,200 steps; a token counts 0.1\n" in out
    assert "576,000 tokens in 9,000 steps\n" in out

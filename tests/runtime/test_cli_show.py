"""What people read of decisions."""

import pytest

from eplb_async.observability.history import Decision, Outcome
from eplb_async.runtime.cli_show import show_history

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

"""What past plans brought decides what later ones are trusted to bring, and which are taken back."""

from typing import Any

import numpy as np
import pytest

from eplb_async.runtime.gain_life import PastPlan
from eplb_async.runtime.regret import LEAST_TRUST, Regret, Verdict

__all__: list[str] = []

TOKENS = 1_000_000


def par_of(load_NE: Any, rows_NP: Any, share_NP: Any) -> Any:
    """The load of two experts, in tenths of all tokens, is the PAR with old rows (0) and with new ones (1)."""
    share_NE = 10 * load_NE / load_NE.sum(axis=1, keepdims=True)
    return np.where(rows_NP[:, 0] == 0, share_NE[:, 0], share_NE[:, 1])


def plan(predicted: float, layers: list[int]) -> PastPlan:
    before = np.zeros((len(layers), 2), dtype=np.int32)
    return PastPlan(layers=layers, predicted=predicted, before_NP=before, after_NP=before + 1)


def load(before_L: list[float], after_L: list[float], tokens: int = TOKENS) -> Any:
    """A window with these PARs under old and new rows."""
    rest_L = 10 - np.array(before_L) - np.array(after_L)
    return (np.stack([before_L, after_L, rest_L], axis=1) * tokens / 10).astype(np.int64)


def judged(regret: Regret, gains_L: list[float], *, tokens: int = TOKENS, predicted: float = 1.0) -> Verdict:
    """The verdict on a plan for all layers, each of which gains so much in four windows."""
    layers = list(range(len(gains_L)))
    regret.follow(7, plan(predicted, layers), 100, may_revert=True)
    found: list[Verdict] = []
    for window in range(4):
        assert not found
        window_LE = load([2.0] * len(gains_L), [2.0 - gain for gain in gains_L], tokens)
        found = regret.window(100 + 10 * window, window_LE, 4, 0.02)
    return found[0]


def test_the_worked_example() -> None:
    """Two plans that bring nothing leave half of the trust, one that pays gives half of the rest back."""
    regret = Regret(par_of, 4)
    for expected in (0.7, 0.5):
        verdict = judged(regret, [0.0, 0.0])
        assert verdict.text.startswith("did not pay: PAR of its layers fell by 0.000")
        assert regret.trust == pytest.approx(expected, abs=0.02)
    assert judged(regret, [0.5, 0.5]).text.startswith("paid")
    assert regret.trust == pytest.approx(0.75, abs=0.02)
    for _ in range(20):
        judged(regret, [0.0, 0.0])
    assert regret.trust == pytest.approx(LEAST_TRUST, abs=0.04)


def test_trust_comes_back_with_time() -> None:
    """Else a daemon that makes no plans any more would never find that they pay again."""
    regret = Regret(par_of, 4)
    judged(regret, [0.0, 0.0])
    for window in range(300):
        regret.window(1000 + window, load([2.0, 2.0], [2.0, 2.0]), 4, 0.02)
    assert regret.trust > 0.98


def test_what_noise_could_explain_is_no_lie() -> None:
    """A shortfall within the noise of few tokens lowers nothing; the same with many tokens does."""
    assert judged(Regret(par_of, 4), [0.0, 0.0], tokens=40).text.startswith("paid")
    assert judged(Regret(par_of, 4), [0.0, 0.0]).text.startswith("did not pay")


def test_harmed_layers_go_back_unless_they_were_changed_since() -> None:
    """Only the layers that are worse off, once, and not those that another plan has changed."""
    regret = Regret(par_of, 4)
    verdict = judged(regret, [0.5, -0.4, -0.4])
    assert verdict.harmed == (1, 2)
    revert = regret.revert
    assert revert is not None
    assert revert.reason == "decision 7 harmed 2 layers: PAR rose by 0.400"
    live_LP = np.ones((3, 2), dtype=np.int32)
    assert np.array_equal(revert.target(live_LP), [[1, 1], [0, 0], [0, 0]])
    live_LP[1] = 5
    assert np.array_equal(revert.target(live_LP), [[1, 1], [5, 5], [0, 0]])
    live_LP[2] = 5
    assert revert.rows(live_LP) is None
    assert regret.take("PAR 1.3 > 1.05") is None
    assert regret.take(revert.reason) is revert
    assert regret.take(revert.reason) is None


def test_a_revert_is_not_reverted_and_small_harm_is_left() -> None:
    """Whatever a revert brings; and harm below min_gain is not worth its bytes."""
    regret = Regret(par_of, 4)
    regret.follow(8, plan(0.5, [0]), 0, may_revert=False)
    verdicts = [regret.window(window, load([2.0], [2.5]), 4, 0.02) for window in range(4)]
    assert verdicts[-1][0].text.startswith("harmed")
    assert regret.revert is None
    assert judged(Regret(par_of, 4), [-0.03]).harmed == ()
    assert judged(Regret(par_of, 4), [-0.05]).harmed == (0,)


def test_windows_before_the_last_commit_do_not_count() -> None:
    """They were counted, in part, under the rows before."""
    regret = Regret(par_of, 4)
    regret.follow(1, plan(1.0, [0]), 100, may_revert=True)
    for first_step in (80, 90, 100, 110, 120):
        assert not regret.window(first_step, load([2.0], [1.0]), 4, 0.02)
    assert regret.window(130, load([2.0], [1.0]), 4, 0.02)
    assert regret.trust == 1.0


def test_off() -> None:
    """No windows, no verdict, full trust."""
    regret = Regret(par_of, 4)
    regret.trust = 0.3
    regret.follow(1, plan(1.0, [0]), 0, may_revert=True)
    assert regret.window(0, load([2.0], [3.0]), 0, 0.02) == []
    assert (regret.trust, regret.revert) == (1.0, None)

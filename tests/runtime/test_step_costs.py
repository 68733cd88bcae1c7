"""From windows to milliseconds: tokens under the rows that were live at each step, what plans save and cost, what steps took."""

from typing import Any

import numpy as np
import pytest

from eplb_async.core.clock import SystemClock
from eplb_async.core.config import DaemonSettings
from eplb_async.core.cost import FIRST
from eplb_async.core.placement import initial_placement
from eplb_async.core.plan import Plan, PlanEntry, counter
from eplb_async.core.score import rank_load
from eplb_async.core.spec import MoESpec
from eplb_async.observability.history import DecisionHistory, Outcome
from eplb_async.runtime.decisions import Decisions
from eplb_async.runtime.group_view import GroupFacts
from eplb_async.runtime.modelled_live import ModelledLive
from eplb_async.runtime.planner import PlanProposal
from eplb_async.runtime.step_costs import StepCosts
from eplb_async.runtime.step_times import WindowTimes
from eplb_async.runtime.windows import LoadWindows

__all__: list[str] = []

SPEC = MoESpec(num_layers=2, num_experts=4, num_ranks=2)
STEPS = 10
FIXED_MS, TOKEN_MS, BYTE_MS, COMMIT_MS = 5.0, 0.01, 1e-5, 0.5
OTHER = np.array([0, 2, 1, 3], dtype=np.int32)
"""A row that puts experts 0 and 1 on different ranks."""


class Served:
    """Windows of a group whose steps take what the constants say; `costs` sees them."""

    def __init__(self) -> None:
        self.windows = LoadWindows((SPEC.num_layers, SPEC.num_experts), STEPS, 16)
        self.live = ModelledLive(SPEC, initial_placement(SPEC))
        self.costs = StepCosts(SPEC, self.windows, self.live)
        self.random, self.number, self.version = np.random.default_rng(0), 0, 0

    def load(self, number: int) -> np.ndarray:
        """Of a step of a window: more or fewer tokens, most of them for experts 0 and 1."""
        return np.tile(np.array([8, 8, 1, 1]) * (10 + number * 7 % 5), (SPEC.num_layers, 1))

    def peak_L(self, number: int) -> np.ndarray:
        """Tokens of its busiest rank, under the live rows."""
        return np.asarray(rank_load(self.load(number), self.live.rows_LP, SPEC.topology).max(axis=-1))

    def window(self, commits: dict[int, int] | None = None, pulled: int = 0, look: bool = True, **times: Any) -> float:
        """A window in which layers get their other row at a step; milliseconds of a step in it.

        Args:
            commits: layer, and the step of the window before which it is committed.
            pulled: bytes.
            look: whether `costs` sees it now.
            times: fields of WindowTimes that are not as they should be.
        """
        took_ms, versions = 0.0, [(0, self.version)]
        for step in range(STEPS):
            for layer, at in (commits or {}).items():
                if at == step:
                    self.commit(layer)
                    versions.append((step, self.version))
            took_ms += FIXED_MS + TOKEN_MS * float(self.peak_L(self.number).sum())
        took_ms = (took_ms + COMMIT_MS * (len(versions) - 1) + BYTE_MS * pulled) / STEPS
        found = {
            "num_steps": STEPS,
            "num_timed": STEPS,
            "step_us": 1e3 * took_ms,
            "pulled_bytes": pulled,
            "num_commits": len(versions) - 1,
            "versions": tuple(versions),
        }
        self.windows.add(self.number, STEPS * self.load(self.number), WindowTimes(**{**found, **times}))
        self.number += 1
        if look:
            self.costs.look(1)
        return took_ms

    def commit(self, layer: int) -> None:
        """The next entry takes effect: a row that is the other one, or the initial one again."""
        is_other = np.array_equal(self.live.rows_LP[layer], OTHER)
        row_P = initial_placement(SPEC)[layer] if is_other else OTHER
        self.version = counter(1 + self.version // counter(1, 0), 1) if self.version else counter(1, 1)
        entry = PlanEntry(
            layer=layer, base_version=0, slots=row_P.astype("<i4").tobytes(), moves=b"", table=b"", count=b""
        )
        plan = Plan(
            incarnation=1,
            generation=self.version // counter(1, 0),
            entries=[entry],
            policy="",
            reason="",
            par_before=1.0,
            par_after=1.0,
            num_moves=0,
            bytes_moved=0,
            created_unix_s=0.0,
        )
        self.live.commit(plan, 1)


def served(num: int = 40, moving: bool = True) -> Served:
    """Windows, some of them with commits and pulls."""
    group = Served()
    for number in range(num):
        moves = moving and number % 4 == 3
        commits = {0: number * 3 % STEPS, 1: number * 7 % STEPS} if number % 3 else {number // 4 % 2: number % STEPS}
        group.window(commits if moves else None, 100_000 * (1 + number % 3) if moves else 0)
    return group


def test_the_fit_finds_what_steps_are_made_of() -> None:
    """All four, from windows with commits at any step; each layer counts under the row that it had."""
    cost = served(80).costs.cost
    assert cost is not None
    assert cost.known
    found = (cost.fixed_ms, cost.token_ms, cost.byte_ms, cost.commit_ms)
    assert found == pytest.approx((FIXED_MS, TOKEN_MS, BYTE_MS, COMMIT_MS), rel=1e-3)


def test_a_commit_that_is_seen_before_its_window_is_counted_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon may see rows of a commit after the window that it looks at; that window ran with those before, the next one with both."""
    group, found = Served(), []
    monkeypatch.setattr(group.costs._fit, "add", lambda tokens, *_: found.append(tokens))
    group.window()
    group.window(look=False)
    before = [group.peak_L(number) for number in range(3)]
    group.commit(0)
    group.costs.look(1)
    # committed before step 4 of this window
    group.window(versions=((0, 0), (4, group.version)), num_commits=1)
    after_L = group.peak_L(2)
    assert after_L[0] < before[2][0]
    assert found == pytest.approx([before[0].sum(), before[1].sum(), 0.4 * before[2].sum() + 0.6 * after_L.sum()])


def test_windows_that_tell_nothing_are_left_out() -> None:
    """No time, no step that counts, one that was seen before, and those of a plan that was dropped."""
    group = served(20)
    assert group.costs.num_windows == 20
    group.window(num_timed=0)
    group.window(num_steps=0)
    group.costs.look(3)
    group.costs.leave_out(23 * STEPS)
    group.window(step_us=1e6)
    group.window(step_us=1e6)
    assert group.costs.num_windows == 20
    group.window()
    assert group.costs.num_windows == 21
    group.costs.begin_anew()
    assert group.costs.num_windows == 0


def test_other_lengths_of_windows_go_on() -> None:
    """Windows have smaller numbers then; their steps are later all the same."""
    group = served(20)
    group.windows.resize(20 * STEPS, 16)
    group.windows.add(1, STEPS * group.load(1), WindowTimes(num_steps=5, num_timed=5, step_us=1.0))
    group.costs.look(1)
    assert group.costs.num_windows == 21


def proposal(saved: float, moved: int = 1 << 20, num_windows: int = 4) -> PlanProposal:
    """PAR falls by this in layer 0."""
    entry = PlanEntry(layer=0, base_version=0, slots=OTHER.astype("<i4").tobytes(), moves=b"", table=b"", count=b"")
    return PlanProposal(
        generation=1,
        entries=[entry],
        layers=[0],
        why="one layer pays",
        par_before_L=[1.5, 1.2],
        par_after_L=[1.5 - saved, 1.2],
        num_moves=2,
        bytes_moved=moved,
        bytes_between_ranks=moved,
        state=b"",
        num_windows=num_windows,
    )


def test_a_plan_is_predicted_in_milliseconds() -> None:
    """Tokens less on the busiest rank, times their cost; bytes and commits, times theirs; and by what fit."""
    group = served(80)
    mean = np.mean([load[0].sum() for _, load in list(group.windows.kept)[-4:]]) / STEPS / 2
    found = group.costs.predicted(proposal(0.25))
    assert found["saved_ms_per_step"] == pytest.approx(0.25 * mean * TOKEN_MS, rel=1e-3)
    assert found["moving_ms"] == pytest.approx(BYTE_MS * (1 << 20) + COMMIT_MS, rel=1e-3)
    assert found["cost_fit"].startswith("80 windows: tokens are ")
    assert served(FIRST - 1).costs.predicted(proposal(0.25)) == {}


def test_a_plan_that_costs_more_than_it_brings_is_refused() -> None:
    """Over its life, at the trust there is; the reason has the numbers. Nothing is refused while nothing is known."""
    costs = served(80).costs
    found = costs.predicted(proposal(0.25))
    life_steps = found["moving_ms"] / found["saved_ms_per_step"]
    assert costs.refusal(found, 1.1 * life_steps, 1.0) == ""
    assert costs.refusal(found, 0.9 * life_steps, 1.0).startswith("would cost more than it brings: 0.")
    assert costs.refusal(found, 1.1 * life_steps, 0.5) != ""
    assert costs.refusal({}, 0.0, 1.0) == ""


def test_what_steps_took_before_and_after_is_told() -> None:
    """The last windows before in which nothing moved, and the first ones from a step on; once for a plan."""
    group = served(20)
    quiet = [group.window() for _ in range(5)]
    group.window({0: 3}, 5000)
    group.costs.publish(7)
    group.window({1: 3}, 5000)
    after = [group.window() for _ in range(4)]
    first_step = 27 * STEPS
    found = group.costs.realised(7, first_step, 3)
    assert found == pytest.approx({"step_ms_before": np.mean(quiet[-4:]), "step_ms_after": np.mean(after[:3])})
    assert group.costs.realised(7, first_step, 3) == {}
    assert group.costs.realised(8, first_step, 3) == {}


@pytest.mark.parametrize(("weigh", "revert"), [(True, False), (False, False), (True, True)])
def test_decisions_weigh_time(weigh: bool, revert: bool) -> None:
    """A plan of a gigabyte for next to nothing is not made, and the history says why; unless that is switched off, or it is a revert."""
    group, history = served(80), DecisionHistory(8)
    facts = GroupFacts(group="g", incarnation=1, spec=SPEC, staging_rows=2, slot_bytes=[100, 100], capacity=1 << 20)
    settings = DaemonSettings(window_steps=STEPS, weigh_time=weigh)
    decisions = Decisions(facts, (group.windows, group.live), settings, (history, 0), SystemClock(), group.costs)
    decisions.look(80 * STEPS, 0, True)
    assert decisions.begin("a reason", 1) is not None
    assert decisions._open is not None
    decisions._open.may_revert = not revert
    plan = decisions.judge(proposal(0.25, moved=1 << 30))
    decision = history.newest()[-1]
    assert decision.moving_ms == pytest.approx(BYTE_MS * (1 << 30) + COMMIT_MS, rel=1e-3)
    assert decision.saved_ms_per_step is not None
    if weigh and not revert:
        assert plan is None
        assert decision.outcome is Outcome.NOTHING_PAYS
        assert decision.why.startswith("would cost more than it brings")
    else:
        assert plan is not None

"""The pace of transfers follows how long steps take: scripted steps, no clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from eplb_async.core.config import HookSettings
from eplb_async.core.load import Phase
from eplb_async.rank.pace import BURST, PAUSE_STEPS, Pace

MS = 1_000_000
LIMIT, LEAST = 64, 4
ROW = 1


@dataclass
class Rank:
    """A rank that pulls all it may, and whose steps take what a script says of (step, bytes pulled in it)."""

    takes_ms: Callable[[int, int], float]
    row_bytes: int = ROW
    fields: dict[str, Any] = field(default_factory=dict)
    phase: Phase = Phase.DECODE

    def __post_init__(self) -> None:
        fields: dict[str, Any] = {"pull_bytes_per_step": LIMIT, "least_pull_bytes_per_step": LEAST, **self.fields}
        self.pace = Pace(HookSettings(**fields), self.row_bytes)
        self.now_ns, self.number = 1, 0

    def step(self, *, plan: bool, measured: bool = False, gap_ms: float = 0.0, tokens: int = 8) -> int:
        """One step; bytes pulled in it."""
        took_us = getattr(self, "took_us", None) if measured else None
        self.pace.begin(self.now_ns, self.phase, tokens, took_us)
        granted = self.pace.grant(self.phase) if plan else 0
        # rows are whole; one that is larger than the limit goes alone for all of it, as in Stager
        rows = granted // self.row_bytes or int(granted >= LIMIT)
        pulled = rows * self.row_bytes
        self.pace.ran(pulled, 0, odd=False)
        took_ms = self.takes_ms(self.number, pulled)
        self.took_us = 1000 * took_ms
        self.now_ns += int((took_ms + gap_ms) * MS)
        self.number += 1
        return pulled

    def steps(self, num: int, *, plan: bool = True) -> list[int]:
        """Bytes pulled in each."""
        return [self.step(plan=plan) for _ in range(num)]


def ready(takes_ms: Callable[[int, int], float], **options: Any) -> Rank:
    """A rank that has made some steps without a plan."""
    rank = Rank(takes_ms, **options)
    rank.steps(20, plan=False)
    return rank


def test_a_step_is_timed_from_its_begin_to_the_next() -> None:
    """The first has none before it; what the engine says goes before the clock, also that it is not to be counted."""
    pace = Pace(HookSettings(), 1)
    begins = [(5 * MS, None), (15 * MS, None), (40 * MS, 9_000.7), (41 * MS, 0.0), (43 * MS, None)]
    assert [pace.begin(at, Phase.DECODE, 0, us) for at, us in begins] == [0, 10_000, 9_000, 0, 2_000]


def test_transfers_that_cost_nothing_go_at_the_limit() -> None:
    """Nothing is slowed that does not hurt."""
    rank = ready(lambda step, pulled: 10)
    assert rank.steps(200) == [LIMIT] * 200
    assert (rank.pace.num_pauses, rank.pace.num_slowdowns) == (0, 0)


def test_without_anything_usual_the_limit_holds() -> None:
    """A plan that begins with the first step is not slowed, and what it takes does not become the usual."""
    rank = Rank(lambda step, pulled: 10 + pulled)
    assert rank.steps(30) == [LIMIT] * 30


def test_steps_that_run_long_cut_the_budget_until_they_do_not() -> None:
    """A byte takes 0.05 ms: 64 make a step 32 % longer. The budget comes down to what the tolerance of 10 % allows, and stays about there."""
    rank = ready(lambda step, pulled: 10 + 0.05 * pulled, fields={"pace_tolerance": 0.1})
    rank.steps(60)
    pulled = rank.steps(300)
    assert 10 <= sum(pulled) / 300 <= 25
    assert max(pulled) <= 28
    assert rank.pace.num_slowdowns > 3


def test_the_budget_recovers() -> None:
    """Transfers hurt for a while, then no longer: from the least back to the limit within 16 judgements."""
    rank = ready(lambda step, pulled: 10 * (1.2 if pulled and step < 100 else 1))
    assert rank.steps(80)[-1] <= LEAST
    rank.steps(16 * 4 + 2 * PAUSE_STEPS)
    assert rank.steps(4) == [LIMIT] * 4


def test_the_least_is_reached_and_kept() -> None:
    """Any transfer makes steps 20 % longer: what is issued goes down to the least, and pauses look whether it is still the transfers."""
    rank = ready(lambda step, pulled: 10 * (1.2 if pulled else 1))
    rank.steps(40)
    pulled = rank.steps(400)
    assert set(pulled) == {0, LEAST}
    # a pause after every fourth judgement
    assert 0.4 < sum(map(bool, pulled)) / 400 < 0.6
    assert rank.pace.num_pauses > 5


def test_what_is_slow_for_other_reasons_becomes_usual() -> None:
    """Steps are twice as long for good, with and without transfers: after one pause the limit is on its way again."""
    rank = ready(lambda step, pulled: 10 if step < 30 else 20)
    rank.steps(30 + PAUSE_STEPS + 16 * 4)
    assert rank.steps(8) == [LIMIT] * 8
    assert rank.pace.num_pauses == 1


def test_a_slow_transfer_never_becomes_usual() -> None:
    """However long it lasts: only steps without transfers are remembered."""
    rank = ready(lambda step, pulled: 10 + 2 * (pulled > 0), fields={"pace_tolerance": 0.15})
    rank.steps(1000)
    assert rank.pace.budget_bytes == LEAST
    assert rank.pace.usual.of(Phase.DECODE, 8) == (10_000, 0)


def test_a_burst_pauses_and_resumes_at_the_least() -> None:
    """Three slow steps in a row: nothing is issued for 16 steps, then the least."""
    rank = ready(lambda step, pulled: 30 if 40 <= step < 40 + BURST else 10)
    pulled = rank.steps(20 + BURST + PAUSE_STEPS + 3)
    # the step after each slow one issues nothing, the one after the third begins the pause
    assert pulled[:21] == [LIMIT] * 21
    assert pulled[21 : 20 + BURST + PAUSE_STEPS] == [0] * (BURST - 1 + PAUSE_STEPS)
    assert pulled[20 + BURST + PAUSE_STEPS :] == [LEAST] * 3
    assert rank.pace.num_pauses == 1


def test_one_slow_step_is_left_alone_once() -> None:
    """It may be chance, but the budget is cut; the step after the next issues again."""
    rank = ready(lambda step, pulled: 20 if step == 25 else 10)
    assert rank.steps(9) == [LIMIT] * 6 + [0] + [LIMIT // 2] * 2


def test_prompts_among_decode_steps_are_usual() -> None:
    """A phase that takes nine times as long is compared with itself, and so is a batch of many tokens."""
    rank = Rank(lambda step, pulled: 90 if step % 5 == 4 else 10)
    for step in range(120):
        long = step % 5 == 0  # `begin` tells of the step before
        rank.phase = Phase.PREFILL if long else Phase.DECODE
        pulled = rank.step(plan=step > 40, tokens=4000 if long else 8)
        assert pulled == (LIMIT if step > 40 else 0)
    rank.phase = Phase.MIXED
    for step in range(120, 240):
        assert rank.step(plan=step > 160, tokens=4000 if step % 5 == 0 else 8) == (LIMIT if step > 160 else 0)


def test_scatter_is_not_held_against_transfers() -> None:
    """Steps that differ by 10 % anyway: a median that is 5 % longer is chance."""
    rank = ready(lambda step, pulled: (9.5, 10, 10.5)[step % 3] * (1.05 if pulled else 1))
    assert rank.steps(200) == [LIMIT] * 200


def test_idle_steps_may_pull_more() -> None:
    """Dummy steps, and steps after a wait for requests, have a limit of their own; by default the same."""
    idle = {"idle_pull_bytes_per_step": 4 * LIMIT}
    dummy = ready(lambda step, pulled: 10, fields=idle, phase=Phase.DUMMY)
    assert dummy.steps(3) == [4 * LIMIT] * 3
    assert ready(lambda step, pulled: 10, phase=Phase.DUMMY).steps(3) == [LIMIT] * 3

    waiting = ready(lambda step, pulled: 10, fields=idle)
    found = [waiting.step(plan=True, measured=True, gap_ms=gap) for gap in (0, 0, 500, 0, 9, 0)]
    assert found == [LIMIT, LIMIT, LIMIT, 4 * LIMIT, LIMIT, LIMIT]

    unmeasured = ready(lambda step, pulled: 10, fields=idle)
    unmeasured.step(plan=False, gap_ms=500)
    assert unmeasured.steps(2) == [4 * LIMIT, LIMIT]


def test_a_wait_is_not_a_burst() -> None:
    """Waits of an engine that does not measure its steps, now and then, do not bring the budget down."""
    rank = ready(lambda step, pulled: 500 if step % 7 == 6 else 10)
    pulled = rank.steps(140)
    assert set(pulled) == {0, LIMIT}
    assert rank.pace.num_pauses == 0


def test_a_budget_below_a_row_is_saved_up() -> None:
    """Rows of 10 at a budget of 4 go every second or third step; rows above the limit at most once in 16."""
    rank = ready(lambda step, pulled: 10 * (1.2 if pulled else 1), row_bytes=10)
    rank.steps(40)
    pulled = rank.steps(400)
    assert set(pulled) == {0, 10}
    assert 400 * LEAST / 10 * 0.5 < sum(map(bool, pulled)) <= 400 * LEAST / 10 + 1

    large = ready(lambda step, pulled: 10 * (1.2 if pulled else 1), row_bytes=1000)
    assert large.steps(4) == [1000] * 4
    large.steps(40)
    gone = sum(map(bool, large.steps(320)))
    assert 8 <= gone <= 320 / (LIMIT / LEAST) + 1


def test_switched_off() -> None:
    """The limit at every step, but after a slow one; with a ratio of 0 always."""
    takes = lambda step, pulled: 30 if step % 10 == 0 else 10 + pulled / 10  # noqa: E731
    off = ready(takes, fields={"adapt_pace": False, "pace_tolerance": 0.0})
    assert set(off.steps(200)) == {0, LIMIT}
    assert (off.pace.num_pauses, off.pace.num_slowdowns, off.pace.budget_bytes) == (0, 0, LIMIT)
    never = ready(takes, fields={"adapt_pace": False, "slow_step_ratio": 0})
    assert never.steps(200) == [LIMIT] * 200


STEP = st.tuples(
    st.sampled_from(list(Phase)),
    st.integers(0, 9000),
    st.floats(0.01, 5000),
    st.booleans(),
    st.one_of(st.none(), st.floats(-1, 1e7)),
    st.booleans(),
)


@given(
    script=st.lists(STEP, max_size=120),
    limit=st.integers(1, 100),
    least=st.integers(1, 120),
    idle=st.sampled_from([1, 1, 1, 4]),
    row=st.integers(1, 300),
)
def test_the_limits_always_hold(script: Sequence[tuple[Any, ...]], limit: int, least: int, idle: int, row: int) -> None:
    """Whatever steps do: no grant is above the limit of its kind of step, and the budget is not below the least."""
    hook = HookSettings(
        pull_bytes_per_step=limit, least_pull_bytes_per_step=least, idle_pull_bytes_per_step=idle * limit
    )
    pace, now_ns = Pace(hook, row), 1
    for phase, tokens, took_ms, plan, measured, odd in script:
        pace.begin(now_ns, phase, tokens, measured)
        now_ns += int(took_ms * MS)
        granted = pace.grant(phase) if plan else 0
        assert 0 <= granted <= limit * idle  # most examples have an idle limit that is the same
        assert min(least, limit) <= pace.budget_bytes <= limit
        pace.ran(granted if row <= granted else 0, 0, odd=odd)


@given(factors=st.lists(st.floats(0.5, 4), max_size=80), quiet_ms=st.floats(0.1, 100))
def test_it_recovers_from_anything(factors: list[float], quiet_ms: float) -> None:
    """After any past, steps that are as usual bring the limit back."""
    rank = ready(lambda step, pulled: quiet_ms * (factors[step - 20] if pulled and step - 20 < len(factors) else 1))
    rank.steps(len(factors) + 2 * PAUSE_STEPS + 17 * 4 + 4)
    assert rank.pace.budget_bytes == LIMIT
    assert rank.steps(2) == [LIMIT] * 2

"""Damaged inputs are refused in the promised way: hypothesis and short runs of the fuzzer; the long form is scripts/fuzz.

What the fuzzer has found is kept as tests beside what it was found in: tests/runtime/test_control.py, test_publisher.py,
test_offline_files.py and tests/core/test_config.py.
"""

from collections.abc import Callable, Iterator
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eplb_async.core.errors import PlanInvalid
from eplb_async.core.plan import decode_plan, encode_plan
from eplb_async.runtime.messages import decode_call
from tests.faults import fuzz_plan
from tests.faults.fuzz import TARGETS, Target, input_of, run
from tests.faults.fuzz_control import ControlFuzz
from tests.faults.fuzz_files import SettingsFuzz, TracesFuzz
from tests.faults.fuzz_plan import PlanFuzz
from tests.faults.mutation import Mutator

__all__: list[str] = []

MAKERS: dict[str, Callable[[], Target]] = {
    "control": lambda: ControlFuzz(every=0),
    "plan": PlanFuzz,
    "settings": SettingsFuzz,
    "traces": TracesFuzz,
}


@pytest.fixture(params=sorted(MAKERS))
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, group: str) -> Iterator[Target]:
    """Each target, the control protocol without a daemon."""
    monkeypatch.setattr(fuzz_plan, "group_name", lambda: group)
    made = MAKERS[request.param]()
    yield made
    made.close()


def test_short_run_finds_nothing(target: Target) -> None:
    """No input crashes, hangs, or is taken for what it is not; both outcomes occur, so the inputs are worth something."""
    campaign = run(target, 400, seed=11)
    assert campaign.findings == []
    assert campaign.kinds["refused"] > 50
    assert len(campaign.kinds) > 1


def test_input_is_made_again_from_its_number(target: Target) -> None:
    """`--only` shows the very input that was found."""
    inputs = [input_of(target, 3, number) for number in range(50)]
    assert [input_of(target, 3, number) for number in reversed(range(50))] == inputs[::-1]
    assert len(set(inputs)) > 20


@pytest.mark.timeout(60)
def test_daemon_survives_what_is_sent_to_it() -> None:
    """A real daemon answers or hangs up, lives, and does not grow."""
    fuzzed = ControlFuzz(every=1)
    try:
        campaign = run(fuzzed, 200, seed=5)
    finally:
        told = fuzzed.close()
    assert campaign.findings == []
    assert "daemon alive after 200" in told


class _Wrong:
    """A target with a fault of each kind."""

    name = "wrong"

    def make(self, rng: Random) -> bytes:
        """Five bytes."""
        return rng.randbytes(5)

    def check(self, data: bytes) -> str:
        """Fails for one in sixteen, never ends for one in thirty-two."""
        if data[0] < 16:
            raise KeyError("not refused")
        while data[0] > 248:
            pass
        return "fine"

    def close(self) -> str:
        """Nothing."""
        return ""


def test_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash and an endless loop are findings with their number and their input."""
    monkeypatch.setattr("tests.faults.fuzz.INPUT_LIMIT_S", 0.05)
    campaign = run(_Wrong(), 200, seed=0)
    errors = {error.split(":")[0] for _, _, error in campaign.findings}
    assert errors == {"KeyError", "TooSlow"}
    number, data, _ = campaign.findings[0]
    assert input_of(_Wrong(), 0, number) == data
    assert set(TARGETS) == set(MAKERS)


@given(st.binary(max_size=300))
@example(b'{"version":1,"method":"st\xff"}')
@example(b"[" * 3000)
def test_any_bytes_are_a_request_or_refused(line: bytes) -> None:
    """The decoder never raises."""
    call, answer = decode_call(line)
    assert (call is None) == (answer is not None)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_plan_or_invalid(data: bytes) -> None:
    """Bytes on the board are a plan, or PlanInvalid; nothing else is raised."""
    try:
        plan = decode_plan(data)
    except PlanInvalid:
        return
    assert decode_plan(encode_plan(plan)) == plan


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4), st.integers(0, 2**40))
def test_mutations_are_made_of_any_corpus(corpus: list[bytes], seed: int) -> None:
    """Also of empty members; the corpus stays as it was."""
    mutator = Mutator(corpus)
    before = list(mutator.corpus)
    for number in range(5):
        assert isinstance(mutator.damaged(Random(seed + number)), bytes)
    assert mutator.corpus == before

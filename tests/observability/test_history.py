"""Decisions are kept, changed and forgotten in order."""

import json

import msgspec
import pytest

from eplb_async.observability.history import Decision, DecisionHistory, Outcome

__all__: list[str] = []


def decision(number: int) -> Decision:
    """A decision that is being planned."""
    return Decision(
        number=number,
        group="g",
        incarnation=1,
        time_unix_s=0.0,
        trigger="test",
        policy="default",
        outcome=Outcome.PLANNING,
    )


def test_only_the_newest_are_kept() -> None:
    """The oldest goes when there are too many, and when fewer are to be kept."""
    history = DecisionHistory(3)
    for number in range(5):
        history.put(decision(number))
    assert [kept.number for kept in history.newest()] == [2, 3, 4]
    assert [kept.number for kept in history.newest(2)] == [3, 4]
    history.resize(1)
    assert [kept.number for kept in history.newest(10)] == [4]


def test_change_replaces_in_place() -> None:
    """A changed decision stays where it was; one that is gone cannot be changed."""
    history = DecisionHistory(2)
    history.put(decision(1))
    history.put(decision(2))
    assert history.change(1, outcome=Outcome.FAILED, why="because") is not None
    assert [(kept.number, kept.outcome) for kept in history.newest()] == [(1, Outcome.FAILED), (2, Outcome.PLANNING)]
    assert history.change(9, why="gone") is None


@pytest.mark.parametrize("outcome", list(Outcome))
def test_decisions_survive_json(outcome: Outcome) -> None:
    """A decision goes through JSON and comes back; only those on their way are not final."""
    one = msgspec.structs.replace(decision(1), outcome=outcome, par_live_L=(1.5, 2.0), layers=(0, 3))
    assert msgspec.json.decode(msgspec.json.encode(one), type=Decision) == one
    assert json.loads(msgspec.json.encode(one))["outcome"] == outcome.value
    assert outcome.final == (outcome not in (Outcome.PLANNING, Outcome.PUBLISHED))

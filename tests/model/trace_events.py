"""Recorded events of real processes: what they look like, and what can be said of them without a search.

Every process records a list of events, in order, each *before* its effect can be seen by another process (so the list of a
killed process is never too short): `staged` before a word says so, `decide` before the commit that it issues completes,
`board` before the board is written. Counters are [generation, position]; the first is [1, 0], and a plan g that was
finished or dropped reads [g + 1, 0].

    of a rank                                               recorded when
    publish   step staged committed error digest            its word of that step goes out; digest -1: holds no plan
    decide    step decided                                  it acted on the words of step - lag (may be left out before step lag)
    adopt     step generation plan                          it took that plan from the board
    refuse    step generation                               it set its error word instead: other base, or not valid
    staged    counter                                       the pull of that entry, and of all before it, has completed
    committed counter                                       likewise for the commit; or, at [g + 1, 0], a drop has drained
    error     generation why                                it set its error word; `why` starts with "abort" for an abort
    forward   step maps                                     it runs that forward; per layer a version, digest or whole map

    of a daemon (`node`, default 0, says which)
    board     plan generation base entries                  it publishes this plan; base and entries: [[layer, [expert, ...]], ...]
    abort     generation
    crash, restart                                          written by whoever kills and starts it
    damage    generation                                    somebody else wrote to the board, before: from now on this
                                                            generation may fail, be refused or be aborted without a plan
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tests.model.states import NO_PLAN, Map, Plan, counter

__all__ = ["Event", "MalformedTrace", "Plans", "direct_findings", "packed", "plans_of"]

Event = dict[str, Any]
NO_DIGEST = (NO_PLAN, 0, "", None)
"""What a word may carry as the digest of no plan."""


class MalformedTrace(ValueError):
    """Events that do not say what they must."""


class Plans(NamedTuple):
    """Plans by index, and the index of each digest."""

    plans: tuple[Plan, ...]
    by_digest: dict[Any, int]

    def find(self, digest: Any) -> int:
        """The plan's index, NO_PLAN for no plan.

        Raises:
            MalformedTrace: no board event has that digest.
        """
        if digest in self.by_digest:
            return self.by_digest[digest]
        if digest in NO_DIGEST:
            return NO_PLAN
        raise MalformedTrace(f"no board event has the plan {digest!r}")


def packed(pair: Sequence[int]) -> int:
    """A counter of a trace as the model has it."""
    generation, position = pair
    return counter(generation, position)


def plans_of(daemon_trace: Iterable[Event], start: Sequence[Map]) -> Plans:
    """All plans that any board held.

    Raises:
        MalformedTrace: a plan without entries, a layer or a width that does not exist, or two contents with one digest.
    """
    plans: list[Plan] = []
    index: dict[Any, int] = {}
    for event in daemon_trace:
        if event["event"] != "board":
            continue
        plan = Plan(event["generation"], _layer_maps(event["base"], start), _layer_maps(event["entries"], start))
        if not plan.entries or not {layer for layer, _ in plan.entries} <= {layer for layer, _ in plan.base}:
            raise MalformedTrace(f"plan {event['plan']!r} has no entries, or no base map for a layer that it changes")
        if event["plan"] not in index:
            index[event["plan"]] = len(plans)
            plans.append(plan)
        elif plans[index[event["plan"]]] != plan:
            raise MalformedTrace(f"two plans have the digest {event['plan']!r}")
    return Plans(tuple(plans), index)


def _layer_maps(pairs: Iterable[Sequence[Any]], start: Sequence[Map]) -> tuple[tuple[int, Map], ...]:
    maps = tuple((int(layer), tuple(int(expert) for expert in row)) for layer, row in pairs)
    for layer, row in maps:
        if not 0 <= layer < len(start) or len(row) != len(start[layer]):
            raise MalformedTrace(f"a map of layer {layer} with {len(row)} slots; there are {len(start)} layers")
    return maps


def direct_findings(rank_traces: Sequence[Sequence[Event]]) -> list[str]:
    """Properties that can be read off the events: (a) equal maps in each forward, (f) equal counters at each step,
    steps in order without gaps, and counters that only grow, with committed <= staged.
    """
    found: list[str] = []
    for kind, value, text in (("forward", "maps", "(a) maps of the forward"), ("decide", "decided", "(f) counters")):
        first: dict[int, tuple[int, Any]] = {}
        for r, events in enumerate(rank_traces):
            for event in (event for event in events if event["event"] == kind):
                other, seen = first.setdefault(event["step"], (r, event[value]))
                if seen != event[value]:
                    step = event["step"]
                    found.append(f"{text} at step {step}: rank {other} has {seen}, rank {r} has {event[value]}")
    for r, events in enumerate(rank_traces):
        found += _words_in_order(r, [event for event in events if event["event"] == "publish"])
    return found


def _words_in_order(rank: int, words: list[Event]) -> list[str]:
    found = []
    for i, word in enumerate(words):
        before = words[max(i - 1, 0)]
        if word["step"] != i:
            found.append(f"rank {rank}: word {i} is of step {word['step']}; steps start at 0 and have no gaps")
        if any(packed(word[name]) < packed(before[name]) for name in ("staged", "committed")):
            found.append(f"rank {rank}: a counter of its words shrinks at step {word['step']}")
        if packed(word["committed"]) > packed(word["staged"]):
            found.append(f"rank {rank}: its word of step {word['step']} has committed > staged")
    return found

"""Traces checked while their processes still run, a cut at a time: the search goes on from where the last cut was accepted.

A cut is consistent when no event in it depends on one that is missing: all processes of a group are stopped, and then
their traces are read. Each cut must be a behaviour of the model as a whole. If the search cannot go on from the state that
it found for the last cut, another way through the events before may still exist: then all is searched from the start.
"""

from collections.abc import Sequence

from tests.model.states import Map, Scenario
from tests.model.trace_check import MAX_POINTS, Search
from tests.model.trace_events import Event, MalformedTrace, direct_findings, plans_of
from tests.model.trace_rules import Point, TraceModel

__all__ = ["RunningCheck"]


class RunningCheck:
    """The traces of one incarnation of a group on one node, as they grow.

    Attributes:
        num_events, num_points: seen so far, and visited in all searches.
    """

    def __init__(self, start_maps: Sequence[Sequence[int]], num_ranks: int, lag: int, rows: int) -> None:
        """`start_maps`: expert in every slot per layer; `lag` and `rows` as for `check_traces`."""
        self._start: tuple[Map, ...] = tuple(tuple(int(expert) for expert in row) for row in start_maps)
        self._num_ranks, self._lag, self._rows = num_ranks, lag, rows
        self._traces: list[list[Event]] = [[] for _ in range(num_ranks + 1)]
        self._done = [0] * (num_ranks + 1)
        self._point: Point | None = None
        self._rejected: list[str] = []
        self.num_events = self.num_points = 0

    def extend(self, rank_events: Sequence[Sequence[Event]], daemon_events: Sequence[Event]) -> list[str]:
        """Add what was recorded since the last cut; what is wrong, [] if nothing is or it was said before
        was not)."""
        for trace, new in zip(self._traces, [*rank_events, daemon_events], strict=True):
            trace += new
            self.num_events += len(new)
        if self._rejected:
            return []  # said before
        try:
            plans = plans_of(self._traces[-1], self._start)
        except MalformedTrace as error:
            self._rejected = [str(error)]
            return self._rejected
        scenario = Scenario("running", (0,) * self._num_ranks, self._start, plans.plans, lag=self._lag, rows=self._rows)
        rules = TraceModel(scenario, plans)
        if self._point is not None:
            rest = [trace[done:] for trace, done in zip(self._traces, self._done, strict=True)]
            if self._search(rules, rest, self._point) is not None:
                return []
        if self._search(rules, self._traces, None) is None:
            return self._rejected
        return []

    def end(self) -> list[str]:
        """What can be said of all events without a search."""
        return direct_findings(self._traces[:-1])

    def _search(self, rules: TraceModel, traces: list[list[Event]], point: Point | None) -> Search | None:
        first = None if point is None else point._replace(positions=(0,) * len(traces))
        search = Search(rules, traces, first)
        accepted = search.run()
        self.num_points += search.num_points
        if not accepted and point is not None:
            return None
        if not accepted:
            given_up = [f"the search was given up after {MAX_POINTS} points"] * (search.num_points >= MAX_POINTS)
            self._rejected = [*given_up, f"rejected after {search.best.positions} events", *search.stuck()]
            return None
        self._point, self._done = search.best, [len(trace) for trace in self._traces]
        return search

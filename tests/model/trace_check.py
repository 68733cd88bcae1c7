"""Are recorded traces of real processes a behaviour that the model of the commit agreement allows?

`check_traces` searches for an interleaving of the events (trace_events.py has their list) in which every event is possible
by the model's rules, keeps its own process's order, and carries the values that the model computes. The search walks over
points (events taken from each trace, state of the model). Events that can neither disturb another process nor be disturbed
by one are taken at once, in any order; alternatives are tried only among the others, and each point is visited once. An
event that its own rank's past contradicts ends a branch. Lock step keeps ranks within lag + 1 steps of each other, so the
search stays about as long as the traces.

What is left open, always in favour of the traces:
- A rank's step is taken in pieces (publish, decide, look, forward), and its device may complete work between any two.
- Waiting rules (I4, I12) are judged by the newest words at the point found, only decisions by those of step - lag.
- A board may be read, decoded and validated beside the steps: adoption is a look at the board at a later step, and may
  stand anywhere in that step.
- The start of a pull is no event. Pulls start in the model when they complete, which is the latest they can, so rules that
  forbid a start too early are checked only as far as the completion came too early as well.
- When a drop has drained is not known: `committed` reaches [g + 1, 0] at any time after the drop. So a rank that does not
  wait for its orphans (I5) is not seen here.
- A board that was rewritten too early (I13) is seen only if a rank adopts from it too early: its event can be put later.
- An error word may be set for any reason while its generation is the rank's own and on a board; only aborts are checked.
Liveness and the words' history are not in traces at all. The tests check those on the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.model.states import Scenario, generation_of
from tests.model.trace_events import Event, MalformedTrace, direct_findings, packed, plans_of
from tests.model.trace_rules import NotNow, Point, TraceModel, Wrong

__all__ = ["MAX_POINTS", "Search", "Verdict", "check_traces"]

MAX_POINTS = 200_000
"""Points after which a search is given up: traces of a few thousand events need about one point for each."""

ALONE = {"decide", "forward", "error", "abort", "crash", "restart", "damage"}
"""Events whose success cannot be undone by those of another process, and which can undo none: each reads only what grows
(words, aborts, published generations) and writes only its own process."""

FIRST_TRIED = {"staged": 0, "adopt": 1, "refuse": 2, "board": 3, "committed": 4, "publish": 5}
"""Order among the others: what reads slots and boards goes before what writes them."""


@dataclass(frozen=True)
class Verdict:
    """Whether the traces are a behaviour of the model; if not, how far they are one, and what is wrong there.

    Fields:
        accepted: true when an interleaving was found.
        findings: properties that the events break by themselves, without a search.
        taken: events of each process in the longest consistent prefix; ranks first, then daemons.
        stuck: for each process with events left, its next event and why it is not possible after that prefix.
        num_points: points visited.
    """

    accepted: bool
    findings: list[str] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    num_points: int = 0

    def __str__(self) -> str:
        if self.accepted:
            return f"accepted ({self.num_points} points)"
        return "\n".join([f"rejected after {self.taken} events", *self.findings, *self.stuck])


class Search:
    """Depth first over points, each visited once; from `first` if that is given, whose positions count in these traces.

    Attributes:
        best: after an accepted run the point at which all events are taken.
    """

    def __init__(self, rules: TraceModel, traces: list[list[Event]], first: Point | None = None) -> None:
        self.rules, self.traces = rules, traces
        self.names = [f"rank {r}" for r in range(rules.model.num_ranks)]
        self.names += [f"daemon {n}" for n in range(len(traces) - rules.model.num_ranks)]
        self.first = self.best = rules.first() if first is None else first
        self.num_points = 0

    def run(self) -> bool:
        """True when all events could be taken."""
        stack, seen = [self.first], {self.first}
        while stack and self.num_points < MAX_POINTS:
            point = stack.pop()
            self.num_points += 1
            if sum(point.positions) > sum(self.best.positions):
                self.best = point
            if all(position == len(trace) for position, trace in zip(point.positions, self.traces, strict=True)):
                self.best = point
                return True
            following = [after for after in self.successors(point) if after not in seen]
            seen.update(following)
            stack += following[::-1]  # the first is tried first
        return False

    def successors(self, point: Point) -> list[Point]:
        """Points to go on from: one, if some event may be taken alone; none, if some event can never be taken."""
        others = []
        for process, event in self.pending(point):
            alone = self.alone(point, process, event)
            try:
                after = self.rules.apply(point, process, event)
            except NotNow:
                continue
            except Wrong:
                if alone:
                    return []
                continue
            if alone:
                return [after]
            others.append((FIRST_TRIED[event["event"]], process, after))
        return [after for _, _, after in sorted(others, key=lambda item: item[:2])]

    def pending(self, point: Point) -> list[tuple[int, Event]]:
        """The next event of each process."""
        positions = enumerate(point.positions)
        return [(process, self.traces[process][i]) for process, i in positions if i < len(self.traces[process])]

    def alone(self, point: Point, process: int, event: Event) -> bool:
        """As ALONE; a word too, unless it may change what generation a daemon has to publish."""
        if event["event"] != "publish":
            return event["event"] in ALONE
        last = point.state.words[process][-1].committed
        return generation_of(packed(event["committed"])) == generation_of(last)

    def stuck(self) -> list[str]:
        """Why no process can go on after the longest consistent prefix."""
        lines = []
        for process, event in self.pending(self.best):
            try:
                self.rules.apply(self.best, process, event)
                why = "possible here, but nothing after it"
            except (NotNow, Wrong) as reason:
                why = str(reason)
            lines.append(f"{self.names[process]}, event {self.best.positions[process]}: {event}: {why}")
        return lines


def check_traces(  # size: the parameters are the traces and the case, each once
    rank_traces: Sequence[Sequence[Event]],
    daemon_trace: Sequence[Event],
    start_maps: Sequence[Sequence[int]],
    num_slots_per_rank: int,
    lag: int,
    rows: int,
    nodes: Sequence[int] = (),
    every: int = 1,
) -> Verdict:
    """Check traces of one incarnation of a group.

    Args:
        rank_traces: events of each rank, in its order.
        daemon_trace: events of all daemons, in the order of each.
        start_maps: for each layer the expert in every slot at step 0, -1 for none.
        num_slots_per_rank: S.
        lag: steps between a word and the decision on it.
        rows: entries that a rank may hold in staging at once (staged, or committing).
        nodes: node of each rank; default: all on node 0.
        every: steps from one reduction of the words to the next.

    Raises:
        MalformedTrace: events that do not say what they must.
    """
    start = tuple(tuple(int(expert) for expert in row) for row in start_maps)
    places = tuple(nodes) or (0,) * len(rank_traces)
    if any(len(row) != num_slots_per_rank * len(rank_traces) for row in start) or len(places) != len(rank_traces):
        raise MalformedTrace(f"{len(rank_traces)} ranks of {num_slots_per_rank} slots do not fit the maps or the nodes")
    plans = plans_of(daemon_trace, start)
    scenario = Scenario("recorded", places, start, plans.plans, lag=lag, rows=rows, every=every)
    daemons = [[event for event in daemon_trace if event.get("node", 0) == n] for n in range(max(places) + 1)]
    search = Search(TraceModel(scenario, plans), [*map(list, rank_traces), *daemons])
    findings = direct_findings(rank_traces)
    accepted = search.run()
    if search.num_points >= MAX_POINTS:
        findings.append(f"the search was given up after {MAX_POINTS} points")
    taken, stuck = list(search.best.positions), [] if accepted else search.stuck()
    return Verdict(accepted and not findings, findings, taken, stuck, search.num_points)

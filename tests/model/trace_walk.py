"""Random walks through the model that record what real processes would: traces to try the trace checker on."""

import random
from dataclasses import dataclass, field

from tests.model.choices import Action, daemon_actions, rank_actions
from tests.model.rules import Model
from tests.model.states import (
    NO_PLAN,
    Map,
    Plan,
    Rank,
    Scenario,
    State,
    counter,
    generation_of,
    position_of,
)
from tests.model.trace_events import Event

__all__ = ["Walk", "Walker", "digest", "pair", "walk"]


RARE = ("deadline", "aborts", "crashes", "fails")


@dataclass(frozen=True)
class Walk:
    """What a walk recorded, and the violations it met on its way (broken variants go on after one)."""

    scenario: Scenario
    rank_traces: list[list[Event]]
    daemon_trace: list[Event]
    violations: list[str]


class _Watched(Model):
    """A model that notes violations instead of stopping at them."""

    def __init__(self, scenario: Scenario, broken: str) -> None:
        super().__init__(scenario, broken, fine=True)
        self.violations: list[str] = []

    def fault(self, text: str) -> None:
        self.violations.append(text)

    def add_plan(self, plan: Plan) -> None:
        """One more plan that a daemon may publish."""
        number, num_entries = len(self.case.plans), len(plan.entries)
        self.case = self.case._replace(plans=(*self.case.plans, plan))
        for k in range(1, num_entries + 1):
            for r in range(self.num_ranks):
                self.moves[number, k, r] = self.moves_of(plan, k, r)


def walk(scenario: Scenario, seed: int, num_steps: int, broken: str = "", max_plans: int = 0) -> Walk:
    """One random walk of `num_steps` forwards of every rank; plans beyond the scenario's are made up, up to `max_plans`."""
    return Walker(scenario, seed, broken, max_plans).run(num_steps)


@dataclass
class _Traces:
    ranks: list[list[Event]]
    daemons: list[Event] = field(default_factory=list)


def pair(packed: int) -> list[int]:
    """A counter as traces have it."""
    return [generation_of(packed), position_of(packed)]


def digest(plan: int) -> str | int:
    """What stands for a plan in traces."""
    return f"plan-{plan}" if plan >= 0 else NO_PLAN


class Walker:
    """A walk in progress."""

    def __init__(self, scenario: Scenario, seed: int, broken: str, max_plans: int) -> None:
        self.random, self.model = random.Random(seed), _Watched(scenario, broken)
        self.state, self.max_plans = self.model.initial(), max_plans
        num_ranks, num_layers = len(scenario.nodes), len(scenario.start)
        self.traces = _Traces([[] for _ in range(num_ranks)])
        self.step = [0] * num_ranks
        self.versions = [[0] * num_layers for _ in range(num_ranks)]
        self.pace = [self.random.choice((1.0, 0.2, 0.05)) for _ in range(num_ranks)]
        self.by_content = self.random.random() < 0.3  # else forwards tell versions

    def run(self, num_steps: int) -> Walk:
        """Walk until every rank has run that many forwards."""
        while min(self.step) < num_steps:
            self._make_up_a_plan()
            hosts = [action for action in rank_actions(self.model, self.state) if self._wanted(action[0])]
            daemons = [action for action in daemon_actions(self.model, self.state) if self._wanted(action[0])]
            choices = hosts + (daemons if self.random.random() < 0.2 or not hosts else [])
            self._take(self.random.choice(choices))
        return Walk(self.model.case, self.traces.ranks, self.traces.daemons, self.model.violations)

    def _wanted(self, label: str) -> bool:
        """What ends a plan is rare, so that most are finished; devices have a pace of their own."""
        if any(rare in label for rare in RARE):
            return self.random.random() < 0.03
        slow = label.endswith(("completes", "on the device"))
        return not slow or self.random.random() < self.pace[int(label.split()[1].rstrip(":"))]

    def _take(self, action: Action) -> None:
        label, apply = action
        before, self.state = self.state, apply()
        who, number = label.replace(":", "").split()[:2]
        if who == "daemon":
            self._record_daemon(label, before, int(number))
            return
        r = int(number)
        events = self._events_of_rank(label, r, before, before.ranks[r], self.state.ranks[r])
        self.traces.ranks[r] += events

    def _events_of_rank(self, label: str, r: int, before: State, old: Rank, new: Rank) -> list[Event]:
        step = self.step[r]
        if label.endswith("publishes its word"):
            word = self.state.words[r][-1]
            counters = {"staged": pair(word.staged), "committed": pair(word.committed), "error": word.error}
            return [{"event": "publish", "step": step, **counters, "digest": digest(word.digest)}]
        if label.endswith("decides"):
            for plan, position in new.commits[len(old.commits) :]:
                self.versions[r][self.model.case.plans[plan].entries[position - 1][0]] += 1
            return [{"event": "decide", "step": step, "decided": pair(new.decided)}, *self._completed(old, new)]
        if label.endswith("looks"):
            return self._looked(r, before, old, new)
        if label.endswith("steps"):
            self.step[r] += 1
            maps = [str(row) for row in self.model.planned(old)] if self.by_content else list(self.versions[r])
            return [{"event": "forward", "step": step, "maps": maps}]
        if label.endswith(("(deadline)", "pull fails")):
            return [{"event": "error", "generation": new.error, "why": label.rsplit(":", maxsplit=1)[-1]}]
        if old.pull and new.pull is None:
            staged = new.rows != old.rows
            done = pair(counter(self.model.case.plans[old.pull[0]].generation, old.pull[1]))
            return ([{"event": "staged", "counter": done}] if staged else []) + self._completed(old, new)
        done = pair(max(self.model.after(*old.commits[0]), new.committed * (self.model.broken != "counters_at_issue")))
        return [{"event": "committed", "counter": done}]

    def _looked(self, r: int, before: State, old: Rank, new: Rank) -> list[Event]:
        events: list[Event] = []
        board = before.boards[self.model.case.nodes[r]]
        if new.error != old.error:
            kind = {"event": "error", "why": "abort seen"} if board.abort == new.error else {"event": "refuse"}
            events.append({**kind, "step": self.step[r], "generation": new.error})
        if new.plan != old.plan:
            generation = generation_of(new.decided)
            plan = digest(new.plan)
            events.append({"event": "adopt", "step": self.step[r], "generation": generation, "plan": plan})
        for staged in range(old.staged + 1, new.staged + 1):
            entry = (new.plan, position_of(staged))
            if not self.model.moves[(*entry, r)] and self.random.random() < 0.5:
                events.append({"event": "staged", "counter": pair(staged)})
        return events

    def _completed(self, old: Rank, new: Rank) -> list[Event]:
        """A drop may drain at once, or with the end of a pull; it may be recorded, or only be seen in the next word."""
        silent = (
            self.model.broken == "counters_at_issue" or new.committed == old.committed or self.random.random() < 0.5
        )
        return [] if silent else [{"event": "committed", "counter": pair(new.committed)}]

    def _record_daemon(self, label: str, before: State, node: int) -> None:
        events: list[Event] = []
        old, new = before.boards[node], self.state.boards[node]
        if "publishes" in label or ("while it writes" in label and self.random.random() < 0.5):
            events.append(self._board_event(int(label.split("plan ")[1].split(maxsplit=1)[0])))
        if "crashes" in label:
            events.append({"event": "crash"})
        if "restarts" in label:
            events.append({"event": "restart"})
        if new.abort != old.abort:
            events.append({"event": "abort", "generation": new.abort})
        self.traces.daemons += [{**event, "node": node} for event in events]

    def _board_event(self, index: int) -> Event:
        plan = self.model.case.plans[index]
        base = [[layer, list(row)] for layer, row in plan.base]
        entries = [[layer, list(row)] for layer, row in plan.entries]
        return {
            "event": "board",
            "plan": digest(index),
            "generation": plan.generation,
            "base": base,
            "entries": entries,
        }

    def _make_up_a_plan(self) -> None:
        """Give daemons a plan for the next generation (two for a fork), now and then one that starts from wrong maps."""
        plans = self.model.case.plans
        words = [[self.state.words[r][-1].committed for r in members] for members in self.model.members]
        generation = max(generation_of(min(committed)) for committed in words)
        wanted = 2 if self.model.case.forked else 1
        if len(plans) >= self.max_plans or [plan.generation for plan in plans].count(generation) >= wanted:
            return
        ahead = max(self.state.ranks, key=lambda rank: rank.decided)
        maps = self.model.planned(ahead)
        if self.random.random() < 0.1:
            maps = tuple(self._shuffled(row) for row in maps)
        layers = [self.random.randrange(len(maps)) for _ in range(self.random.randint(1, 4))]
        entries = tuple((layer, self._shuffled(maps[layer])) for layer in layers)
        base = tuple((layer, maps[layer]) for layer in sorted(set(layers)))
        self.model.add_plan(Plan(generation, base, entries))

    def _shuffled(self, row: Map) -> Map:
        mixed = list(row)
        self.random.shuffle(mixed)
        return tuple(mixed)

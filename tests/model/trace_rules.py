"""What one recorded event does to the model's state, if the model allows it there."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tests.model.rules import Model, Violation
from tests.model.states import (
    DECIDED,
    IDLE,
    NO_PLAN,
    PUBLISHED,
    Map,
    Rank,
    Scenario,
    State,
    generation_of,
    position_of,
    replaced,
)
from tests.model.trace_events import Event, MalformedTrace, Plans, packed

__all__ = ["NotNow", "Point", "TraceModel", "Wrong"]


WRITTEN, ANNOUNCED, TORN = range(3)
"""A daemon announces a plan before it writes it. If it dies right after, the board holds the plan (a rank that adopts it
proves that) or nothing: --board--> ANNOUNCED --crash--> TORN; an adoption, or another event of the daemon, --> WRITTEN."""


class NotNow(Exception):
    """The event is not possible in this state; it may be in a later one."""


class Wrong(Exception):
    """The event contradicts its own rank's past: no interleaving can make it possible."""


class Versions(NamedTuple):
    """Maps of one layer so far, oldest first, and what forwards called them (None: no forward yet)."""

    maps: tuple[Map, ...]
    labels: tuple[Any, ...]


class Point(NamedTuple):
    """A point of the search.

    positions: events taken from each trace, ranks first; base: step of the slowest rank; versions: per layer; epochs: per
    rank and layer how many commits it decided; published: generations that any board has held; writing: per node how sure it
    is that the board holds the announced plan (one of the states below); damaged: generations that may fail without a plan.
    """

    positions: tuple[int, ...]
    base: int
    state: State
    versions: tuple[Versions, ...]
    epochs: tuple[tuple[int, ...], ...]
    published: frozenset[int]
    writing: tuple[int, ...]
    damaged: frozenset[int] = frozenset()

    def with_rank(self, index: int, rank: Rank) -> "Point":
        """The same with another rank."""
        return self._replace(state=self.state._replace(ranks=replaced(self.state.ranks, index, rank)))


class _LazyModel(Model):
    """The model with `committed` moved by recorded events only: when a drop has drained cannot be known from outside."""

    def settle(self, rank: Rank) -> Rank:
        return rank


class TraceModel:
    """Applies events to points. Pulls are started at the moment they complete, which allows most (see trace_check.py)."""

    def __init__(self, scenario: Scenario, plans: Plans) -> None:
        self.model, self.plans = _LazyModel(scenario, fine=True), plans
        self._by_rank: dict[str, Callable[[Point, int, Event], Point]] = {
            "publish": self._publish,
            "decide": self._decide,
            "adopt": self._adopt,
            "refuse": self._refuse,
            "staged": self._staged,
            "committed": self._committed,
            "error": self._error,
            "forward": self._forward,
        }

    def first(self) -> Point:
        """Nothing happened yet."""
        start, num_ranks, num_nodes = self.model.case.start, self.model.num_ranks, len(self.model.members)
        return Point(
            positions=(0,) * (num_ranks + num_nodes),
            base=0,
            state=self.model.initial(),
            versions=tuple(Versions((row,), (None,)) for row in start),
            epochs=((0,) * len(start),) * num_ranks,
            published=frozenset(),
            writing=(WRITTEN,) * num_nodes,
        )

    def apply(self, point: Point, process: int, event: Event) -> Point:
        """The point after this event.

        Raises:
            NotNow, Wrong: the model does not allow it here, or ever.
        """
        try:
            if process >= self.model.num_ranks:
                after = self._daemon(point, process - self.model.num_ranks, event)
            elif event["event"] in self._by_rank:
                after = self._by_rank[event["event"]](point, process, event)
            else:
                raise Wrong(f"a rank has no event {event['event']!r}")
        except Violation as violation:
            raise NotNow(str(violation)) from violation
        except MalformedTrace as malformed:
            raise Wrong(str(malformed)) from malformed
        return after._replace(positions=replaced(point.positions, process, point.positions[process] + 1))

    # -- a rank's step ------------------------------------------------------------------------------------------------

    def _publish(self, point: Point, r: int, event: Event) -> Point:
        self._at_step(point, r, event, IDLE)
        rank = point.state.ranks[r]
        staged, committed = packed(event["staged"]), packed(event["committed"])
        if staged > rank.staged:
            point = self._stage_up_to(point, r, staged, only_without_pulls=True)
            rank = point.state.ranks[r]
        if committed > rank.committed:
            rank = _drained(rank, committed)
        generation = generation_of(rank.decided)
        # errors below the own generation do nothing any more: a rank may keep such a word, or clear it
        error = event["error"] if event["error"] >= generation else 0
        wanted = rank.staged, rank.committed, rank.error if rank.error >= generation else 0, rank.plan
        found = staged, committed, error, self.plans.find(event["digest"])
        if found != wanted:
            names = ("staged", "committed", "error", "digest")
            wrong = [name for name, a, b in zip(names, found, wanted, strict=True) if a != b]
            raise Wrong(f"the word's {', '.join(wrong)} is not what its rank has recorded until then")
        state = point.with_rank(r, rank._replace(error=error)).state
        return point._replace(state=self.model.publish_word(state, r))

    def _decide(self, point: Point, r: int, event: Event) -> Point:
        self._at_step(point, r, event, PUBLISHED)
        if not self.model.words_there(point.state, r):
            raise NotNow("a word of step - lag is not published")
        point = self._decided(point, r)
        now = point.state.ranks[r].decided
        if now != packed(event["decided"]):
            text = [generation_of(now), position_of(now)]
            raise Wrong(f"the words of step {event['step'] - self.model.lag} make `decided` {text}")
        return point

    def _decided(self, point: Point, r: int) -> Point:
        queued = len(point.state.ranks[r].commits)
        point = point._replace(state=self.model.decide_step(point.state, r))
        for plan, position in point.state.ranks[r].commits[queued:]:
            layer, new = self.model.case.plans[plan].entries[position - 1]
            epoch = point.epochs[r][layer] + 1
            versions = point.versions[layer]
            if epoch == len(versions.maps):
                versions = Versions((*versions.maps, new), (*versions.labels, None))
            point = point._replace(
                epochs=replaced(point.epochs, r, replaced(point.epochs[r], layer, epoch)),
                versions=replaced(point.versions, layer, versions),
            )
        return point

    def _adopt(self, point: Point, r: int, event: Event) -> Point:
        self._at_step(point, r, event)
        rank, plan = point.state.ranks[r], self.plans.find(event["plan"])
        node = self.model.case.nodes[r]
        generation = generation_of(rank.decided)
        if plan == NO_PLAN or self.model.case.plans[plan].generation != event["generation"]:
            raise Wrong("the plan has another generation")
        if event["generation"] != generation or position_of(rank.decided) or rank.plan >= 0:
            raise Wrong("(I4) the rank is not between plans, or its `decided` is of another generation")
        if rank.error >= generation:
            raise Wrong("(I5) the rank has set its error word for this generation")
        if not self.model.fits(rank, plan):
            raise Wrong("(I4) the plan starts from other maps than the rank has")
        if point.state.boards[node].plan != plan:
            raise NotNow("the board does not hold this plan")
        if not self.model.covered(generation, [words[-1] for words in point.state.words]):
            raise NotNow("(I4) a rank has not completed the plan before")
        point = point._replace(writing=replaced(point.writing, node, WRITTEN))
        return point.with_rank(r, rank._replace(plan=plan))

    def _refuse(self, point: Point, r: int, event: Event) -> Point:
        self._at_step(point, r, event)
        rank = point.state.ranks[r]
        if event["generation"] != generation_of(rank.decided) or position_of(rank.decided) or rank.plan >= 0:
            raise Wrong("the rank is not between plans, or its `decided` is of another generation")
        board = point.state.boards[self.model.case.nodes[r]]
        held = board.plan >= 0 and self.model.case.plans[board.plan].generation == event["generation"]
        if not held and event["generation"] not in point.damaged:
            raise NotNow("the board holds no plan of this generation")
        return point.with_rank(r, rank._replace(error=max(rank.error, event["generation"])))

    def _forward(self, point: Point, r: int, event: Event) -> Point:
        point = self._past_decision(point, r, event)
        versions = list(point.versions)
        if len(event["maps"]) != len(versions):
            raise Wrong(f"{len(event['maps'])} maps for {len(versions)} layers")
        for layer, label in enumerate(event["maps"]):
            versions[layer] = _labelled(versions[layer], point.epochs[r][layer], label)
        behind = min(rank.ahead + (q == r) for q, rank in enumerate(point.state.ranks))
        state = self.model.run_forward(point.state, r)
        return point._replace(state=state, base=point.base + behind, versions=tuple(versions))

    def _past_decision(self, point: Point, r: int, event: Event) -> Point:
        """The state from which the forward starts: the decision may be missing where none can be made."""
        if point.state.ranks[r].phase == PUBLISHED and point.base + point.state.ranks[r].ahead < self.model.lag:
            point = self._decided(point, r)
        self._at_step(point, r, event, DECIDED)
        return point

    @staticmethod
    def _at_step(point: Point, r: int, event: Event, phase: int | None = None) -> None:
        rank = point.state.ranks[r]
        if phase not in (None, rank.phase) or event["step"] != point.base + rank.ahead:
            raise Wrong(f"not in this order: publish, decide, forward of step {point.base + rank.ahead}")

    # -- a rank's device, and its error word --------------------------------------------------------------------------

    def _staged(self, point: Point, r: int, event: Event) -> Point:
        target, rank = packed(event["counter"]), point.state.ranks[r]
        if target <= rank.staged:
            return point  # said before, or the pull of a plan that was dropped since
        return self._stage_up_to(point, r, target, only_without_pulls=False)

    def _stage_up_to(self, point: Point, r: int, target: int, only_without_pulls: bool) -> Point:
        words = [each[-1] for each in point.state.words]
        while point.state.ranks[r].staged < target:
            rank = point.state.ranks[r]
            position = position_of(rank.staged) + 1
            if rank.plan < 0 or generation_of(target) != generation_of(rank.staged):
                raise Wrong("the rank holds no plan with this entry")
            if not self.model.next_in_order(rank, position):
                raise Wrong("the plan has no such entry")
            if not self.model.layer_is_free(rank, position, words):
                raise NotNow("(I12) the entry before it in this layer is not committed on all ranks")
            entry = (rank.plan, position)
            moves = self.model.moves[(*entry, r)]
            if not moves:
                point = point.with_rank(r, rank._replace(staged=rank.staged + 1))
                continue
            if only_without_pulls:
                raise Wrong("the word counts an entry as staged whose pull has not completed")
            if len(rank.rows) >= self.model.case.rows:
                raise NotNow("(d) no staging rows are free")
            layer, new = self.model.case.plans[rank.plan].entries[position - 1]
            if any(self.model.held(point.state, layer, source) != new[slot] for source, slot in moves):
                raise NotNow("(b) a source slot does not hold this expert")
            point = point.with_rank(r, rank._replace(pull=entry))
            point = point._replace(state=self.model.finish_pull(point.state, r))
        return point

    def _committed(self, point: Point, r: int, event: Event) -> Point:
        target = packed(event["counter"])
        while target > point.state.ranks[r].committed and point.state.ranks[r].commits:
            point = point._replace(state=self.model.run_commit(point.state, r))
        rank = point.state.ranks[r]
        return point.with_rank(r, _drained(rank, target)) if target > rank.committed else point

    def _error(self, point: Point, r: int, event: Event) -> Point:
        rank, generation = point.state.ranks[r], event["generation"]
        aborted = point.state.boards[self.model.case.nodes[r]].abort >= generation
        if str(event.get("why", "")).startswith("abort") and not aborted:
            raise NotNow("(I11) no daemon has aborted this generation")
        own = generation == generation_of(rank.decided) and generation in point.published
        if not own and not aborted and generation != rank.error:
            raise NotNow("nothing of this generation can have failed: no board has held it, or the rank is not there")
        return point.with_rank(r, rank._replace(error=max(rank.error, generation)))

    # -- daemons ------------------------------------------------------------------------------------------------------

    def _daemon(self, point: Point, node: int, event: Event) -> Point:
        board, kind = point.state.boards[node], event["event"]
        writing = point.writing[node]
        if kind not in ("board", "abort", "crash", "restart", "damage"):
            raise Wrong(f"a daemon has no event {kind!r}")
        if kind == "damage":
            marked = {event["generation"]}
            return point._replace(published=point.published | marked, damaged=point.damaged | marked)
        if kind in ("board", "abort") and not board.alive:
            raise Wrong("the daemon is dead")
        if kind == "board":
            plan, generation = self.plans.find(event["plan"]), event["generation"]
            self._may_publish(point, node, generation)
            board = board._replace(plan=plan)
            point, writing = point._replace(published=point.published | {generation}), ANNOUNCED
        elif kind == "abort":
            if event["generation"] not in point.published:
                raise NotNow("no board has held a plan of this generation")
            board = board._replace(abort=max(board.abort, event["generation"]))
            writing = WRITTEN if writing == ANNOUNCED else writing
        else:
            board = board._replace(alive=kind == "restart")
            writing = TORN if writing == ANNOUNCED and kind == "crash" else writing
        boards = replaced(point.state.boards, node, board)
        return point._replace(state=point.state._replace(boards=boards), writing=replaced(point.writing, node, writing))

    def _may_publish(self, point: Point, node: int, generation: int) -> None:
        board = point.state.boards[node]
        covered = min(point.state.words[r][-1].committed for r in self.model.members[node])
        if generation_of(covered) != generation:
            raise NotNow(f"(I11) the ranks' counters ask for generation {generation_of(covered)}")
        held = self.model.case.plans[board.plan].generation if board.plan >= 0 and point.writing[node] != TORN else 0
        if held >= generation:
            raise NotNow("(I13) the board holds a plan that is not completed")
        if board.abort >= generation:
            raise Wrong("(I11) this generation was aborted")


def _drained(rank: Rank, committed: int) -> Rank:
    """`committed` at the end of a plan; it may be late after a drop, since pulls may still be in flight."""
    if committed != rank.decided or rank.commits or position_of(committed):
        raise Wrong("`committed` is beyond what has completed")
    return rank._replace(committed=committed)


def _labelled(versions: Versions, epoch: int, label: Any) -> Versions:
    """Check what a forward calls the map of a layer: one name for one version, and no name for two contents."""
    content = versions.maps[epoch]
    if isinstance(label, Sequence) and not isinstance(label, str):
        if tuple(label) != content:
            raise Wrong(f"the forward uses {list(label)} where the commits make {list(content)}")
        return versions
    known = versions.labels[epoch]
    if known not in (None, label):
        raise Wrong(f"the forward uses {label!r} where others use {known!r}")
    if any(label == old and content != row for old, row in zip(versions.labels, versions.maps, strict=True)):
        raise Wrong(f"{label!r} names two different maps")
    return Versions(versions.maps, replaced(versions.labels, epoch, label))

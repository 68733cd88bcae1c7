"""The rules of the commit agreement (design, section 5): what a rank does at a step, and what its device does.

A state holds every rank's host counters, its device queues and slots, the words ring, and one board per node. Host steps,
device completions and daemons interleave freely; nothing is assumed about speed. A rank's step:

    IDLE --publish_word--> PUBLISHED --decide_step--> DECIDED --look--> LOOKED --run_forward--> IDLE, next step

`act` is the last three in one piece, which is how small cases are explored; `fine` takes them one by one, so that pulls
and commits complete between them too, and lets the waiting rules (I4, I12) read the newest words instead of those of
step - lag. Both are allowed by the design: only decisions need the words of one step. `broken` names one rule to leave
out.

Properties, raised as Violation: (a) all ranks use the same maps in the same forward; (b) no slot is overwritten while
another rank reads it; (c) live slots hold what the map says, and every expert has one; (d) no memory is reused while a
device copy or a reader needs it; (e), in exploration.py, no deadlock, and the ranks alone can always end a plan; (f) all
ranks have the same counters at the same step.
"""

from tests.model.states import (
    DECIDED,
    FIRST_COUNTER,
    IDLE,
    LOOKED,
    LOST,
    NO_PLAN,
    PUBLISHED,
    Board,
    Entry,
    Map,
    Plan,
    Rank,
    Scenario,
    State,
    Word,
    counter,
    generation_of,
    position_of,
    replaced,
)

__all__ = ["Model", "Violation"]


class Violation(Exception):
    """A property does not hold."""


class Model:
    """The protocol on one scenario; `broken` names one rule to leave out, `fine` takes a rank's step in three pieces."""

    def __init__(self, scenario: Scenario, broken: str = "", fine: bool = False) -> None:
        self.case, self.broken, self.fine = scenario, broken, fine
        self.num_ranks, self.lag = len(scenario.nodes), scenario.lag
        self.slots_per_rank = len(scenario.start[0]) // self.num_ranks
        self.kept = self.lag + scenario.every - 1
        self.history = 2 * self.kept + (1 if broken == "short_history" else 2)
        self.experts = [set(row) - {-1} for row in scenario.start]
        numbers = range(max(scenario.nodes) + 1)
        self.members = [[r for r in range(self.num_ranks) if scenario.nodes[r] == n] for n in numbers]
        self.moves = {
            (p, k, r): self.moves_of(plan, k, r)
            for p, plan in enumerate(scenario.plans)
            for k in range(1, len(plan.entries) + 1)
            for r in range(self.num_ranks)
        }

    def moves_of(self, plan: Plan, position: int, rank: int) -> tuple[tuple[int, int], ...]:
        """(source slot, destination slot) of one entry that `rank` pulls, from the map before that entry."""
        layer, new = plan.entries[position - 1]
        old = dict(plan.base + plan.entries[: position - 1])[layer]
        mine = range(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)
        return tuple((old.index(new[p]), p) for p in mine if new[p] != old[p] and new[p] != -1)

    def initial(self) -> State:
        """All ranks at step 0, no plan anywhere; the words before step 0 are those of a rank that has done nothing."""
        size, first = self.slots_per_rank, FIRST_COUNTER
        slots = [tuple(row[r * size : (r + 1) * size] for row in self.case.start) for r in range(self.num_ranks)]
        ranks = tuple(
            Rank(0, IDLE, first, first, first, 0, NO_PLAN, None, (), (), own, self.case.start) for own in slots
        )
        words = ((Word(first, first, 0, NO_PLAN),) * self.kept,) * self.num_ranks
        budgets = self.case.crashes, self.case.failures, self.case.deadlines
        boards = (Board(),) * len(self.members)
        return State(ranks, words, (), boards, *budgets, losses=self.case.losses, hangs=self.case.hangs)

    def fault(self, text: str) -> None:
        """A property does not hold here."""
        raise Violation(text)

    def after(self, plan: int, position: int) -> int:
        """Counter value once this entry is done."""
        generation = self.case.plans[plan].generation
        last = position == len(self.case.plans[plan].entries)
        return counter(generation + 1, 0) if last else counter(generation, position)

    def planned(self, rank: Rank) -> tuple[Map, ...]:
        """Maps once the queued commits have run: what the next forward uses."""
        maps = dict(enumerate(rank.maps))
        maps.update(self.case.plans[plan].entries[position - 1] for plan, position in rank.commits)
        return tuple(maps.values())

    def settle(self, rank: Rank) -> Rank:
        """Move `committed` as far as the device allows."""
        stale = rank.pull and self.case.plans[rank.pull[0]].generation < generation_of(rank.decided)
        wait = (rank.commits or (stale and self.broken != "no_drain")) and self.broken != "counters_at_issue"
        return rank if wait else rank._replace(committed=rank.decided)

    # -- a rank's step ------------------------------------------------------------------------------------------------

    def publish_word(self, state: State, index: int) -> State:
        """The word of this step, before any is read."""
        rank = state.ranks[index]
        words = (*state.words[index], Word(rank.staged, rank.committed, rank.error, rank.plan))
        if len(words) > self.history:
            self.fault("(d) the words ring overwrites a step that a rank may still read")
        ranks = replaced(state.ranks, index, rank._replace(phase=PUBLISHED))
        return state._replace(words=replaced(state.words, index, words), ranks=ranks)

    def words_there(self, state: State, index: int) -> bool:
        """All words that the rank decides on at its step are published."""
        return all(len(words) > self.read(state, index) for words in state.words)

    def read(self, state: State, index: int) -> int:
        """The place, in `state.words`, of the words that a rank decides on: of step - lag or, of the steps before it, the
        last one whose words are reduced (I7). All ranks read the same words at the same step.
        """
        every, ahead = self.case.every, state.ranks[index].ahead
        place = ahead + every - 1 - (state.residue + ahead - self.lag) % every
        if self.broken == "vector_when_it_comes":
            newest = min(map(len, state.words)) - 1
            place = max(place, newest - (newest - self.kept + state.residue) % every)
        return place

    def read_by(self, state: State, index: int) -> list[Word]:
        """The words themselves."""
        place = self.read(state, index)
        mine = self.case.nodes[index] if self.broken == "local_words" else None
        return [words[-1 if self.case.nodes[r] == mine else place] for r, words in enumerate(state.words)]

    def decide_step(self, state: State, index: int) -> State:
        """Act on the words of step - lag, or the last reduced ones before it."""
        rank = state.ranks[index]
        newest = self.broken == "newest_words"
        read = [words[-1] for words in state.words] if newest else self.read_by(state, index)
        rank = self.decide(rank, read, state.boards[self.case.nodes[index]].order)
        rank = rank._replace(staged=max(rank.staged, rank.decided), phase=DECIDED)
        return state._replace(ranks=replaced(state.ranks, index, rank))

    def decide(self, rank: Rank, words: list[Word], order: int) -> Rank:
        """I2 and I5: a function of the words of one step only. An error wins; else at most one entry per step."""
        generation = generation_of(rank.decided)
        error = rank.error if self.broken == "drop_at_once" else max(word.error for word in words)
        if error >= generation:
            return self.dropped(rank, error)
        ready = order if self.broken == "daemon_decides" else min(word.staged for word in words)
        if ready <= rank.decided or rank.plan < 0:
            return rank
        digests = {word.digest for word in words if generation_of(word.staged) == generation}
        if len(digests) > 1 and self.broken != "no_digest":
            return self.dropped(rank, generation)
        entry = (rank.plan, position_of(rank.decided) + 1)
        done = self.after(*entry)
        plan = rank.plan if position_of(done) else NO_PLAN
        return self.settle(rank._replace(commits=(*rank.commits, entry), decided=done, plan=plan))

    def dropped(self, rank: Rank, generation: int) -> Rank:
        """All plans up to `generation` end here; issued entries still run, pulls in flight become orphans."""
        rows = tuple(row for row in rank.rows if row[0] in rank.commits)
        return self.settle(rank._replace(decided=counter(generation + 1, 0), plan=NO_PLAN, rows=rows))

    def look(self, state: State, index: int) -> State:
        """Look at the board, and issue what may be issued."""
        rank = state.ranks[index]
        newest = self.fine or self.broken == "newest_words"
        words = [each[-1] for each in state.words] if newest else self.read_by(state, index)
        rank = self.adopt(rank, words, state.boards[self.case.nodes[index]])
        rank = self.start_pulls(index, rank, words)._replace(phase=LOOKED)
        return state._replace(ranks=replaced(state.ranks, index, rank))

    def adopt(self, rank: Rank, words: list[Word], board: Board) -> Rank:
        """I4 and I11: look at the board; the number of the next plan is the ranks' own counter."""
        generation = generation_of(rank.decided)
        if board.abort >= generation:
            rank = rank._replace(error=max(rank.error, board.abort))
        if rank.plan >= 0 or board.plan < 0 or rank.error >= generation or position_of(rank.decided):
            return rank
        if self.case.plans[board.plan].generation != generation or not self.covered(generation, words):
            return rank
        if not self.fits(rank, board.plan):
            return rank._replace(error=generation)
        return rank._replace(plan=board.plan)

    def covered(self, generation: int, words: list[Word]) -> bool:
        """I4: every rank has done with the plans before this generation, on its device too."""
        return min(word.committed for word in words) >= counter(generation, 0) or self.broken == "next_plan_early"

    def fits(self, rank: Rank, plan: int) -> bool:
        """The plan starts from the maps that this rank has."""
        maps = self.planned(rank)
        return self.broken == "no_base" or all(maps[layer] == base for layer, base in self.case.plans[plan].base)

    def start_pulls(self, index: int, rank: Rank, words: list[Word]) -> Rank:
        """Issue the next entry's copies; an entry without incoming experts is staged at once."""
        while rank.plan >= 0 and rank.error < generation_of(rank.decided):
            position = position_of(rank.staged) + 1
            if not self.next_in_order(rank, position) or not self.layer_is_free(rank, position, words):
                break
            if self.moves[rank.plan, position, index]:
                waiting = [row for row in rank.rows if row[0] not in rank.commits]  # not even issued
                used = waiting if self.broken == "rows_at_issue" else rank.rows
                if rank.pull or len(used) >= self.case.rows:
                    break
                if len(rank.rows) >= self.case.rows:
                    self.fault("(d) staging rows are written while a queued commit still reads them")
                rank = rank._replace(pull=(rank.plan, position))
                if self.broken != "counters_at_issue":
                    break
            rank = rank._replace(staged=counter(self.case.plans[rank.plan].generation, position))
        return rank

    def next_in_order(self, rank: Rank, position: int) -> bool:
        """`position` exists in the rank's plan, and the entries before it are staged."""
        plan = self.case.plans[rank.plan]
        return generation_of(rank.staged) == plan.generation and position <= len(plan.entries)

    def layer_is_free(self, rank: Rank, position: int, words: list[Word]) -> bool:
        """I12: the entry before it in the same layer, if any, is committed on all ranks."""
        plan = self.case.plans[rank.plan]
        layer = plan.entries[position - 1][0]
        before = [k for k in range(1, position) if plan.entries[k - 1][0] == layer]
        committed = rank.committed if self.broken == "same_layer_early" else min(word.committed for word in words)
        return not before or committed >= counter(plan.generation, before[-1])

    def run_forward(self, state: State, index: int) -> State:
        """The forward of this step, with the maps that are live once the queued commits have run."""
        rank, step, forwards = state.ranks[index], state.ranks[index].ahead, state.forwards
        forward = (rank.decided, self.planned(rank))
        if step >= len(forwards):
            forwards = (*forwards, forward)
        elif forwards[step][1] != forward[1]:
            self.fault("(a) two ranks run the same forward with different maps")
        elif forwards[step] != forward:
            self.fault("(f) ranks disagree on the counters of one step")
        ranks = replaced(state.ranks, index, rank._replace(ahead=step + 1, phase=IDLE))
        # also one that is lost: nobody gets far beyond its last word
        slowest = min(other.ahead for other in ranks)
        if slowest:
            ranks = tuple(other._replace(ahead=other.ahead - slowest) for other in ranks)
        words = tuple(each[slowest:] for each in state.words)
        residue = (state.residue + slowest) % self.case.every
        return state._replace(ranks=ranks, forwards=forwards[slowest:], words=words, residue=residue)

    def act(self, state: State, index: int) -> State:
        """Decide, look and forward in one piece."""
        return self.run_forward(self.look(self.decide_step(state, index), index), index)

    # -- ends of an incarnation, and transfers that do not end ---------------------------------------------------------

    def lose_peer(self, state: State, index: int) -> State:
        """I3: a word did not come in time, or the rank itself dies. It runs no forward any more, with either map."""
        rank = state.ranks[index]
        ranks = replaced(state.ranks, index, rank._replace(phase=LOST))
        lost = state._replace(ranks=ranks, losses=state.losses - (not self.somebody_lost(state)))
        if self.broken == "forward_after_loss":
            ran = self.run_forward(state, index)
            return ran._replace(ranks=replaced(ran.ranks, index, ran.ranks[index]._replace(phase=LOST)), losses=0)
        return lost

    @staticmethod
    def somebody_lost(state: State) -> bool:
        """The incarnation has begun to end."""
        return any(rank.phase == LOST for rank in state.ranks)

    def may_give_up(self, rank: Rank) -> bool:
        """The pull in flight is of a dropped plan, and no commit of it runs any more."""
        stale = rank.pull and self.case.plans[rank.pull[0]].generation < generation_of(rank.decided)
        early = rank.pull is not None and self.broken == "give_up_early"
        return bool((stale or early) and rank.hung and not rank.commits)

    def give_up(self, state: State, index: int) -> State:
        """The hung pull gets other rows than any later one: so it holds nothing back (rows given up are not rows of ours)."""
        rank = state.ranks[index]
        assert rank.pull is not None
        adrift = (*rank.adrift, rank.pull)
        if self.broken == "give_up_early" and rank.plan == rank.pull[0]:
            staged = counter(self.case.plans[rank.plan].generation, rank.pull[1])
            rank = rank._replace(staged=staged, rows=(*rank.rows, (rank.pull, (-1,))))
        rank = self.settle(rank._replace(pull=None, hung=False, adrift=adrift))
        return state._replace(ranks=replaced(state.ranks, index, rank))

    def end_adrift(self, state: State, index: int) -> State:
        """A pull that was given up ends after all: what it copied goes to rows that nobody has."""
        rank = state.ranks[index]
        plan, position = rank.adrift[0]
        layer = self.case.plans[plan].entries[position - 1][0]
        rank = rank._replace(adrift=rank.adrift[1:])
        if self.broken == "rows_kept" and rank.rows:
            content = tuple(self.held(state, layer, p) for p, _ in self.moves[plan, position, index])
            rank = rank._replace(rows=(*rank.rows[:-1], (rank.rows[-1][0], content)))
        return state._replace(ranks=replaced(state.ranks, index, rank))

    # -- a rank's device ----------------------------------------------------------------------------------------------

    def finish_pull(self, state: State, index: int) -> State:
        """The copies of the entry being pulled end; they hold what the sources hold now."""
        rank = state.ranks[index]
        if rank.pull is None:
            raise AssertionError("no pull is in flight")
        plan, position = rank.pull
        layer = self.case.plans[plan].entries[position - 1][0]
        content = tuple(self.held(state, layer, p) for p, _ in self.moves[plan, position, index])
        late = self.broken == "counters_at_issue" and rank.decided <= self.after(plan, position)
        if rank.plan == plan or late:
            staged = max(rank.staged, counter(self.case.plans[plan].generation, position))
            rank = rank._replace(rows=(*rank.rows, ((plan, position), content)), staged=staged)
        return state._replace(ranks=replaced(state.ranks, index, self.settle(rank._replace(pull=None))))

    def held(self, state: State, layer: int, slot: int) -> int:
        """The expert whose weights a slot really holds."""
        return state.ranks[slot // self.slots_per_rank].slots[layer][slot % self.slots_per_rank]

    def run_commit(self, state: State, index: int) -> State:
        """The oldest queued commit runs on the device."""
        rank = state.ranks[index]
        plan, position = entry = rank.commits[0]
        layer, new = self.case.plans[plan].entries[position - 1]
        if state.boards[self.case.nodes[index]].plan != plan:
            self.fault("(d) a queued commit reads board rows that were reused")
        if set(new) - {-1} != self.experts[layer]:
            self.fault("(c) a logical expert has no live slot")
        self._check_readers(state, index, entry)
        slots = list(rank.slots[layer])
        for (_, p), expert in zip(self.moves[plan, position, index], dict(rank.rows).get(entry, ()), strict=False):
            slots[p % self.slots_per_rank] = expert
        wanted = new[index * self.slots_per_rank : (index + 1) * self.slots_per_rank]
        if any(want not in (-1, have) for want, have in zip(wanted, slots, strict=True)):
            self.fault("(c) a live slot holds the wrong expert's weights")
        rank = rank._replace(
            commits=rank.commits[1:],
            rows=tuple(row for row in rank.rows if row[0] != entry),
            slots=replaced(rank.slots, layer, tuple(slots)),
            maps=replaced(rank.maps, layer, new),
            committed=max(rank.committed, counter(self.case.plans[plan].generation, position)),
        )
        return state._replace(ranks=replaced(state.ranks, index, self.settle(rank)))

    def _check_readers(self, state: State, index: int, entry: Entry) -> None:
        """(b): no rank pulls from a slot that this commit overwrites."""
        layer = self.case.plans[entry[0]].entries[entry[1] - 1][0]
        written = {p for _, p in self.moves[(*entry, index)]}
        for q, other in enumerate(state.ranks):
            if other.pull is None or self.case.plans[other.pull[0]].entries[other.pull[1] - 1][0] != layer:
                continue
            if written & {p for p, _ in self.moves[(*other.pull, q)]}:
                self.fault(f"(b) rank {index} overwrites a slot that rank {q} still reads")

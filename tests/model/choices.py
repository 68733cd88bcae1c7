"""All that may happen next in a state of the model: by ranks, by their devices, by daemons, and to any of them."""

from collections.abc import Callable, Iterator
from functools import partial

from tests.model.rules import Model
from tests.model.states import (
    DECIDED,
    IDLE,
    LOOKED,
    LOST,
    NO_PLAN,
    PUBLISHED,
    UNLIMITED,
    Rank,
    State,
    counter,
    generation_of,
    position_of,
    replaced,
)

__all__ = ["Action", "daemon_actions", "quiet", "rank_actions"]

Action = tuple[str, Callable[[], State]]
"""A label, and the function that makes the next state."""


def rank_actions(model: Model, state: State) -> Iterator[Action]:
    """What ranks and their devices may do next, as (label, function to the next state)."""
    for r, rank in enumerate(state.ranks):
        yield from _host_actions(model, state, r, rank)
        if rank.pull and not rank.hung:
            label = f"rank {r}: pull of entry {rank.pull[1]} of plan {rank.pull[0]} completes"
            yield label, partial(model.finish_pull, state, r)
        if rank.commits:
            yield f"rank {r}: commit {rank.commits[0]} runs on the device", partial(model.run_commit, state, r)
        if rank.phase != LOST:
            yield from _failures(model, state, r, rank)
        yield from _ends(model, state, r, rank)


def _host_actions(model: Model, state: State, r: int, rank: Rank) -> Iterator[Action]:
    if rank.phase == IDLE:
        yield f"rank {r} publishes its word", lambda: model.publish_word(state, r)
    elif rank.phase == PUBLISHED and model.words_there(state, r):
        if model.fine:
            yield f"rank {r} decides", lambda: model.decide_step(state, r)
        else:
            yield f"rank {r} steps", lambda: model.act(state, r)
    elif rank.phase == DECIDED:
        yield f"rank {r} looks", lambda: model.look(state, r)
    elif rank.phase == LOOKED:
        yield f"rank {r} steps", lambda: model.run_forward(state, r)


def _failures(model: Model, state: State, r: int, rank: Rank) -> Iterator[Action]:
    generation, limited = generation_of(rank.decided), state.deadlines != UNLIMITED
    spent = limited and any(other.error >= generation for other in state.ranks)
    can_give_up = rank.plan >= 0 and rank.error < generation and model.broken != "no_rank_deadline"
    failed = rank._replace(error=generation)
    if can_give_up and state.deadlines and not spent:
        late = state._replace(ranks=replaced(state.ranks, r, failed), deadlines=state.deadlines - limited)
        yield f"rank {r} gives the plan up (deadline)", lambda: late
    if rank.pull and state.failures and rank.pull[0] == rank.plan and not rank.hung:
        ranks = replaced(state.ranks, r, failed._replace(pull=None))
        yield f"rank {r}: pull fails", lambda: state._replace(ranks=ranks, failures=state.failures - 1)


def _ends(model: Model, state: State, r: int, rank: Rank) -> Iterator[Action]:
    """Lost peers, and pulls that hang."""
    if rank.phase != LOST:
        waits = rank.phase == PUBLISHED and not model.words_there(state, r)
        # at first at any moment, as a kill comes; whoever is left finds out when a word does not come
        whenever = state.losses and (rank.phase == PUBLISHED or model.broken != "forward_after_loss")
        if whenever or (model.somebody_lost(state) and waits):
            yield f"rank {r} loses a peer", lambda: model.lose_peer(state, r)
    if rank.pull and state.hangs and not rank.hung:
        hung = replaced(state.ranks, r, rank._replace(hung=True))
        yield (
            f"rank {r}: the pull of entry {rank.pull[1]} hangs",
            lambda: state._replace(ranks=hung, hangs=state.hangs - 1),
        )
    if rank.phase != LOST and model.may_give_up(rank) and model.broken != "no_giving_up":
        yield f"rank {r} gives its pull up", lambda: model.give_up(state, r)
    if rank.adrift:
        yield f"rank {r}: a pull that was given up ends", lambda: model.end_adrift(state, r)


def daemon_actions(model: Model, state: State) -> Iterator[Action]:
    """What daemons may do next, and what may happen to them."""
    for n, board in enumerate(state.boards):
        newest = [state.words[r][-1] for r in model.members[n]]
        early = model.broken == "board_reused_early"
        covered = min(word.staged if early else word.committed for word in newest)
        generation = generation_of(covered)
        mine = model.case.plans[board.plan].generation if board.plan >= 0 else 0

        def put(crashed: int = 0, n: int = n, **fields: int | bool) -> Callable[[], State]:
            boards = replaced(state.boards, n, state.boards[n]._replace(**fields))  # type: ignore[arg-type]
            return lambda: state._replace(boards=boards, crashes=state.crashes - crashed)

        if not board.alive:
            yield f"daemon {n} restarts", put(alive=True, abort=mine if mine >= generation else board.abort)
            continue
        if state.crashes:
            yield f"daemon {n} crashes", put(crashed=1, alive=False)
        if model.case.aborts and board.abort < generation and _held(model, state, generation):
            yield f"daemon {n} aborts generation {generation}", put(abort=generation)
        ordered = min(word.staged for word in newest)
        if model.broken == "daemon_decides" and ordered > board.order:
            yield f"daemon {n} orders a commit", put(order=ordered)
        if mine >= generation or board.abort >= generation:
            continue
        if early and mine and position_of(covered) == len(model.case.plans[board.plan].entries):
            generation += 1
        for p in _options(model, state, generation):
            yield f"daemon {n} publishes plan {p} (generation {generation})", put(plan=p)
            if state.crashes:
                torn = put(crashed=1, alive=False, plan=NO_PLAN)
                yield f"daemon {n} crashes while it writes plan {p}", torn


def _held(model: Model, state: State, generation: int) -> list[int]:
    """Plans of a generation that stand on some board."""
    held = {board.plan for board in state.boards if board.plan >= 0}
    return [p for p in sorted(held) if model.case.plans[p].generation == generation]


def _options(model: Model, state: State, generation: int) -> list[int]:
    """Plans that a daemon may publish: the one that another node has, unless the case is a fork."""
    options = [p for p, plan in enumerate(model.case.plans) if plan.generation == generation]
    return options if model.case.forked else _held(model, state, generation) or options


def quiet(model: Model, state: State) -> bool:
    """No plan is active anywhere, and all ranks agree on that; or no rank goes on in this incarnation."""
    if all(rank.phase == LOST for rank in state.ranks):
        return True
    now = state.ranks[0].decided
    on_boards = [model.case.plans[board.plan].generation for board in state.boards if board.plan >= 0]
    if position_of(now) or any(counter(generation, 0) >= now for generation in on_boards):
        return False
    return all(
        rank.decided == rank.committed == rank.staged == now and not (rank.pull or rank.commits or rank.rows)
        for rank in state.ranks
    )

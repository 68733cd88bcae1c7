"""What the model of the commit agreement is made of: counters, plans, scenarios, words, ranks, boards, states.

Counters are (generation, position), packed by `counter`; the first is (1, 0), and after the last entry of plan g comes
(g + 1, 0). Step numbers are kept relative to the slowest rank (shift symmetry), so the state graph is finite although
ranks step for ever.
"""

from typing import NamedTuple, TypeVar

__all__ = [
    "DECIDED",
    "FIRST_COUNTER",
    "IDLE",
    "LOOKED",
    "LOST",
    "NO_PLAN",
    "PUBLISHED",
    "UNLIMITED",
    "Board",
    "Entry",
    "Map",
    "Plan",
    "Rank",
    "Row",
    "Scenario",
    "State",
    "Word",
    "counter",
    "generation_of",
    "position_of",
    "replaced",
]

GENERATION = 1 << 16
"""One generation in a packed counter: more entries than any plan has."""

NO_PLAN = -1
UNLIMITED = 99
IDLE, PUBLISHED, DECIDED, LOOKED, LOST = range(5)

Map = tuple[int, ...]
Entry = tuple[int, int]
"""(plan, position from 1)."""
Row = tuple[Entry, Map]
T = TypeVar("T")


def counter(generation: int, position: int) -> int:
    """(generation, position) as one number that compares in the same order."""
    return GENERATION * generation + position


def generation_of(packed: int) -> int:
    """The generation of a counter."""
    return packed // GENERATION


def position_of(packed: int) -> int:
    """The position of a counter."""
    return packed % GENERATION


def replaced(items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    """A copy of `items` with another item at `index`."""
    return (*items[:index], item, *items[index + 1 :])


FIRST_COUNTER = counter(1, 0)


class Plan(NamedTuple):
    """One content of a generation. `base` and each entry are (layer, map): a map lists the expert in every slot (-1: empty).

    `base` is what the plan was computed for; entries commit in their order.
    """

    generation: int
    base: tuple[tuple[int, Map], ...]
    entries: tuple[tuple[int, Map], ...]


class Scenario(NamedTuple):
    """A small case.

    Fields: node of each rank, first maps, plans (several of one generation are alternatives for the daemon), lag, staging row
    sets per rank; budgets of daemon crashes (one may tear the board), failing pulls and given-up plans (UNLIMITED: any
    number); whether daemons abort; whether daemons of two nodes may publish different plans of one generation; steps from
    one reduction of the words to the next (k of design I7; 1 with shared memory); losses: ranks that die, or give their peers
    up although these live (PeerLost on one rank only); hangs: pulls that do not end unless their rank gives them up, after their
    plan was dropped.
    """

    name: str
    nodes: tuple[int, ...]
    start: tuple[Map, ...]
    plans: tuple[Plan, ...]
    lag: int = 1
    rows: int = 1
    crashes: int = 0
    failures: int = 0
    deadlines: int = UNLIMITED
    aborts: bool = True
    forked: bool = False
    every: int = 1
    losses: int = 0
    hangs: int = 0


class Word(NamedTuple):
    """What a rank publishes for one step: counters, highest generation to drop, digest of its plan (here: its index)."""

    staged: int
    committed: int
    error: int
    digest: int


class Rank(NamedTuple):
    """One rank.

    ahead: its step relative to the slowest rank; phase: see the module's docstring; decided: entries applied or dropped by
    the host; staged, committed: device-complete; pull: the entry being copied; rows: (entry, experts) in staging; commits:
    issued but not executed; slots: per layer the experts really held on the device; maps: per layer what the device uses now;
    hung: the pull does not end; adrift: entries whose pulls were given up and may still run.
    """

    ahead: int
    phase: int
    decided: int
    staged: int
    committed: int
    error: int
    plan: int
    pull: Entry | None
    rows: tuple[Row, ...]
    commits: tuple[Entry, ...]
    slots: tuple[Map, ...]
    maps: tuple[Map, ...]
    hung: bool = False
    adrift: tuple[Entry, ...] = ()


class Board(NamedTuple):
    """Board and daemon of one node; abort only grows; order is used by the variant in which daemons decide."""

    plan: int = NO_PLAN
    abort: int = 0
    alive: bool = True
    order: int = 0


class State(NamedTuple):
    """words: per rank, from step (slowest - lag - every + 1) on; forwards: (decided, maps) of each forward from the slowest's
    step on; residue: the slowest's step modulo `every`.
    """

    ranks: tuple[Rank, ...]
    words: tuple[tuple[Word, ...], ...]
    forwards: tuple[tuple[int, tuple[Map, ...]], ...]
    boards: tuple[Board, ...]
    crashes: int
    failures: int
    deadlines: int
    residue: int = 0
    losses: int = 0
    hangs: int = 0

"""The `frontier` policy, this project's own: from the live placement, the best balance for each number of moved experts.

For each layer a local search (`_frontier`) takes one step after the other, swaps and changes of what a redundant slot holds,
each the one that relieves the busiest rank most per slot filled anew, and notes the PAR after it. These notes are the
layer's frontier: moves against PAR. A plan takes the point of each layer where

    PAR + price * (share of the layer's slots filled anew)

is least, and within a budget for the whole plan the points where a move brings most. Where repairing the live placement leaves
more than a plan from scratch could cost, the greedy plan of `default`, its ranks matched to the live ones, is tried as a second
start and improved by the same search.

What keeps it from fitting noise:

- several windows are scored one by one, by the mean over windows of each window's own PAR, not by their sum;
- of steps that relieve a rank equally, those that split hot experts are preferred, whose load varies most;
- with several windows, two more in which all experts are equally hot take part, four where the windows differ much: what these agree
  on outweighs them, what only some show does not (chosen by replay on recorded loads; docs/log.md);
- with one window, a layer whose PAR could be sampling noise of so few tokens is left alone;
- no step is taken that does not pay its price.
"""

import math
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from eplb_async.core.score import rank_load
from eplb_async.core.spec import Topology
from eplb_async.policies.base import Policy
from eplb_async.policies.default import DefaultOptions, default, planning_nodes
from eplb_async.policies.frontier_curve import Frontier, Journals
from eplb_async.policies.windows import expected_peak, merged

__all__ = ["POLICY", "FrontierOptions", "find_frontier", "frontier", "warm_up", "within"]

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

PATIENCE = 6
"""Steps in a row without a better point that end a layer's search; 12 take twice as long for the same PAR on the next windows."""
MOST_STEPS = 600
"""Longest journal of a layer; twice the slots of the largest models served today."""
SPREAD = 3.0
"""How much splitting hot experts is favoured with one window; less, by the root of their number, where windows show what varies."""
SMALL_SLOTS, SOLVE_NODES = 24, 20_000
"""Layers of so few slots are planned exactly, within so many nodes of the search tree (2 ms at most)."""
DISAGREE = 0.08
"""Part of the tokens by which windows differ above which what they agree on is not trusted as much: the imagined windows count twice.
In recorded traffic of one kind it is 0.04 to 0.07, of changing requests or domains 0.1 to 0.3."""
UNTOLD_PRICE = 0.1
"""What moves cost where neither options nor planner say so."""
FRESH_SHARE = 0.4
"""A plan from scratch hardly ever fills less of a layer's slots anew: what a repair must be worse by before one is made."""


class FrontierOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `frontier`.

    Fields:
        target: PAR at which a rank, and so a layer, is left alone; >= 1.
        price: PAR that filling all of a layer's slots anew is worth at least; 0 moves for any gain. None: what the planner says that moves cost
            (`daemon.move_cost`), and 0.1 where it says nothing.
        most_moved: share of all slots that one plan may fill anew, over all layers, 0 to 1.
        noise: how much of the PAR that sampling noise alone would show (the expected greatest of R Poisson counts) is
            not acted on, with one window; 0 acts on all.
        even_windows: windows of equally hot experts that take part when there are several windows; twice as many where these differ much.
        most_windows: more windows than this are summed to so many, consecutive ones together; time grows with it.
        start: live: repair the live placement. scratch: improve the plan of `default`. auto: repair, and plan from scratch
            too where the repair leaves enough to gain.
        inside_nodes: keep each expert group on one node, as `default` does (needs groups that divide over the nodes).
    """

    target: float = 1.01
    price: float | None = None
    most_moved: float = 1.0
    noise: float = 1.0
    even_windows: int = 2
    most_windows: int = 64
    start: Literal["auto", "live", "scratch"] = "auto"
    inside_nodes: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (
            ("target", 1.0, 1e6),
            ("price", 0.0, 1e6),
            ("most_moved", 0.0, 1.0),
            ("noise", 0.0, 1e6),
            ("even_windows", 0, 64),
            ("most_windows", 1, 1024),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} is {value}; it must be {least:g} to {most:g}")

    @property
    def least_price(self) -> float:
        """The price, or the one where nobody says any."""
        return UNTOLD_PRICE if self.price is None else self.price


def frontier(
    windows_TLE: FloatArray,
    slot_to_expert_LP: IntArray,
    topology: Topology,
    options: FrontierOptions,
    state: bytes,
) -> tuple[IntArray, bytes]:
    """Plan all layers (see `base.PolicyFunction`). Keeps no state; leaves no slot empty.

    Where a rank has more slots than there are experts, each rank can hold all of them: `default` does that, and no option matters.
    """
    if topology.slots_per_rank > windows_TLE.shape[2]:
        return default(windows_TLE, slot_to_expert_LP, topology, DefaultOptions(), state)
    found = find_frontier(windows_TLE, slot_to_expert_LP, topology, options)
    price = found.price_within(int(options.most_moved * slot_to_expert_LP.size), options.least_price)
    return found.placement(price), state


def within(options: FrontierOptions, share: float, price: float, num_windows: int) -> FrontierOptions:
    """The options for at most this share of all slots, at no less than this price (see `base.Policy.within`).

    Windows of equally hot experts make every gain look smaller than it is, few windows more than many; the price is made smaller by as much, so
    that a plan that is not worth it does not become so just by waiting for more windows of the same traffic.
    """
    if num_windows > 1:
        price *= num_windows / (num_windows + options.even_windows)
    if price:
        # what the options say is a least price beside the planner's; without any it is the planner's alone
        options = msgspec.structs.replace(options, price=max(options.price or 0.0, min(price, 1e6)))
    return msgspec.structs.replace(options, most_moved=min(options.most_moved, share))


def find_frontier(
    windows_TLE: FloatArray, slot_to_expert_LP: IntArray, topology: Topology, options: FrontierOptions
) -> Frontier:
    """Search all layers, and return all that was found on the way.

    Args:
        windows_TLE: tokens per window, layer and expert, oldest first; at most as many slots on a rank as experts.
        slot_to_expert_LP: the live placement.
        topology: ranks, slots, nodes and K.
        options: of the policy.
    """
    from eplb_async.policies import _frontier_layers

    live_LP = np.array(slot_to_expert_LP, dtype=np.int32, order="C")
    search = _Search(windows_TLE, live_LP, topology, options)
    complete_LP, done_L = search.complete()
    if options.start == "scratch":
        done_L[:] = False
    repair = search.run(np.flatnonzero(done_L), complete_LP[done_L])
    score_L = np.full(len(live_LP), np.inf)
    if options.start == "auto":
        score_L[repair.layers] = repair.cheapest(search.price)[1]
        score_L[repair.layers[repair.par_LJ[:, 0] <= search.trigger(repair.layers)]] = 0.0
    elif options.start == "live":
        score_L[repair.layers] = 0.0
    layers = np.flatnonzero(score_L > options.target + FRESH_SHARE * options.least_price)
    rows_LP = search.from_scratch(layers)
    moved_N = _frontier_layers.moved_slots(rows_LP, live_LP[layers], search.load_LE.shape[1], topology.num_ranks)
    worth_N = score_L[layers] > options.target + search.price * moved_N
    fresh = search.run(layers[worth_N], rows_LP[worth_N])
    return Frontier(live_LP=live_LP, slots_per_rank=topology.slots_per_rank, repair=repair, fresh=fresh)


class _Search:
    """Everything that the searches of a plan have in common."""

    def __init__(
        self, windows_TLE: FloatArray, live_LP: IntArray, topology: Topology, options: FrontierOptions
    ) -> None:
        self.windows_TLE = windows_TLE
        self.live_LP = live_LP
        self.options = options
        num_layers, num_experts = windows_TLE.shape[1:]
        nodes, groups = planning_nodes(topology, num_experts) if options.inside_nodes else (1, 1)
        self.topology = msgspec.structs.replace(topology, num_nodes=nodes, num_expert_groups=groups)
        self.most_replicas = min(topology.max_replicas, topology.num_ranks // nodes)
        self.price = options.least_price / topology.num_slots
        self.load_LE = windows_TLE.sum(axis=0)
        self.load_LET = _normalised(windows_TLE, topology.num_ranks, options)
        self.node_R = np.arange(topology.num_ranks) // self.topology.ranks_per_node
        self.node_LE = np.zeros((num_layers, num_experts), dtype=np.int64)
        if nodes > 1:
            self.node_LE = self._nodes_of_experts()

    def complete(self) -> tuple[IntArray, NDArray[np.bool_]]:
        """The live placement with every slot in use, and in which layers that could be had."""
        from eplb_async.policies import _frontier_layers

        rows_LP, done_L = _frontier_layers.complete_rows(
            self.live_LP, self.load_LE, self.node_LE, self.node_R, self.most_replicas
        )
        return rows_LP, done_L

    def from_scratch(self, layers: LongArray) -> IntArray:
        """Rows of `default`, which keep every expert in its node; of small layers the best there are, where that is found."""
        from eplb_async.policies import _matching

        if not len(layers):
            return self.live_LP[:0]
        topology, num_experts = self.topology, self.load_LE.shape[1]
        rows_LP = default(self.load_LE[None, layers], self.live_LP[layers], topology, DefaultOptions(), b"")[0]
        if topology.num_slots <= SMALL_SLOTS and topology.num_nodes == 1 and len(self.windows_TLE) == 1:
            rows_LP = self._solved(layers, rows_LP)
        if self.options.least_price > 0:
            rows_LP = _matching.match_ranks(
                rows_LP, self.live_LP[layers], num_experts, topology.slots_per_rank, topology.num_nodes
            )
        return rows_LP

    def _solved(self, layers: LongArray, rows_LP: IntArray) -> IntArray:
        """These rows, or the exact optimum of a layer where that is better and can be found."""
        # compiled when first needed, and not in warm_up: no model of today has so few slots, and it takes eight seconds
        from eplb_async.policies import _exact

        load_NR = rank_load(self.load_LE[layers], rows_LP, self.topology)
        solved_LP = rows_LP.copy()
        for row, layer in enumerate(layers):
            load_E = np.ascontiguousarray(self.load_LE[layer])
            ranks, width = self.topology.num_ranks, self.topology.slots_per_rank
            best_P = _exact.solve(load_E, ranks, width, self.most_replicas, SOLVE_NODES, float(load_NR[row].max()))[0]
            if best_P[0] >= 0:
                solved_LP[row] = best_P
        return solved_LP

    def run(self, layers: LongArray, start_LP: IntArray) -> Journals:
        """Search these layers from these rows."""
        from eplb_async.policies import _frontier_layers

        bars_L2 = np.full((len(layers), 2), self.options.target)
        bars_L2[:, 0] = self.trigger(layers)
        node_LE = self.node_LE[layers]
        if self.topology.num_nodes > 1:
            # rows from scratch may have groups on other nodes than the live ones
            node_LE = _node_of_expert(start_LP, self.topology, node_LE.shape[1])
        journal_LJ5, par_LJ, steps_L, moved_L = _frontier_layers.search_layers(
            np.ascontiguousarray(self.load_LET[layers]),
            np.ascontiguousarray(start_LP),
            self.live_LP[layers],
            node_LE,
            self.node_R,
            (self.most_replicas, min(MOST_STEPS, 3 * self.topology.num_slots), PATIENCE),
            bars_L2,
            (self.price, SPREAD / math.sqrt(len(self.windows_TLE))),
        )
        return Journals(
            layers=layers,
            start_LP=start_LP,
            moved_L=moved_L,
            journal_LJ5=journal_LJ5,
            par_LJ=par_LJ,
            steps_L=steps_L,
        )

    def trigger(self, layers: LongArray) -> FloatArray:
        """PAR up to which each of these layers is left alone: the target, and with one window what may be noise."""
        if len(self.windows_TLE) > 1:
            return np.full(len(layers), self.options.target)
        return self.options.target + _noise_par(self.load_LE[layers], self.topology.num_ranks) * self.options.noise

    def _nodes_of_experts(self) -> LongArray:
        """The node of each expert: where the live placement keeps every group on one node, that; else as `default` packs them."""
        num_layers, num_experts = self.load_LE.shape
        live_LE = _node_of_expert(self.live_LP, self.topology, num_experts)
        split_L = np.zeros(num_layers, dtype=bool)
        nodes, groups = self.topology.num_nodes, self.topology.num_expert_groups
        by_group = live_LE.reshape(num_layers, groups, num_experts // groups)
        split_L |= (by_group != by_group[:, :, :1]).any(axis=(1, 2))
        for node in range(nodes):
            split_L |= (by_group[:, :, 0] == node).sum(axis=1) != groups // nodes
        if split_L.any():
            rows = self.from_scratch(np.flatnonzero(split_L))
            live_LE[split_L] = _node_of_expert(rows, self.topology, num_experts)
        return live_LE


def _normalised(windows_TLE: FloatArray, num_ranks: int, options: FrontierOptions) -> FloatArray:
    """Loads as the search wants them: in mean rank loads of their window, with the window of equally hot experts.

    Windows [[6, 2]] on 2 ranks: [[1.5], [0.5]]. A window in which a layer had no load counts as its mean window; a layer
    that had none at all is zero.

    Returns:
        float64 [L, E, windows], contiguous.
    """
    windows_TLE = merged(windows_TLE, options.most_windows)
    num_windows, num_layers, num_experts = windows_TLE.shape
    total_TL = windows_TLE.sum(axis=2)
    loaded_TL = total_TL > 0
    load_TLE = windows_TLE / np.where(loaded_TL, total_TL, 1.0)[:, :, None] * num_ranks
    if not loaded_TL.all():
        mean_LE = load_TLE.sum(axis=0) / np.maximum(loaded_TL.sum(axis=0), 1)[:, None]
        load_TLE = np.where(loaded_TL[:, :, None], load_TLE, mean_LE)
    if num_windows > 1 and options.even_windows:
        even_LE = np.where(loaded_TL.any(axis=0)[:, None], num_ranks / num_experts, 0.0)
        even_TLE = np.broadcast_to(even_LE[:, :1], (num_layers, num_experts))
        number = options.even_windows * (2 if _disagreement(load_TLE) > DISAGREE else 1)
        load_TLE = np.concatenate([load_TLE, *[even_TLE[None]] * number])
    return np.ascontiguousarray(load_TLE.transpose(1, 2, 0))


def _disagreement(load_TLE: FloatArray) -> float:
    """The part of the tokens that several windows have on other experts than their mean has, over all layers with load.

    Two windows [[1.5, 0.5]] and [[0.5, 1.5]], mean [[1, 1]]: each has 0.5 of 2 elsewhere, so a quarter, and as a mean of two is
    nearer to its own windows than to others, times sqrt(2 / 1): 0.354.
    """
    num_windows, total = len(load_TLE), load_TLE.sum()
    off = np.abs(load_TLE - load_TLE.mean(axis=0)).sum() / 2
    return float(off / total * math.sqrt(num_windows / (num_windows - 1))) if total > 0 else 0.0


def _noise_par(load_LE: FloatArray, num_ranks: int) -> FloatArray:
    """PAR above 1 that perfectly even ranks would show only because their tokens are counted, per layer.

    The expected greatest of R normal variables times the standard deviation of a Poisson count of the mean rank
    load. 16,384 tokens on each of 32 ranks: 2.07 / 128 = 0.016. Zero for less than one token per rank: such loads are
    no counts.
    """
    mean_L = load_LE.sum(axis=1) / num_ranks
    return np.where(mean_L >= 1.0, expected_peak(num_ranks) / np.sqrt(np.maximum(mean_L, 1.0)), 0.0)


def _node_of_expert(rows_LP: IntArray, topology: Topology, num_experts: int) -> LongArray:
    """Node of each expert's slots, -1 where they are on several. int64 [L, E]."""
    slots_per_node = topology.num_slots // topology.num_nodes
    first_LE = np.full((len(rows_LP), num_experts), topology.num_nodes)
    last_LE = np.full((len(rows_LP), num_experts), -1)
    layer, slot = np.nonzero(rows_LP >= 0)
    np.minimum.at(first_LE, (layer, rows_LP[layer, slot]), slot // slots_per_node)
    np.maximum.at(last_LE, (layer, rows_LP[layer, slot]), slot // slots_per_node)
    return np.where(first_LE == last_LE, first_LE, -1)


def warm_up() -> None:
    """Compile all loops with the types that plans use."""
    topology = Topology(num_ranks=2, slots_per_rank=2, num_nodes=2, num_expert_groups=4)
    windows_TLE = np.array([[[9.0, 1.0, 1.0, 1.0]]])
    live_LP = np.array([[0, 1, 2, 3]], dtype=np.int32)
    for inside_nodes in (False, True):
        options = FrontierOptions(start="scratch", most_moved=0.5, noise=0.0, inside_nodes=inside_nodes)
        frontier(windows_TLE, live_LP, topology, options, b"")


POLICY = Policy(
    name="frontier",
    function=frontier,
    options_type=FrontierOptions,
    summary="ours: the best balance for the moves it takes, by local search over several windows",
    warm_up=warm_up,
    within=within,
)

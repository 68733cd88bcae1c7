"""Groups on several nodes, all of them on this host: a runtime directory and a set of segments for each node.

    with NodeGroup(group, spec, runtime_dir) as ranks:       processes, as in harness.py
        ranks.attach()
        daemons = Daemons(ranks)                             stand in for the daemon of each node
        daemons.post(daemons.plan([(0, new_row)]))           the same bytes on all boards
        ranks.step_until(daemons.done)

There are no daemons that talk to each other yet; posting on both boards is what they will do.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch._C._distributed_c10d import TCPStore

from eplb_async.core.placement import IntArray
from eplb_async.core.plan import Plan
from eplb_async.core.spec import MoESpec
from eplb_async.rank.matched_stager import MatchedStager
from eplb_async.rank.meeting import node_group
from eplb_async.rank.transfer.torch_dist import Message, TorchDistTransfer
from eplb_async.shm.gc import collect_garbage
from tests.rank.harness import Actor, RankGroup, hook_settings
from tests.rank.publisher import Publisher

__all__ = ["FOUR", "PLAIN", "Daemons", "NodeGroup", "close_link", "hold_link", "release_link"]

FOUR = MoESpec(num_layers=2, num_experts=8, num_ranks=4, num_redundant=4, num_nodes=2)
PLAIN = MoESpec(num_layers=2, num_experts=12, num_ranks=4, num_nodes=2)
"""Without replicas: an expert can come from one slot only."""


class NodeGroup(RankGroup):
    """Rank processes of `spec.num_nodes` nodes. `fields` are of HookSettings, `options` of RankOptions."""

    def __init__(
        self, group: str, spec: MoESpec, runtime_dir: Path, options: dict[str, Any] | None = None, **fields: Any
    ) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.nodes = [node_group(group, node) for node in range(spec.num_nodes)]
        width = spec.topology.ranks_per_node
        each = [
            {"settings": hook_settings(runtime_dir / str(rank // width), **fields), **(options or {})}
            for rank in range(spec.num_ranks)
        ]
        super().__init__(group, spec, hook_settings(runtime_dir), each, store_port=self.store.port)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        clean = kind is None and not self.killed
        super().__exit__(kind, error, trace)
        if not clean:
            for group in self.nodes:
                collect_garbage(group)


class Daemons:
    """A publisher for each node."""

    def __init__(self, ranks: NodeGroup, placement: IntArray | None = None) -> None:
        self.each = [Publisher(group, ranks.spec, placement) for group in ranks.nodes]

    @property
    def rows_LP(self) -> IntArray:
        """The placement that `applied` keeps."""
        return self.each[0].rows_LP

    @property
    def trace(self) -> list[dict[str, Any]]:
        """What tests/model can check."""
        return [{**event, "node": node} for node, daemon in enumerate(self.each) for event in daemon.trace]

    def plan(self, changes: Sequence[tuple[int, IntArray]], **fields: Any) -> Plan:
        """See Publisher."""
        return self.each[0].plan(changes, **fields)

    def post(self, plan: Plan, nodes: Sequence[int] = ()) -> Plan:
        """On all boards, or some."""
        for node in nodes or range(len(self.each)):
            self.each[node].post(plan)
        return plan

    def done(self, generation: int = 1) -> bool:
        """All ranks have finished or dropped this generation."""
        return all(daemon.done(generation) for daemon in self.each)

    def applied(self, plan: Plan, num_entries: int | None = None) -> None:
        """See Publisher."""
        for daemon in self.each:
            daemon.applied(plan, num_entries)

    def close(self) -> None:
        """See Publisher."""
        for daemon in self.each:
            daemon.close()


def between(actor: Actor) -> TorchDistTransfer:
    """The transfer between nodes of a rank."""
    stager = actor.hook._parts.stager
    assert isinstance(stager, MatchedStager)
    return stager._between


def hold_link(actor: Actor) -> None:
    """Exchanges of this rank wait before they begin."""
    link, opened = between(actor)._link, threading.Event()
    swap = link.swap

    def held(sends: Sequence[Message], receives: Sequence[Message]) -> None:
        if not opened.wait(60.0):
            raise TimeoutError("nobody released the link")
        swap(sends, receives)

    vars(link)["swap"] = held
    vars(actor)["opened"] = opened


def release_link(actor: Actor) -> None:
    """Let them go on."""
    vars(actor)["opened"].set()


def close_link(actor: Actor) -> None:
    """The connections for weights break."""
    between(actor)._link.close()

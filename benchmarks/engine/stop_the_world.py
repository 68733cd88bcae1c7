"""Rebalancing as engines do it in their synchronous mode: everything waits while loads are summed and experts exchanged.

    1. all-reduce of the loads counted since the last time; every rank reads them
    2. every rank plans by itself, all with the same result
    3. layer by layer, all moved experts go by batched send/recv into temporary buffers, and from there into their slots
    4. the maps are rewritten

Each rank calls `rebalance` at the same step. The process group is one of its own, never captured in a graph.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from benchmarks.engine.model import Engine
from eplb_async.core.diff import moves_between
from eplb_async.core.placement import expert_to_slots
from eplb_async.policies.registry import load_policy, run_policy
from eplb_async.rank.maps import Maps

__all__ = ["Rebalance", "StopTheWorld"]


@dataclass(frozen=True, kw_only=True)
class Rebalance:
    """One of them, as one rank saw it. `moves`: slots of all ranks filled anew; `bytes_received` on this rank from others."""

    step: int
    layers: int
    moves: int
    bytes_received: int
    plan_ms: float
    total_ms: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


class StopTheWorld:
    """The balancer of mode "sync" on one rank."""

    def __init__(
        self, engine: Engine, maps: Maps, policy: str = "default", options: Mapping[str, object] | None = None
    ) -> None:
        """Compiles the policy and connects the ranks. All ranks must call it at once."""
        self._engine, self._maps = engine, maps
        self._policy, self._options = (
            policy,
            {"strict": True} if options is None and policy == "default" else options or {},
        )
        self._placement_LP = maps.slot_to_expert_LP.cpu().numpy().astype(np.int32)
        self._state = b""
        load_policy(policy).warm_up()
        self._group = dist.new_group(backend=dist.get_backend()) if engine.config.num_ranks > 1 else None
        if self._group is not None:
            # the first call of a group must be made by all its ranks; sends and receives may not be
            dist.all_reduce(torch.zeros(1, device=engine.device), group=self._group)
            self._connect(self._group)
        self.history: list[Rebalance] = []

    def rebalance(self, step: int) -> Rebalance:
        """Stop, plan, exchange, swap, and go on when all is done."""
        start = time.perf_counter()
        engine, topology = self._engine, self._engine.spec.topology
        load = engine.load.clone()
        if self._group is not None:
            dist.all_reduce(load, group=self._group)
        windows_TLE = load.cpu().numpy()[None]
        planning = time.perf_counter()
        target_LP, self._state = run_policy(
            self._policy, windows_TLE, self._placement_LP, engine.spec, self._options, self._state
        )
        planned = time.perf_counter()
        sent_R = np.zeros(topology.num_ranks, dtype=np.int64)
        num_layers = num_moves = num_bytes = 0
        for layer in range(engine.spec.num_layers):
            moves = moves_between(self._placement_LP[layer], target_LP[layer], topology, sent_R)
            if len(moves):
                num_bytes += self._exchange(layer, moves)
                self._write_maps(layer, target_LP[layer])
                num_layers, num_moves = num_layers + 1, num_moves + len(moves)
        self._placement_LP = target_LP
        engine.load.zero_()
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        done = Rebalance(
            step=step,
            layers=num_layers,
            moves=num_moves,
            bytes_received=num_bytes,
            plan_ms=(planned - planning) * 1e3,
            total_ms=(time.perf_counter() - start) * 1e3,
        )
        self.history.append(done)
        return done

    def _connect(self, group: dist.ProcessGroup) -> None:
        """Send a number to every rank, so that the first rebalance does not pay for connections."""
        device, rank = self._engine.device, self._engine.rank
        peers = [peer for peer in range(self._engine.config.num_ranks) if peer != rank]
        sent, received = torch.zeros(1, device=device), [torch.zeros(1, device=device) for _ in peers]
        operations = [dist.P2POp(dist.isend, sent, peer, group) for peer in peers]
        operations += [
            dist.P2POp(dist.irecv, buffer, peer, group) for buffer, peer in zip(received, peers, strict=True)
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def _exchange(self, layer: int, moves: NDArray[np.int32]) -> int:
        """Fill the slots of one layer; returns the bytes received. Peers post in the order of the moves, so they match."""
        rank, width = self._engine.rank, self._engine.spec.slots_per_rank
        operations: list[dist.P2POp] = []
        arrived: list[tuple[torch.Tensor, torch.Tensor]] = []
        num_bytes = 0
        for _, source, destination in moves.tolist():
            for tensor in self._engine.weights[layer].values():
                live = tensor[source % width] if source // width == rank else None
                if destination // width != rank:
                    if live is not None:
                        operations.append(dist.P2POp(dist.isend, live, destination // width, self._group))
                    continue
                buffer = torch.empty_like(tensor[0])
                if live is not None:
                    buffer.copy_(live)
                else:
                    operations.append(dist.P2POp(dist.irecv, buffer, source // width, self._group))
                    num_bytes += buffer.nbytes
                arrived.append((tensor[destination % width], buffer))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        for slot, buffer in arrived:
            slot.copy_(buffer)
        return num_bytes

    def _write_maps(self, layer: int, row_P: NDArray[np.int32]) -> None:
        maps, spec = self._maps, self._engine.spec
        table_LEK, count_LE = expert_to_slots(row_P[None], spec.num_experts, spec.max_replicas)
        for tensor, values in (
            (maps.slot_to_expert_LP, row_P),
            (maps.dispatch_table_LEK, table_LEK[0]),
            (maps.dispatch_count_LE, count_LE[0]),
        ):
            tensor[layer].copy_(torch.from_numpy(values.astype(np.int64)))

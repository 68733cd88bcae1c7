"""Real ranks for tests: processes that attach, step when told to, and hold weights whose bytes tell which expert they are.

    with RankGroup(group, spec, settings) as ranks:      processes, one per rank
        ranks.attach()
        daemon = Publisher(group, spec)                  stands in for the daemon, in the test's process
        daemon.post(daemon.plan([(0, new_row)]))
        ranks.step_until(daemon.done)                    all ranks the same number of steps; maps compared at each
        ranks.check()                                    every slot of every rank holds the bytes of its expert

Processes come from a fork server that has torch loaded, so that starting one takes some 10 ms.
"""

import functools
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch._C._distributed_c10d import TCPStore

from eplb_async.core.config import HookSettings, Settings
from eplb_async.core.load import LoadKind
from eplb_async.core.placement import IntArray, initial_placement
from eplb_async.core.spec import MoESpec
from eplb_async.rank.hook import RankHook
from eplb_async.rank.transfer.shm import SharedWeights, share_weights
from eplb_async.shm.gc import collect_garbage

__all__ = [
    "TENSORS",
    "Actor",
    "RankGroup",
    "RankOptions",
    "expert_bytes",
    "forkserver",
    "hook_settings",
    "make_weights",
    "run_step",
]

ANSWER_S = 60.0
DEVICE = os.environ.get("EPLB_TEST_DEVICE", "cpu")
"""cuda runs ranks on GPUs, rank r on number r modulo how many there are: `make test-gpu` repeats some tests so."""
TENSORS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "w": (torch.bfloat16, (3, 20)),
    "scale": (torch.float32, ()),
    "packed": (torch.int8, (33,)),
    "w8": (torch.float8_e4m3fn, (4, 5)),
}
"""Names, types and row shapes of the tensors of an expert."""

forkserver = multiprocessing.get_context("forkserver")
"""Its processes have torch loaded when they start."""
forkserver.set_forkserver_preload(["tests.rank.harness", "tests.rank.tracing"])


@functools.cache
def expert_bytes(layer: int, expert: int, tensor: int) -> NDArray[np.uint8]:
    """What an expert's row of a tensor holds, in every slot and rank; random, but always the same."""
    dtype, shape = list(TENSORS.values())[tensor]
    num_bytes = dtype.itemsize * int(np.prod(shape))
    return np.random.default_rng((layer, expert, tensor)).integers(0, 256, num_bytes, dtype=np.uint8)


def make_weights(spec: MoESpec, placement_LP: IntArray, rank: int) -> list[dict[str, torch.Tensor]]:
    """The weights of a rank as an engine loads them; empty slots are zero."""
    slots = range(rank * spec.slots_per_rank, (rank + 1) * spec.slots_per_rank)
    layers = []
    for layer in range(spec.num_layers):
        tensors = {}
        for index, (name, (dtype, shape)) in enumerate(TENSORS.items()):
            experts = [int(placement_LP[layer, slot]) for slot in slots]
            rows = [expert_bytes(layer, e, index) if e >= 0 else 0 * expert_bytes(layer, 0, index) for e in experts]
            tensors[name] = torch.from_numpy(np.stack(rows)).view(dtype).view(len(rows), *shape)
        layers.append(tensors)
    return layers


def hook_settings(runtime_dir: Path, **fields: Any) -> Settings:
    """Settings for tests: short deadlines unless `fields` say otherwise."""
    short = {"peer_deadline_s": 20.0, "attach_deadline_s": 20.0}
    return Settings(runtime_dir=str(runtime_dir), hook=HookSettings(**{**short, **fields}))


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """How a rank process attaches.

    Fields:
        hook_class: RankHook or one made for a test.
        load_width, load_kind: of the load tensor; E by default.
        pause_s: time that each forward takes, of this rank.
        store_port: of a TCPStore on this host in which ranks of several nodes meet; 0: one node.
        device: of weights, load and maps; "cuda" is one of them by rank.
    """

    group: str
    rank: int
    spec: MoESpec
    settings: Settings
    placement: IntArray | None = None
    hook_class: type[RankHook] = RankHook
    load_width: int = 0
    load_kind: LoadKind | None = None
    pause_s: float = 0.0
    store_port: int = 0
    device: str = DEVICE


class Actor:
    """What runs in a rank's process: the commands of RankGroup are its methods."""

    def __init__(self, options: RankOptions) -> None:
        self.options, self.spec = options, options.spec
        self.hook: RankHook
        self.store: TCPStore | None = None
        self.weights: SharedWeights | list[dict[str, torch.Tensor]] | None = None
        width = options.load_width or self.spec.num_experts
        self.load = torch.zeros(self.spec.num_layers, width, dtype=torch.int32, device=options.device)
        self.step_number = 0

    def attach(self, placement: IntArray | None = None) -> None:
        """Share the weights (the first time) and attach."""
        options = self.options
        placement = options.placement if placement is None else placement
        if self.weights is None:
            loaded_LP = initial_placement(self.spec) if placement is None else placement
            loaded = make_weights(self.spec, loaded_LP, options.rank)
            if options.device == "cpu":
                self.weights = share_weights(options.group, options.rank, loaded)
            else:
                self.weights = [{name: tensor.to(options.device) for name, tensor in layer.items()} for layer in loaded]
        self.step_number = 0
        if options.store_port and self.store is None:
            self.store = TCPStore("127.0.0.1", options.store_port, is_master=False)
        self.hook = options.hook_class.attach(
            group=options.group,
            rank=options.rank,
            spec=self.spec,
            weights=self.weights,
            load=self.load,
            placement=placement,
            load_kind=options.load_kind,
            settings=options.settings,
            rendezvous=self.store,
        )

    def step(self, count: int, phase: str = "decode") -> list[tuple[int, int]]:
        """Make steps; returns (step, hash of all map tensors during its forward) of each."""
        return [run_step(self, phase) for _ in range(count)]

    def check(self) -> list[str]:
        """Slots whose bytes are not those of their expert."""
        hook, width, wrong = self.hook, self.spec.slots_per_rank, []
        first = self.options.rank * width
        for layer, tensors in enumerate(self.weights or ()):
            for slot, expert in enumerate(hook.slot_to_expert_LP[layer, first : first + width].tolist()):
                for index, tensor in enumerate(tensors.values()):
                    found = tensor.reshape(width, -1)[slot].view(torch.uint8).cpu().numpy()
                    if expert >= 0 and not np.array_equal(found, expert_bytes(layer, expert, index)):
                        wrong.append(
                            f"rank {hook.rank} layer {layer} slot {slot}: tensor {index} is not expert {expert}'s"
                        )
        return wrong

    def statistics_of(self, name: str) -> Any:
        """One field of the hook's statistics."""
        return getattr(self.hook.statistics(), name)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a module-level function on this actor."""
        return function(self, *arguments)

    def detach(self) -> None:
        """Leave the group."""
        if hasattr(self, "hook"):
            self.hook.detach()

    def close(self) -> None:
        """Detach and remove the weights."""
        self.detach()
        if isinstance(self.weights, SharedWeights):
            self.weights.close()
        self.weights = None


def run_step(actor: Actor, phase: str = "decode") -> tuple[int, int]:
    """One step of a rank; see Actor.step."""
    hook = actor.hook
    with hook.step(phase, num_tokens=7):
        actor.load += 1
        maps = hook.slot_to_expert_LP, hook.dispatch_table_LEK, hook.dispatch_count_LE
        digest = hash(tuple(tensor.cpu().numpy().tobytes() for tensor in maps))
        if actor.options.pause_s:
            time.sleep(actor.options.pause_s)
    actor.step_number += 1
    return actor.step_number - 1, digest


def _serve(pipe: "multiprocessing.connection.Connection[Any, Any]", options: RankOptions) -> None:
    torch.set_num_threads(1)
    if options.device == "cuda":
        options = replace(options, device=f"cuda:{options.rank % torch.cuda.device_count()}")
    if options.device != "cpu":
        torch.cuda.set_device(options.device)
    actor = Actor(options)
    while True:
        try:
            command, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(actor, command)(*arguments)
        except Exception as error:  # noqa: BLE001 (sent to the test)
            answer = False, error
        pipe.send(answer)
        if command == "close" and answer[0]:
            return


class RankGroup:
    """The rank processes of one group. Leaving the context ends them; after an error, or a kill, with what they left."""

    def __init__(
        self, group: str, spec: MoESpec, settings: Settings, each: Sequence[dict[str, Any]] = (), **options: Any
    ) -> None:
        """`options` are RankOptions of all ranks, `each` those of single ranks."""
        self.group, self.spec = group, spec
        each = [*each, *[{}] * (spec.num_ranks - len(each))]
        self.options = [
            RankOptions(group=group, rank=rank, spec=spec, **{"settings": settings, **options, **own})
            for rank, own in enumerate(each)
        ]
        self.processes: list[Any] = []
        self.pipes: list[Any] = []
        self.killed: set[int] = set()

    def __enter__(self) -> Self:
        for options in self.options:
            self._start(options)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        clean = kind is None and not self.killed
        try:
            if clean:
                self.all("close")
        finally:
            for rank, process in enumerate(self.processes):
                if not clean:
                    self.kill(rank)
                process.join(ANSWER_S)
                process.kill()
                self.pipes[rank].close()
                process.join()
                process.close()
            if not clean:
                collect_garbage(self.group)

    def _start(self, options: RankOptions) -> None:
        ours, theirs = forkserver.Pipe()
        process = forkserver.Process(target=_serve, args=(theirs, options), name=f"rank {options.rank}", daemon=True)
        process.start()
        theirs.close()
        self.processes[options.rank : options.rank + 1] = [process]
        self.pipes[options.rank : options.rank + 1] = [ours]

    def kill(self, rank: int) -> None:
        """Kill -9."""
        self.killed.add(rank)
        self.processes[rank].kill()
        self.processes[rank].join(ANSWER_S)

    def restart(self, rank: int) -> None:
        """A new process in place of a killed one."""
        self.pipes[rank].close()
        self.processes[rank].close()
        self._start(self.options[rank])

    def send(self, rank: int, command: str, *arguments: Any) -> None:
        """Give a command without waiting."""
        self.pipes[rank].send((command, arguments))

    def receive(self, rank: int) -> Any:
        """The answer to a command, or the exception it raised, returned."""
        if not self.pipes[rank].poll(ANSWER_S):
            raise AssertionError(f"rank {rank} does not answer")
        _, answer = self.pipes[rank].recv()
        return answer

    def ask(self, rank: int, command: str, *arguments: Any) -> Any:
        """Give a command and wait; raises what it raised."""
        self.send(rank, command, *arguments)
        return _checked(self.receive(rank))

    def outcomes(self, command: str, *arguments: Any, ranks: Sequence[int] | None = None) -> list[Any]:
        """Give a command to all (or some) and collect answers and exceptions."""
        chosen = range(len(self.processes)) if ranks is None else ranks
        for rank in chosen:
            self.send(rank, command, *arguments)
        return [self.receive(rank) for rank in chosen]

    def all(self, command: str, *arguments: Any) -> list[Any]:
        """The same; raises the first exception."""
        return [_checked(answer) for answer in self.outcomes(command, *arguments)]

    def attach(self, placement: IntArray | None = None) -> None:
        """Attach all ranks."""
        self.all("attach", placement)

    def step(self, count: int = 1, phase: str = "decode") -> list[tuple[int, int]]:
        """Make steps on all ranks; their maps must be equal in each. Returns (step, hash of the maps) of each."""
        found = self.all("step", count, phase)
        assert all(other == found[0] for other in found), f"ranks used different maps in one step: {found}"
        return list(found[0])

    def step_until(self, condition: Callable[[], bool], most: int = 3000, count: int = 3) -> list[tuple[int, int]]:
        """Step until something is true."""
        steps: list[tuple[int, int]] = []
        while not condition():
            assert len(steps) < most, f"not true after {len(steps)} steps"
            steps += self.step(count)
        return steps

    def check(self) -> None:
        """Every slot of every rank holds the bytes of the expert that the map says."""
        wrong = [line for lines in self.all("check") for line in lines]
        assert not wrong, wrong

    def rows(self) -> list[list[int]]:
        """The live map, from rank 0."""
        return list(self.ask(0, "call", live_rows))


def live_rows(actor: Actor) -> list[list[int]]:
    """The map of a rank."""
    return actor.hook.slot_to_expert_LP.tolist()


def _checked(answer: Any) -> Any:
    if isinstance(answer, BaseException):
        raise answer
    return answer

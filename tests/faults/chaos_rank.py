"""One rank of the chaos harness: it serves, loses its peers, and joins again, as often as it is told to.

Commands come through a pipe, answers go back through another. Every event of the protocol (tests/model/trace_events.py) is
written to a file before it has an effect, so that a killed process leaves all that it did:

    Attach  -> Joined | Refused      join an incarnation from this placement; weights that are elsewhere are loaded anew
    Last    -> Ended                 make forwards up to that step, then detach
    Slow                             the next forward takes so long
            -> Ended                 by itself, with the lost rank, when a peer is lost

After each forward a layer is looked at as a router would: every slot it would send tokens to must hold the right expert.
"""

import contextlib
import json
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from eplb_async import share_weights
from eplb_async.core.config import Settings, load_settings
from eplb_async.core.errors import NoSharedMemory, PeerError
from eplb_async.core.placement import IntArray
from eplb_async.rank.transfer.shm import SharedWeights
from tests.faults.harness import SPEC, expert_weights
from tests.rank.tracing import TracedAgreement, TracedHook

__all__ = ["Attach", "Ended", "Joined", "Last", "Refused", "Slow", "serve_chaos"]

SHIFT_STEPS = 60
WIDTH = SPEC.slots_per_rank


@dataclass(frozen=True)
class Attach:
    """Join from this placement, writing events to `trace`; `full`: first with shared memory that has no room."""

    placement_LP: IntArray
    trace: str
    full: bool = False


@dataclass(frozen=True)
class Last:
    """Make no forward from this step on."""

    step: int


@dataclass(frozen=True)
class Slow:
    """Sleep in the next forward."""

    seconds: float


@dataclass(frozen=True)
class Joined:
    """All ranks are there. `reloaded`: layers whose weights had to be loaded anew."""

    rank: int
    reloaded: int


@dataclass(frozen=True)
class Refused:
    """Shared memory had no room, and attach said so; another try follows by itself."""

    rank: int
    why: str


@dataclass
class Ended:
    """What one incarnation was for this rank. `lost`: the peer that ended it, -1 if it was told to end."""

    rank: int
    steps: int = 0
    lost: int = -1
    why: str = ""
    wrong: list[str] = field(default_factory=list)
    commits: int = 0
    drops: int = 0
    versions: tuple[int, ...] = ()
    placement_LP: Any = None


class _FiledAgreement(TracedAgreement):
    """Events go to a file at once."""

    file = -1

    def record(self, event: str, **fields: Any) -> None:
        """One line; a process that is killed after the call has written it."""
        os.write(self.file, json.dumps({"event": event, **fields}).encode() + b"\n")


class _ChaosHook(TracedHook):
    agreement_class = _FiledAgreement

    def before_forward(self, *arguments: Any, **fields: Any) -> None:
        """Maps are told whole where they changed, else by their versions."""
        super(TracedHook, self).before_forward(*arguments, **fields)
        agreement, live = self._agreement, self.live
        assert isinstance(agreement, _FiledAgreement)
        known = getattr(self, "_known", ())
        rows = self.slot_to_expert_LP.tolist() if live.versions != known else None
        maps = [
            rows[layer] if rows is not None and (not known or known[layer] != version) else version
            for layer, version in enumerate(live.versions)
        ]
        self._known = live.versions
        agreement.record("forward", step=self._step, maps=maps)


def serve_chaos(group: str, rank: int, settings_of: dict[str, str], commands: Connection, answers: Connection) -> None:
    """A rank's process; ends when the pipe of commands does."""
    torch.set_num_threads(1)
    settings = load_settings(environ=settings_of)
    step_s = float(os.environ.get("CHAOS_STEP_S", "0.01"))
    weights: SharedWeights | None = None
    live_LP: IntArray | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            command = commands.recv()
            if not isinstance(command, Attach):
                continue  # for an incarnation that is over
            wanted_LP = command.placement_LP
            with _no_room(command.full):
                if weights is None:
                    weights = share_weights(group, rank, expert_weights(wanted_LP, rank))
            reloaded = _reload(weights, live_LP, wanted_LP, rank)
            rank_of = _Rank(group, rank, settings, weights)
            ended = rank_of.run(command, commands, answers, step_s, reloaded)
            live_LP = ended.placement_LP
            answers.send(ended)
    if weights is not None:
        weights.close()


class _Rank:
    """One incarnation of one rank."""

    def __init__(self, group: str, rank: int, settings: Settings, weights: SharedWeights) -> None:
        self.group, self.rank, self.settings, self.weights = group, rank, settings, weights
        self.load = torch.zeros(SPEC.num_layers, SPEC.num_slots, dtype=torch.int32)
        self.rng = np.random.default_rng(rank)
        self.ended = Ended(rank)

    # size: its five arguments and self are what a process has
    def run(self, command: Attach, commands: Connection, answers: Connection, step_s: float, reloaded: int) -> Ended:
        """Attach, serve, detach."""
        if command.full:
            try:
                with _no_room(True):
                    self._attach(command.placement_LP)
                raise AssertionError("attach found room where there is none")
            except NoSharedMemory as error:
                answers.send(Refused(self.rank, str(error)))
        _FiledAgreement.file = os.open(command.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        hook = self._attach(command.placement_LP)
        answers.send(Joined(self.rank, reloaded))
        try:
            self._serve(hook, commands, step_s)
        except PeerError as error:
            self.ended.lost, self.ended.why = getattr(error, "rank", -1), str(error)
        statistics = hook.statistics()
        self.ended.commits, self.ended.drops = statistics.num_commits, statistics.num_drops
        self.ended.versions = hook.live.versions
        self.ended.placement_LP = hook.slot_to_expert_LP.numpy().astype(np.int32)
        self.ended.wrong += self._wrong_bytes(hook, "at the end")
        hook.detach()
        os.close(_FiledAgreement.file)
        return self.ended

    def _attach(self, placement_LP: IntArray) -> _ChaosHook:
        hook = _ChaosHook.attach(
            group=self.group,
            rank=self.rank,
            spec=SPEC,
            weights=self.weights,
            load=self.load,
            placement=placement_LP,
            settings=self.settings,
        )
        assert isinstance(hook, _ChaosHook)
        return hook

    def _serve(self, hook: _ChaosHook, commands: Connection, step_s: float) -> None:
        last, slow_s, commits = 1 << 62, 0.0, 0
        while self.ended.steps < last:
            hook.before_forward("decode", 8)
            if hook.num_commits != commits:
                commits = hook.num_commits
                self.ended.wrong += self._wrong_bytes(hook, f"step {self.ended.steps}")
            self._forward(hook, self.ended.steps)
            time.sleep(step_s + slow_s)
            slow_s = 0.0
            hook.after_forward()
            self.ended.steps += 1
            while commands.poll():
                command = commands.recv()
                last = command.step if isinstance(command, Last) else last
                slow_s = command.seconds if isinstance(command, Slow) else slow_s

    def _forward(self, hook: _ChaosHook, step: int) -> None:
        """Route tokens of every expert; the experts' own values must come out. Slots are counted, as some engines do."""
        count_LE = hook.dispatch_count_LE
        chosen_LE = hook.dispatch_table_LEK.gather(2, (step % count_LE)[..., None])[..., 0]
        layer = step % SPEC.num_layers
        here_E = chosen_LE[layer] // WIDTH == self.rank
        outputs = self.weights[layer]["scale"][chosen_LE[layer][here_E] % WIDTH]
        expected = torch.arange(SPEC.num_experts)[here_E] * 100 + layer
        if not torch.equal(outputs, expected.to(torch.float32)):
            self.ended.wrong.append(f"step {step} rank {self.rank} layer {layer}: {outputs.tolist()} came out")
        hot = np.random.default_rng(step // SHIFT_STEPS).permutation(SPEC.num_experts)
        counts = self.rng.poisson(400 / (1 + hot) ** 1.2, size=chosen_LE.shape)
        self.load.scatter_add_(1, chosen_LE, torch.from_numpy(counts.astype(np.int32)))

    def _wrong_bytes(self, hook: _ChaosHook, when: str) -> list[str]:
        rows_LP = hook.slot_to_expert_LP.numpy().astype(np.int32)
        wrong = _differing(self.weights, rows_LP, self.rank)
        return [f"{when} rank {self.rank} layer {layer} {name}: wrong bytes" for layer, name in wrong]


def _differing(weights: SharedWeights, rows_LP: IntArray, rank: int) -> list[tuple[int, str]]:
    """Tensors with a slot that does not hold what these rows say."""
    held_LS = torch.from_numpy(rows_LP[:, rank * WIDTH : (rank + 1) * WIDTH] >= 0)
    found = []
    for layer, tensors in enumerate(expert_weights(rows_LP, rank)):
        for name, tensor in tensors.items():
            same = (weights[layer][name] == tensor).reshape(WIDTH, -1).all(dim=1)
            if not bool((same | ~held_LS[layer]).all()):
                found.append((layer, name))
    return found


def _reload(weights: SharedWeights, live_LP: IntArray | None, wanted_LP: IntArray, rank: int) -> int:
    """Load weights of layers that the others have further, as an engine would from its checkpoint; how many layers."""
    if live_LP is None or np.array_equal(live_LP, wanted_LP):
        return 0
    layers = np.flatnonzero((live_LP != wanted_LP).any(axis=1)).tolist()
    fresh = expert_weights(wanted_LP, rank)
    for layer in layers:
        for name, tensor in fresh[layer].items():
            weights[layer][name].copy_(tensor)
    return len(layers)


@contextlib.contextmanager
def _no_room(full: bool) -> Iterator[None]:
    """Files, and so segments, of this process may not grow beyond a page: as if /dev/shm were full, for it alone."""
    if not full:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

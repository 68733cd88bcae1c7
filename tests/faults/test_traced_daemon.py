"""The real daemon and real ranks together, daemons killed in between, checked against the executable model.

What the daemon writes is read off the board and the abort word after every step of the ranks. No plan can be missed that
way: a board is rewritten only when all ranks are done with the plan on it, which takes several steps.
"""

import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from eplb_async.core.config import DaemonSettings
from eplb_async.core.daemon_settings import EAGER
from eplb_async.core.placement import initial_placement
from eplb_async.core.plan import Plan, decode_plan, generation_of, position_of
from eplb_async.core.spec import MoESpec
from eplb_async.runtime.client import ControlClient
from eplb_async.shm.board import PlanBoard
from eplb_async.shm.launch import daemon_running, ensure_daemon
from eplb_async.shm.words import AgreementWords
from tests.faults.harness import wait_for
from tests.model.trace_check import check_traces
from tests.rank.harness import Actor, RankGroup, hook_settings
from tests.rank.tracing import Event, TracedHook

__all__: list[str] = []

SPEC = MoESpec(num_layers=2, num_experts=6, num_ranks=3, num_redundant=3)
STAGING_ROWS = 2
SHIFT_STEPS = 40
SOON = {
    "window_steps": 5,
    "num_windows": 2,
    "interval_steps": 10,
    "par_threshold": 1.01,
    "min_gain": 0.01,
    "poll_interval_s": 0.005,
    "discovery_interval_s": 0.02,
}
DAEMON = DaemonSettings(**{**EAGER, **SOON})


def drifting_step(actor: Actor) -> int:
    """One step under a load whose hot experts change; returns the step."""
    step = actor.step_number
    hot = np.random.default_rng(step // SHIFT_STEPS).permutation(SPEC.num_experts)
    with actor.hook.step("decode", 8):
        for expert, place in enumerate(hot.tolist()):
            actor.load[:, expert] += 600 // (1 + place) ** 2
    actor.step_number += 1
    return step


def events_of(actor: Actor) -> list[Event]:
    """What a rank recorded."""
    assert isinstance(actor.hook, TracedHook)
    return actor.hook.events


class Watcher:
    """Reads off the board what daemons do; `trace` is in the words of tests/model/trace_events.py."""

    def __init__(self, group: str) -> None:
        self.words = AgreementWords.open(group)
        self.board = PlanBoard.open(group, self.words.incarnation)
        self.trace: list[dict[str, Any]] = []
        self.plans: dict[int, Plan] = {}
        self._sequence = self._abort = 0

    def look(self) -> None:
        """Note what is new."""
        posted = self.board.read() if self.board.sequence != self._sequence else None
        abort = self.board.abort
        # of an older plan: it came before the new one was written
        if abort != self._abort and (posted is None or abort < posted.generation):
            self._note_abort(abort)
        if posted is not None:
            self._sequence = self.board.sequence
            plan = self.plans[posted.generation] = decode_plan(posted.data)
            layers = {entry.layer: entry for entry in reversed(plan.entries)}
            self.trace.append(
                {
                    "event": "board",
                    "plan": posted.digest,
                    "generation": posted.generation,
                    "base": [[layer, self._row(layer, entry.base_version)] for layer, entry in sorted(layers.items())],
                    "entries": [[entry.layer, entry.slot_to_expert_P.tolist()] for entry in plan.entries],
                }
            )
        if abort != self._abort:
            self._note_abort(abort)

    def generation(self) -> int:
        """Of the next plan, by the slowest rank."""
        words = [self.words.newest(rank) for rank in range(SPEC.num_ranks)]
        return min(generation_of(word.committed) if word else 0 for word in words)

    def quiet(self) -> bool:
        """True if no plan is active."""
        words = [self.words.newest(rank) for rank in range(SPEC.num_ranks)]
        done = {(word.staged, word.committed) for word in words if word is not None}
        staged, committed = next(iter(done))
        newest = max(self.plans, default=0)
        return len(done) == 1 and staged == committed and not position_of(staged) and generation_of(staged) > newest

    def close(self) -> None:
        """Drop the mappings."""
        self.board.close()
        self.words.close()

    def _note_abort(self, generation: int) -> None:
        self._abort = generation
        self.trace.append({"event": "abort", "generation": generation})

    def _row(self, layer: int, version: int) -> list[int]:
        """The row of that version: of an earlier plan's entry, or the initial one."""
        if not version:
            row: list[int] = initial_placement(SPEC)[layer].tolist()
            return row
        entry = self.plans[generation_of(version)].entries[position_of(version) - 1]
        assert entry.layer == layer
        found: list[int] = entry.slot_to_expert_P.tolist()
        return found


@pytest.mark.timeout(180)
def test_killed_daemons_are_a_behaviour_of_the_model(group: str, runtime_dir: Path) -> None:
    """Plans of several daemons, each killed in the middle of one, are applied as the model allows, with right bytes."""
    settings = msgspec.structs.replace(
        hook_settings(runtime_dir, staging_rows=STAGING_ROWS, copies_per_step=1), daemon=DAEMON
    )
    with RankGroup(group, SPEC, settings, hook_class=TracedHook) as ranks, ControlClient(settings) as client:
        ranks.attach()
        watcher = Watcher(group)

        def step() -> None:
            ranks.all("call", drifting_step)
            watcher.look()

        def step_until(condition: Any, most: int = 2000) -> None:
            for _ in range(most):
                if condition():
                    return
                step()
            raise AssertionError(f"not true after {most} steps: {watcher.trace}")

        for daemon in range(4):
            ensure_daemon(settings, 60)
            watcher.trace += [{"event": "restart"}] if daemon else []
            pid = client.status().pid
            # steps are counted once there is somebody who could plan; on a busy machine a worker starts slower than ranks step
            wait_for(lambda: client.status().pool["num_idle"], 60, "a policy worker")
            first = watcher.generation()
            step_until(lambda first=first: watcher.generation() > first + 1)
            newest = max(watcher.plans)
            step_until(lambda newest=newest: max(watcher.plans) > newest)
            for _ in range(daemon):  # further into the plan each time
                step()
            os.kill(pid, signal.SIGKILL)
            client.close()
            wait_for(lambda: not daemon_running(settings), 10, "the daemon to die")
            watcher.look()
            watcher.trace.append({"event": "crash"})
        step_until(watcher.quiet)
        ranks.check()
        traces = ranks.all("call", events_of)
        start = initial_placement(SPEC).tolist()
        found = check_traces(traces, watcher.trace, start, SPEC.slots_per_rank, settings.hook.lag, STAGING_ROWS)
        watcher.close()
    assert found.accepted, str(found)
    boards = [event for event in watcher.trace if event["event"] == "board"]
    assert len(boards) >= 8

"""The group that chaos happens to: four rank processes over many incarnations, one daemon, and the check after each event.

    join -> events ... (after each: all ranks stopped, their traces read, the cut checked) -> a rank is lost, or all are told
    to end -> the last cut checked, reports compared -> join again from the placement of whoever came furthest

Ranks that lost a peer may stand one commit apart, as some have read its last word and some have not; who is behind loads
the weights of those layers anew, as an engine would from its checkpoint.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from eplb_async.core.config import child_environment, daemon_variables, load_settings, policy_cache
from eplb_async.core.daemon_settings import EAGER
from eplb_async.core.errors import EplbError
from eplb_async.core.placement import IntArray, initial_placement
from eplb_async.runtime.client import ControlClient
from eplb_async.shm.launch import daemon_running
from tests.faults.board_watcher import BoardWatcher
from tests.faults.chaos_daemon import JUMPS
from tests.faults.chaos_rank import Attach, Ended, Joined, Last, Refused, serve_chaos
from tests.faults.harness import SPEC, wait_for
from tests.model.running_check import RunningCheck

__all__ = ["RANKS", "ChaosGroup", "Tally"]

RANKS = range(SPEC.num_ranks)
ANSWER_S = 60.0
STEP_ROUNDING = 150
"""Steps ahead of the fastest rank at which all are told to end: none has been there when the command comes."""
ROOT = Path(__file__).resolve().parents[2]
forkserver = multiprocessing.get_context("forkserver")


@dataclass
class Tally:
    """What came of a run so far. `violations`: of the model; `wrong`: bytes and outputs; `surprises`: all else."""

    steps: int = 0
    commits: int = 0
    plans: int = 0
    drops: int = 0
    aborts: int = 0
    incarnations: int = 0
    reloaded_layers: int = 0
    refused_joins: int = 0
    trace_events: int = 0
    violations: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class ChaosGroup:
    """A context manager that kills what is left; all times are of this machine's monotonic clock."""

    def __init__(self, group: str, runtime_dir: Path, step_s: float = 0.01) -> None:
        self.group, self.directory, self.tally = group, runtime_dir, Tally()
        self.environ = {
            "EPLB_ASYNC_RUNTIME_DIR": str(runtime_dir),
            **daemon_variables(EAGER),
            "EPLB_ASYNC_DAEMON_WINDOW_STEPS": "10",
            "EPLB_ASYNC_DAEMON_NUM_WINDOWS": "2",
            "EPLB_ASYNC_DAEMON_INTERVAL_STEPS": "25",
            "EPLB_ASYNC_DAEMON_POLL_INTERVAL_S": "0.02",
            "EPLB_ASYNC_DAEMON_DISCOVERY_INTERVAL_S": "0.05",
            "EPLB_ASYNC_DAEMON_PLAN_DEADLINE_S": "20",
            "EPLB_ASYNC_DAEMON_LOG_LEVEL": "WARNING",
            "EPLB_ASYNC_HOOK_COPIES_PER_STEP": "2",
            "EPLB_ASYNC_HOOK_STAGING_ROWS": "2",
            "EPLB_ASYNC_HOOK_PEER_DEADLINE_S": "20",
            "EPLB_ASYNC_HOOK_PLAN_DEADLINE_STEPS": "1000",
            "EPLB_ASYNC_HOOK_ATTACH_DEADLINE_S": "50",
            "CHAOS_STEP_S": str(step_s),
        }
        settings_of = {name: value for name, value in self.environ.items() if name.startswith("EPLB_ASYNC_")}
        self.settings_of, self.settings = settings_of, load_settings(environ=settings_of)
        self.jumps = runtime_dir / "jumps"
        self.jump(0.0, 0.0)
        self.daemon: subprocess.Popen[bytes] | None = None
        self.watcher: BoardWatcher | None = None
        self.processes: list[BaseProcess] = []
        self._commands: list[Connection] = []
        self._answers: list[Connection] = []
        self._ended: dict[int, Ended] = {}
        self._check: RunningCheck
        self._read: list[int] = []
        self.placement_LP: IntArray = initial_placement(SPEC)

    def __enter__(self) -> "ChaosGroup":
        forkserver.set_forkserver_preload(["tests.faults.chaos_rank"])
        for rank in RANKS:
            self._spawn(rank)
        self.join()
        self.start_daemon()
        # its policy is compiled, for all later daemons too
        wait_for(lambda: (status := self.status()) is not None and status.pool["num_idle"], 180, "a policy worker")
        return self

    def __exit__(self, *_: object) -> None:
        if self.watcher is not None:
            self.watcher.close()
            self.watcher = None
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGCONT)
        for process, commands in zip(self.processes, self._commands, strict=True):
            # those that wait for a command end by themselves, and remove their weights
            commands.close()
            process.join(10)
            process.kill()
            process.join()
        self.kill_daemon()

    # -- daemons ------------------------------------------------------------------------------------------------------

    def start_daemon(self, kind: str = "normal") -> None:
        """Start it and wait until it is ready."""
        self.note("restart")  # it may abort before it is ready
        self.daemon = self.spawn_daemon(kind, self.settings_of)

    def spawn_daemon(self, kind: str, environ: dict[str, str], ready: bool = True) -> subprocess.Popen[bytes]:
        """A daemon process, ready if asked for."""
        reader, writer = os.pipe()
        # policies are compiled once for all daemons: else each would take half a minute to plan for the first time
        warm = {"NUMBA_CACHE_DIR": str(policy_cache(ROOT / ".pytest_cache")), **environ}
        command = [sys.executable, "-m", "tests.faults.chaos_daemon", kind, str(self.jumps), str(writer)]
        with (self.directory / "daemon.log").open("ab") as log:
            process = subprocess.Popen(
                command, pass_fds=(writer,), env=child_environment(warm, str(ROOT)), stderr=log, cwd=ROOT
            )
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            if ready and not pipe.read(1):
                self.tally.surprises.append(f"a daemon ({kind}) ended with {process.wait()} before it was ready")
        return process

    def kill_daemon(self) -> None:
        """With -9; nothing if none runs."""
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()
            self.daemon = None
            self.note("crash")

    def status(self) -> Any:
        """Of the daemon, or None if it does not answer."""
        try:
            with ControlClient(self.settings, deadline_s=10.0) as client:
                return client.status()
        except EplbError:
            return None

    def jump(self, monotonic_s: float, unix_s: float) -> None:
        """Set how far the daemon's clocks are ahead."""
        temporary = self.jumps.with_suffix(".new")
        temporary.write_bytes(JUMPS.pack(monotonic_s, unix_s))
        temporary.replace(self.jumps)

    def note(self, event: str) -> None:
        """In the daemon's trace."""
        if self.watcher is not None:
            self.watcher.note(event)

    # -- ranks --------------------------------------------------------------------------------------------------------

    def pid(self, rank: int) -> int:
        """Of its process now."""
        return self.processes[rank].pid or 0

    def send(self, rank: int, command: object) -> None:
        """A command; lost if the process has just died."""
        with contextlib.suppress(BrokenPipeError):
            self._commands[rank].send(command)

    def kill_rank(self, rank: int) -> None:
        """With -9; the others notice, and all join again."""
        self.processes[rank].kill()
        self.processes[rank].join()
        self._finish(lost=rank)
        self._spawn(rank)

    def end_incarnation(self) -> None:
        """All ranks make the same number of steps and detach."""
        assert self.watcher is not None
        last = max(self.watcher.words.member(rank).newest_step for rank in RANKS) + STEP_ROUNDING
        for rank in RANKS:
            self.send(rank, Last(last))
        self._finish(lost=-1)

    def join(self, full: int = -1) -> None:
        """All ranks attach to a new incarnation; `full`: a rank that finds no room in shared memory at first."""
        number = self.tally.incarnations = self.tally.incarnations + 1
        self._paths = [self.directory / f"trace.{number}.{rank}" for rank in RANKS]
        self._read = [0] * len(RANKS)
        for rank in RANKS:
            self.send(rank, Attach(self.placement_LP, str(self._paths[rank]), rank == full))
        for rank in RANKS:
            answer = self._answer(rank)
            while isinstance(answer, Refused):
                self.tally.refused_joins += 1
                answer = self._answer(rank)
            assert isinstance(answer, Joined), answer
            self.tally.reloaded_layers += answer.reloaded
        hook = self.settings.hook
        self._check = RunningCheck(self.placement_LP.tolist(), len(RANKS), hook.lag, hook.staging_rows)
        self.watcher = BoardWatcher(self.group, self.placement_LP)

    def check(self) -> None:
        """Stop all ranks, read what they did, let them go on, and see whether the model allows it."""
        for rank in RANKS:
            os.kill(self.pid(rank), signal.SIGSTOP)
        wait_for(lambda: all(_state(self.pid(rank)) in "TtZX" for rank in RANKS), 20, "ranks to stop")
        traces, daemon = self._cut()
        for rank in RANKS:
            os.kill(self.pid(rank), signal.SIGCONT)
        self._extend(traces, daemon)
        for rank in RANKS:
            # nobody may end by itself between two events
            if self._answers[rank].poll():
                ended = self._answer(rank)
                self._ended[rank] = ended
                self.tally.surprises.append(f"rank {rank} ended by itself: {ended.why}")

    def wait_steps(self, count: int) -> None:
        """Wait until all ranks have gone on by so many steps; a surprise if they do not."""
        assert self.watcher is not None
        words = self.watcher.words
        first = [words.member(rank).newest_step for rank in RANKS]
        try:
            wait_for(lambda: all(words.member(rank).newest_step >= first[rank] + count for rank in RANKS), 40, "steps")
        except TimeoutError:
            now = [words.member(rank).newest_step for rank in RANKS]
            self.tally.surprises.append(f"ranks stand at steps {now}, {count} after {first} were to be made")

    def _cut(self) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
        assert self.watcher is not None
        daemon = self.watcher.take()
        traces = []
        for rank in RANKS:
            with self._paths[rank].open("rb") as file:
                file.seek(self._read[rank])
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read[rank] += len(whole)
            traces.append([json.loads(line) for line in whole.splitlines()])
        return traces, daemon

    def _extend(self, traces: list[list[dict[str, Any]]], daemon: list[dict[str, Any]]) -> None:
        self.tally.trace_events += sum(map(len, traces)) + len(daemon)
        found = self._check.extend(traces, daemon)
        self.tally.violations += [f"incarnation {self.tally.incarnations}: {problem}" for problem in found]

    def _finish(self, lost: int) -> None:
        """Collect the reports of all that live, and compare what they did."""
        for rank in RANKS:
            if rank != lost and rank not in self._ended:
                self._ended[rank] = self._answer(rank)
        traces, daemon = self._cut()
        self._extend(traces, daemon)
        tally, reports = self.tally, list(self._ended.values())
        tally.violations += [f"incarnation {tally.incarnations}: {problem}" for problem in self._check.end()]
        for report in reports:
            tally.wrong += report.wrong
            if report.lost != lost:
                tally.surprises.append(f"rank {report.rank} ended ({report.lost} lost, not {lost}): {report.why}")
        furthest = max(reports, key=lambda report: sum(report.versions))
        if lost < 0 and len({(report.steps, report.versions) for report in reports}) > 1:
            tally.surprises.append("ranks that were told to end did not end alike")
        self.placement_LP = furthest.placement_LP
        tally.steps += furthest.steps
        tally.commits += furthest.commits
        tally.drops += furthest.drops
        assert self.watcher is not None
        tally.plans += self.watcher.num_plans
        tally.aborts += self.watcher.num_aborts
        self.watcher.close()
        self.watcher = None
        self._ended.clear()
        for path in self._paths:
            path.unlink()

    def _spawn(self, rank: int) -> None:
        commands_reader, commands = forkserver.Pipe(duplex=False)
        answers, answers_writer = forkserver.Pipe(duplex=False)
        os.environ["CHAOS_STEP_S"] = self.environ["CHAOS_STEP_S"]
        arguments = (self.group, rank, self.settings_of, commands_reader, answers_writer)
        process = forkserver.Process(target=serve_chaos, args=arguments, daemon=True)
        process.start()
        commands_reader.close()
        answers_writer.close()
        if rank < len(self.processes):
            self.processes[rank], self._commands[rank], self._answers[rank] = process, commands, answers
        else:
            self.processes.append(process)
            self._commands.append(commands)
            self._answers.append(answers)

    def _answer(self, rank: int) -> Any:
        if not self._answers[rank].poll(ANSWER_S):
            raise TimeoutError(f"rank {rank} did not answer")
        return self._answers[rank].recv()

    @property
    def daemon_is_free(self) -> bool:
        """True if no daemon holds the runtime directory."""
        return not daemon_running(self.settings)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"

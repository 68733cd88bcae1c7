"""The hammer: per kind one process that writes at full speed and one that reads at full speed, the writer being killed.

`hammer` runs one kind and returns what its reader saw; `main` is the command. A torn record, plan, word or placement is
a bug, whatever the load of the machine; a run that saw next to nothing proves nothing and fails too.
"""

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from scripts.hammer_kinds import KINDS, Hammer, Tally

__all__ = ["HammerFailed", "Outcome", "hammer", "main"]

POLL_S = 0.005
LEAST_DISTINCT = 10
"""So many different publications a reader must have seen whole for a run to mean something."""
NO_END = 1 << 60


class HammerFailed(Exception):
    """A process ended by itself, or did not end in time."""


@dataclass(frozen=True)
class Outcome:
    """One kind's run.

    Fields:
        kind: its name.
        publications: made by all writers together.
        kills: writers killed and replaced.
        seconds: for all of it, processes included.
        tally: what the reader saw.
    """

    kind: str
    publications: int
    kills: int
    seconds: float
    tally: Tally

    @property
    def passed(self) -> bool:
        """True if nothing was torn and enough was seen."""
        return not self.tally.torn and self.tally.distinct >= LEAST_DISTINCT


def hammer(
    kind: Hammer,
    publications: int,
    kills: int,
    *,
    deadline_s: float = 3600.0,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Write and read one kind at full speed.

    Args:
        kind: what to hammer.
        publications: least number to make.
        kills: how often the writer is killed, at random moments, and replaced.
        deadline_s: for all of it.
        seed: of the moments.
        progress: called now and then with the publications made so far.

    Raises:
        HammerFailed: a process failed, or the deadline passed.
    """
    start = time.monotonic()
    run = _Run(kind, start + deadline_s, progress)
    segment = kind.create()
    try:
        with tempfile.TemporaryDirectory(prefix="hammer-") as folder:
            run.start_reader(os.path.join(folder, "go on"))
            for threshold in sorted(random.Random(seed).randrange(publications) for _ in range(kills)):
                run.write_and_kill(threshold)
            run.write(publications)
            tally = run.stop_reader()
        return Outcome(kind.name, kind.progress(), kills, time.monotonic() - start, tally)
    finally:
        run.end()
        segment.unlink()


class _Run:
    """The processes of one run; all are ended by `end`."""

    def __init__(self, kind: Hammer, end: float, progress: Callable[[int], None]) -> None:
        self._kind, self._end, self._progress = kind, end, progress
        self._context = _context()
        self._processes: list[BaseProcess] = []
        self._stop_path = ""
        self._reader: BaseProcess
        self._tally: Connection

    def start_reader(self, stop_path: str) -> None:
        """Returns once it reads."""
        with open(stop_path, "x", encoding="utf-8"):
            self._stop_path = stop_path
        self._tally, theirs = self._context.Pipe(duplex=False)
        self._reader = self._start(_read, self._kind, stop_path, self._left(), theirs)
        theirs.close()
        self._receive()

    def write_and_kill(self, threshold: int) -> None:
        """A writer without end, killed at the first look at which it has passed the threshold."""
        writer, before = self._start(self._kind.write, NO_END), self._kind.progress()
        while (done := self._kind.progress()) <= max(threshold, before):
            self._progress(done)
            if wait([writer.sentinel], POLL_S):
                raise HammerFailed(f"a writer of {self._kind.name} ended by itself (exit code {writer.exitcode})")
            self._left()
        writer.kill()
        writer.join()

    def write(self, target: int) -> None:
        """A writer that ends when there are `target` publications."""
        writer = self._start(self._kind.write, target)
        while not wait([writer.sentinel], POLL_S):
            self._progress(self._kind.progress())
            self._left()
        writer.join()
        if writer.exitcode:
            raise HammerFailed(f"a writer of {self._kind.name} failed (exit code {writer.exitcode})")

    def stop_reader(self) -> Tally:
        """Returns what it saw."""
        os.unlink(self._stop_path)
        tally = self._receive()
        self._reader.join()
        if not isinstance(tally, Tally):
            raise HammerFailed(f"the reader of {self._kind.name} sent {tally!r}")
        return tally

    def end(self) -> None:
        """Kill and reap whatever still runs."""
        for process in self._processes:
            process.kill()
            process.join()

    def _start(self, target: Callable[..., None], *args: object) -> BaseProcess:
        process: BaseProcess = self._context.Process(target=target, args=args, daemon=True)  # type: ignore[attr-defined]
        self._processes.append(process)
        process.start()
        return process

    def _receive(self) -> object:
        if not self._tally.poll(self._left()):
            raise HammerFailed(f"the reader of {self._kind.name} was silent until the deadline")
        try:
            return self._tally.recv()
        except EOFError as error:
            raise HammerFailed(f"the reader of {self._kind.name} died") from error

    def _left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise HammerFailed(f"hammering {self._kind.name} did not end in time")
        return left


def _context() -> BaseContext:
    """Processes forked from one that has loaded everything once, and nothing of ours."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripts.hammer_kinds", "llvmlite.binding"])
    return context


def _read(kind: Hammer, stop_path: str, deadline_s: float, result: Connection) -> None:
    result.send("reading")
    result.send(kind.read(stop_path, deadline_s))


def run_command(  # size: the parameters are the command's options
    publications: Annotated[int, typer.Option(min=1000, help="In all, an equal share for each kind.")] = 10_000_000,
    kinds: Annotated[str, typer.Option(help="Which kinds, with commas between.")] = ",".join(KINDS),
    kills: Annotated[int, typer.Option(min=0, help="Writers killed and replaced, for each kind.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the moments at which writers are killed.")] = 0,
    deadline_s: Annotated[float, typer.Option(min=1, help="For each kind.")] = 3600.0,
    group: Annotated[str, typer.Option(help="Start of the segments' group names.")] = f"hammer-{os.getpid()}",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Write and read rings, boards, words and live placements from separate processes, and look for torn reads.

    Exits with 1 if anything was torn, if a reader saw next to nothing, or if a process failed.
    """
    names = [name.strip() for name in kinds.split(",")]
    for name in names:
        if name not in KINDS:
            raise typer.BadParameter(f"unknown kind {name!r}; known: {', '.join(KINDS)}", param_hint="--kinds")
    share = publications // len(names)
    outcomes = []
    columns = TextColumn("{task.description:6}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        for name in names:
            bar = bars.add_task(name, total=share)
            kind = KINDS[name](f"{group}-{name}")

            def show(done: int, bar: object = bar) -> None:
                bars.update(bar, completed=min(done, share))  # type: ignore[arg-type]

            try:
                outcomes.append(hammer(kind, share, kills, deadline_s=deadline_s, seed=seed, progress=show))
            except HammerFailed as error:
                print(error, file=sys.stderr)
                raise typer.Exit(1) from error
    _report(outcomes, as_json)
    if not all(outcome.passed for outcome in outcomes):
        raise typer.Exit(1)


def _report(outcomes: list[Outcome], as_json: bool) -> None:
    torn = sum(outcome.tally.torn for outcome in outcomes)
    total = sum(outcome.publications for outcome in outcomes)
    if as_json:
        rows = [{**asdict(outcome), "passed": outcome.passed} for outcome in outcomes]
        print(json.dumps({"publications": total, "torn": torn, "kinds": rows}))
        return
    table = Table("kind", "publications", "kills", "seconds", "reads", "whole", "distinct", "nothing", "lost", "torn")
    for outcome in outcomes:
        tally = outcome.tally
        numbers = [outcome.publications, outcome.kills, round(outcome.seconds, 1), tally.reads, tally.whole]
        numbers += [tally.distinct, tally.nothing, tally.lost, tally.torn]
        table.add_row(outcome.kind, *(f"{number:,}" for number in numbers))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for outcome in outcomes:
        if not outcome.passed:
            print(f"{outcome.kind}: {outcome.tally.example or 'the reader saw next to nothing'}")
    print(f"{total:,} publications, {torn} torn")


def main() -> None:
    """The command."""
    typer.run(run_command)

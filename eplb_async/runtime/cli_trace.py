"""What the commands that replay a trace share: their options, the costs of the cost model, a progress bar."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from eplb_async.runtime.replay import ReplayCosts

__all__ = [
    "Bandwidth",
    "DecideUs",
    "Every",
    "FixedUs",
    "MibUs",
    "Seed",
    "SlotBytes",
    "StallUs",
    "StepsPerWindow",
    "TokenUs",
    "TokensPerStep",
    "Trace",
    "costs_of",
    "progress_bar",
    "report_console",
]

Trace = Annotated[str, typer.Argument(metavar="TRACE", help="As for 'plan': tokens per expert, [T, L, E].")]
SlotBytes = Annotated[int, typer.Option(metavar="BYTES", min=1, help="Weights of one expert in one layer.")]
StepsPerWindow = Annotated[
    int, typer.Option(metavar="STEPS", min=1, help="Steps that each recorded window is stretched over.")
]
TokensPerStep = Annotated[
    int, typer.Option(metavar="N", min=0, help="Load of a layer in a step (tokens x top-k); 0: as each window's.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the samples that a step is.")]
Every = Annotated[
    int, typer.Option(metavar="N", min=0, help="Measure one step in N; 0: as many as takes a minute or so.")
]
TokenUs = Annotated[float, typer.Option(min=0, help="Time per token of a layer's busiest rank.")]
FixedUs = Annotated[float, typer.Option(min=0, help="Time of a step beside that.")]
Bandwidth = Annotated[float, typer.Option(metavar="GB/s", min=1e-6, help="That one rank receives.")]
StallUs = Annotated[float, typer.Option(min=0, help="By which a commit holds a step up.")]
MibUs = Annotated[float, typer.Option(min=0, help="By which each MiB pulled makes its step longer.")]
DecideUs = Annotated[float, typer.Option(min=0, help="From a trigger to the plan.")]


def costs_of(
    token_us: float, fixed_us: float, bandwidth: float, stall_us: float, decide_us: float, mib_us: float = 0.0
) -> "ReplayCosts":
    """The cost model; `bandwidth` in GB/s."""
    from eplb_async.runtime.replay import ReplayCosts

    return ReplayCosts(
        token_us=token_us,
        fixed_us=fixed_us,
        bytes_per_us=1000 * bandwidth,
        stall_us=stall_us,
        decide_us=decide_us,
        mib_us=mib_us,
    )


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, told of (what, steps done, of all); nothing where that is no terminal. What is printed goes there, too."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        with contextlib.redirect_stdout(sys.stderr):
            yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def report_console() -> Console:
    """For tables on standard output: wide where that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 150, highlight=False)

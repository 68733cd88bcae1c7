"""The command `replay`: recorded loads through the daemon's own decisions, several configurations side by side. Registered by cli.py."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["REPLAY_EPILOG", "replay"]

REPLAY_EPILOG = (
    "Example: [bold]eplb-async replay trace.npz --ranks 32 --slots 288 --slot-bytes 37748736 --steps-per-window 600 "
    "--tokens-per-step 32768 --preset vllm --preset ours --config mine.toml --plot replay.png[/]. "
    "PAR is max / mean rank load of a layer on each step's own load, mean over layers. Times are of the cost model: "
    "docs/planning.md."
)


def replay(  # size: options of a command
    loads: Annotated[str, typer.Argument(metavar="TRACE", help="As for 'plan': tokens per expert, [T, L, E].")],
    ranks: Annotated[int, typer.Option(metavar="R", min=1, max=1 << 20, help="Expert-parallel ranks.")],
    slots: Annotated[int, typer.Option(metavar="P", min=1, max=1 << 20, help="Slots of all ranks; R divides P.")],
    slot_bytes: Annotated[int, typer.Option(metavar="BYTES", min=1, help="Weights of one expert in one layer.")] = 1
    << 24,
    config: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Settings (TOML), named by the stem. May be given again.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="vllm, ours or still (moves nothing). May be given again.")
    ] = None,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Nodes; N divides R.")] = 1,
    groups: Annotated[int, typer.Option(metavar="G", min=1, help="The router's expert groups; G divides E.")] = 1,
    steps_per_window: Annotated[
        int, typer.Option(metavar="STEPS", min=1, help="Steps that each recorded window is stretched over.")
    ] = 1,
    tokens_per_step: Annotated[
        int, typer.Option(metavar="N", min=0, help="Load of a layer in a step (tokens x top-k); 0: as each window's.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples that a step is.")] = 0,
    every: Annotated[
        int, typer.Option(metavar="N", min=0, help="Measure one step in N; 0: as many as takes a minute or so.")
    ] = 0,
    token_us: Annotated[float, typer.Option(min=0, help="Time per token of a layer's busiest rank.")] = 0.06,
    fixed_us: Annotated[float, typer.Option(min=0, help="Time of a step beside that.")] = 10_000.0,
    bandwidth: Annotated[float, typer.Option(metavar="GB/s", min=1e-6, help="That one rank receives.")] = 50.0,
    stall_us: Annotated[float, typer.Option(min=0, help="By which a commit holds a step up.")] = 50.0,
    decide_us: Annotated[float, typer.Option(min=0, help="From a trigger to the plan.")] = 50_000.0,
    plot: Annotated[Path | None, typer.Option(help="Also draw PAR over the steps (needs matplotlib).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Replay a trace through the daemon's decisions: balance, bytes, stalls and time of each configuration."""
    from eplb_async.runtime.cli_plan import keep_compiled, single_threaded

    single_threaded()
    from eplb_async.observability.replay_plot import draw_replay
    from eplb_async.observability.replay_report import replay_tables
    from eplb_async.runtime.offline import Shape
    from eplb_async.runtime.replay import ReplayCosts
    from eplb_async.runtime.replay_presets import configurations
    from eplb_async.runtime.replay_request import ReplayRequest, replay_trace

    keep_compiled()
    request = ReplayRequest(
        loads=loads,
        configurations=configurations(config or [], preset or []),
        shape=Shape(num_slots=slots, num_ranks=ranks, num_nodes=nodes, num_expert_groups=groups),
        slot_bytes=slot_bytes,
        costs=ReplayCosts(
            token_us=token_us,
            fixed_us=fixed_us,
            bytes_per_us=1000 * bandwidth,
            stall_us=stall_us,
            decide_us=decide_us,
        ),
        steps_per_window=steps_per_window,
        tokens_per_step=tokens_per_step,
        seed=seed,
        every=every,
    )
    with _progress() as progress, contextlib.redirect_stdout(sys.stderr):
        reports = replay_trace(request, progress)
    if as_json:
        import msgspec

        print(msgspec.json.encode({"replay": reports}).decode())
    else:
        Console(width=None if sys.stdout.isatty() else 150, highlight=False).print(replay_tables(reports))
    if plot is not None:
        print(draw_replay(reports, plot), file=sys.stderr)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, told of (steps done, of all); nothing where that is no terminal."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("steps", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

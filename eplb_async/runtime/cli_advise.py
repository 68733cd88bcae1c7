"""The command `advise`: what to run on this traffic and hardware, or that rebalancing does not pay. Registered by cli.py."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["ADVISE_EPILOG", "advise"]

ADVISE_EPILOG = (
    "Example: [bold]eplb-async advise trace.npz --ranks 32 --slot-bytes 37748736 --steps-per-window 600 "
    "--tokens-per-step 32768 --token-us 0.06 --fixed-us 10000 --bandwidth 50[/]. "
    "Times are of the replay's cost model: give it your own step times (docs/planning.md)."
)


def advise(  # size: options of a command
    loads: Annotated[str, typer.Argument(metavar="TRACE", help="As for 'plan': tokens per expert, [T, L, E].")],
    ranks: Annotated[int, typer.Option(metavar="R", min=1, max=1 << 20, help="Expert-parallel ranks.")],
    slot_bytes: Annotated[int, typer.Option(metavar="BYTES", min=1, help="Weights of one expert in one layer.")],
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Nodes; N divides R.")] = 1,
    groups: Annotated[int, typer.Option(metavar="G", min=1, help="The router's expert groups; G divides E.")] = 1,
    most_redundant: Annotated[
        int, typer.Option(metavar="N", min=0, help="Most redundant experts to try; 0: a quarter of the experts.")
    ] = 0,
    least_saving: Annotated[
        float, typer.Option(metavar="SHARE", min=0, max=1, help="Share of the time that it has to save.")
    ] = 0.01,
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
    slot_us: Annotated[
        float, typer.Option(min=0, help="Time that each slot of a rank adds to a layer: its weights are read.")
    ] = 0.0,
    fixed_us: Annotated[float, typer.Option(min=0, help="Time of a step beside these.")] = 10_000.0,
    bandwidth: Annotated[float, typer.Option(metavar="GB/s", min=1e-6, help="That one rank receives.")] = 50.0,
    stall_us: Annotated[float, typer.Option(min=0, help="By which a commit holds a step up.")] = 50.0,
    decide_us: Annotated[float, typer.Option(min=0, help="From a trigger to the plan.")] = 50_000.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Advise redundancy, policy, interval and budget for recorded traffic, or not to rebalance at all."""
    from eplb_async.runtime.cli_plan import keep_compiled, single_threaded

    single_threaded()
    from eplb_async.observability.advice import advice_shown
    from eplb_async.runtime.advise import AdviceRequest
    from eplb_async.runtime.advise import advise as advised
    from eplb_async.runtime.replay import ReplayCosts

    keep_compiled()
    request = AdviceRequest(
        loads=loads,
        num_ranks=ranks,
        slot_bytes=slot_bytes,
        num_nodes=nodes,
        num_expert_groups=groups,
        costs=ReplayCosts(
            token_us=token_us,
            fixed_us=fixed_us,
            bytes_per_us=1000 * bandwidth,
            stall_us=stall_us,
            decide_us=decide_us,
        ),
        slot_us=slot_us,
        most_redundant=most_redundant,
        least_saving=least_saving,
        steps_per_window=steps_per_window,
        tokens_per_step=tokens_per_step,
        seed=seed,
        every=every,
    )
    with _progress() as progress, contextlib.redirect_stdout(sys.stderr):
        advice = advised(request, progress)
    if as_json:
        import msgspec

        print(msgspec.json.encode(advice).decode())
    else:
        Console(width=None if sys.stdout.isatty() else 150, highlight=False).print(advice_shown(advice))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error; nothing where that is no terminal."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)

"""The command `eplb-async` (also `python -m eplb_async`): the daemon's commands, and the demo, which needs a model too.

The demo is added here because it uses both the rank's side and the daemon's, which nothing below this module may do.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from eplb_async.runtime.cli import app, main

__all__ = ["demo"]


@app.command(
    epilog="Example: [bold]eplb-async demo --json > demo.json[/]. It checks itself: status 1 if any output differs."
)
def demo(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end instead of tables.")
    ] = False,
    ranks: Annotated[int, typer.Option(min=1, max=16, help="Rank processes.")] = 4,
    steps_per_domain: Annotated[
        int, typer.Option(min=4, max=1000, help="Steps before the text's language changes; there are eight.")
    ] = 24,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights of eplb_async.demo.train instead of the shipped ones.")
    ] = None,
) -> None:
    """Serve a small MoE model with expert parallelism, rebalance it live, and prove that its outputs stay the same."""
    import msgspec
    from rich.console import Console

    from eplb_async.demo.main import DemoOptions, run
    from eplb_async.demo.report import show

    console = Console(stderr=as_json)
    summary = run(DemoOptions(num_ranks=ranks, steps_per_domain=steps_per_domain, weights=weights), console)
    if as_json:
        print(msgspec.json.encode(summary).decode())
    else:
        show(summary, Console(width=None if sys.stdout.isatty() else 190))
    raise typer.Exit(0 if summary.outputs_equal else 1)


if __name__ == "__main__":
    main()

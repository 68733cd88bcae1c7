"""The command `replay`: recorded loads through the daemon's own decisions, several configurations side by side. Registered by cli.py."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from eplb_async.runtime import cli_plan, cli_trace

__all__ = ["REPLAY_EPILOG", "replay"]

REPLAY_EPILOG = (
    "Example: [bold]eplb-async replay trace.npz --ranks 32 --slots 288 --slot-bytes 37748736 --steps-per-window 600 "
    "--tokens-per-step 32768 --preset vllm --preset ours --config mine.toml --plot replay.png[/]. "
    "PAR is max / mean rank load of a layer on each step's own load, mean over layers. Times are of the cost model: "
    "docs/planning.md."
)


def replay(  # size: options of a command
    loads: cli_trace.Trace,
    ranks: cli_plan.Ranks,
    slots: Annotated[int, typer.Option(metavar="P", min=1, max=1 << 20, help="Slots of all ranks; R divides P.")],
    slot_bytes: cli_trace.SlotBytes = 1 << 24,
    config: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Settings (TOML), named by the stem. May be given again.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="vllm, ours or still (moves nothing). May be given again.")
    ] = None,
    nodes: cli_plan.Nodes = 1,
    groups: cli_plan.Groups = 1,
    steps_per_window: cli_trace.StepsPerWindow = 1,
    tokens_per_step: cli_trace.TokensPerStep = 0,
    seed: cli_trace.Seed = 0,
    every: cli_trace.Every = 0,
    token_us: cli_trace.TokenUs = 0.06,
    fixed_us: cli_trace.FixedUs = 10_000.0,
    bandwidth: cli_trace.Bandwidth = 50.0,
    stall_us: cli_trace.StallUs = 50.0,
    decide_us: cli_trace.DecideUs = 50_000.0,
    mib_us: cli_trace.MibUs = 0.0,
    plot: Annotated[Path | None, typer.Option(help="Also draw PAR over the steps (needs matplotlib).")] = None,
    as_json: cli_plan.AsJson = False,
) -> None:
    """Replay a trace through the daemon's decisions: balance, bytes, stalls and time of each configuration."""
    cli_plan.single_threaded()
    from eplb_async.observability.replay_plot import draw_replay
    from eplb_async.observability.replay_report import replay_tables
    from eplb_async.runtime.offline import Shape
    from eplb_async.runtime.replay_presets import configurations
    from eplb_async.runtime.replay_request import ReplayRequest, replay_trace

    cli_plan.keep_compiled()
    request = ReplayRequest(
        loads=loads,
        configurations=configurations(config or [], preset or []),
        shape=Shape(num_slots=slots, num_ranks=ranks, num_nodes=nodes, num_expert_groups=groups),
        slot_bytes=slot_bytes,
        costs=cli_trace.costs_of(token_us, fixed_us, bandwidth, stall_us, decide_us, mib_us),
        steps_per_window=steps_per_window,
        tokens_per_step=tokens_per_step,
        seed=seed,
        every=every,
    )
    with cli_trace.progress_bar() as progress:
        reports = replay_trace(request, lambda done, total: progress("steps", done, total))
    if as_json:
        import msgspec

        print(msgspec.json.encode({"replay": reports}).decode())
    else:
        cli_trace.report_console().print(replay_tables(reports))
    if plot is not None:
        print(draw_replay(reports, plot), file=sys.stderr)

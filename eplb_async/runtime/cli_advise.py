"""The command `advise`: what to run on this traffic and hardware, or that rebalancing does not pay. Registered by cli.py."""

from typing import Annotated

import typer

from eplb_async.runtime import cli_plan, cli_trace

__all__ = ["ADVISE_EPILOG", "advise"]

ADVISE_EPILOG = (
    "Example: [bold]eplb-async advise trace.npz --ranks 32 --slot-bytes 37748736 --steps-per-window 600 "
    "--tokens-per-step 32768 --token-us 0.06 --fixed-us 10000 --bandwidth 50[/]. "
    "Times are of the replay's cost model: give it your own step times (docs/planning.md)."
)


def advise(  # size: options of a command
    loads: cli_trace.Trace,
    ranks: cli_plan.Ranks,
    slot_bytes: cli_trace.SlotBytes,
    nodes: cli_plan.Nodes = 1,
    groups: cli_plan.Groups = 1,
    most_redundant: Annotated[
        int, typer.Option(metavar="N", min=0, help="Most redundant experts to try; 0: a quarter of the experts.")
    ] = 0,
    least_saving: Annotated[
        float, typer.Option(metavar="SHARE", min=0, max=1, help="Share of the time that it has to save.")
    ] = 0.01,
    steps_per_window: cli_trace.StepsPerWindow = 1,
    tokens_per_step: cli_trace.TokensPerStep = 0,
    seed: cli_trace.Seed = 0,
    every: cli_trace.Every = 0,
    token_us: cli_trace.TokenUs = 0.06,
    slot_us: Annotated[
        float, typer.Option(min=0, help="Time that each slot of a rank adds to a layer: its weights are read.")
    ] = 0.0,
    fixed_us: cli_trace.FixedUs = 10_000.0,
    bandwidth: cli_trace.Bandwidth = 50.0,
    stall_us: cli_trace.StallUs = 50.0,
    decide_us: cli_trace.DecideUs = 50_000.0,
    as_json: cli_plan.AsJson = False,
) -> None:
    """Advise redundancy, policy, interval and budget for recorded traffic, or not to rebalance at all."""
    cli_plan.single_threaded()
    from eplb_async.observability.advice import advice_shown
    from eplb_async.runtime.advise import AdviceRequest
    from eplb_async.runtime.advise import advise as advised

    cli_plan.keep_compiled()
    request = AdviceRequest(
        loads=loads,
        num_ranks=ranks,
        slot_bytes=slot_bytes,
        num_nodes=nodes,
        num_expert_groups=groups,
        costs=cli_trace.costs_of(token_us, fixed_us, bandwidth, stall_us, decide_us),
        slot_us=slot_us,
        most_redundant=most_redundant,
        least_saving=least_saving,
        steps_per_window=steps_per_window,
        tokens_per_step=tokens_per_step,
        seed=seed,
        every=every,
    )
    with cli_trace.progress_bar() as progress:
        advice = advised(request, progress)
    if as_json:
        import msgspec

        print(msgspec.json.encode(advice).decode())
    else:
        cli_trace.report_console().print(advice_shown(advice))

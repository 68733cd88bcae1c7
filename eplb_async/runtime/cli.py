"""The command `eplb-async`: one function per command; what they print is in cli_show.py.

Errors of the user's are one line on standard error and status 1, wrong usage is status 2. Nothing heavy is imported
before a command needs it, so that help is quick.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from eplb_async.core.config import Settings, load_settings
from eplb_async.core.errors import EplbError
from eplb_async.runtime import cli_advise, cli_plan, cli_replay, cli_show

__all__ = ["app", "gc", "history", "main", "pause", "rebalance", "resume", "serve", "status"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Expert-parallel load balancing for Mixture-of-Experts inference, without stopping it.",
    epilog="Settings: a TOML file (EPLB_ASYNC_CONFIG) and variables EPLB_ASYNC_*; see 'eplb-async serve --help'.",
)

RuntimeDir = Annotated[
    Path | None, typer.Option("--runtime-dir", metavar="DIR", help="Directory of the daemon's socket and locks.")
]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings file (TOML).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Group = Annotated[str, typer.Argument(metavar="[GROUP]", help="Name of the group; may be left out where one runs.")]


def main() -> None:
    """Run the command line."""
    try:
        app()
    except EplbError as error:
        cli_show.fail(" ".join(str(error).splitlines()))
    except KeyboardInterrupt:
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from eplb_async import __version__

        print(f"eplb-async {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise typer.Exit(2)


@app.command(
    epilog="Example: [bold]eplb-async serve --config /etc/eplb_async.toml[/]. "
    "SIGTERM stops it in order, SIGHUP reads the settings again. Ranks keep serving without a daemon."
)
def serve(
    config: Config = None,
    runtime_dir: RuntimeDir = None,
    exit_when_idle: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Stop after so long without a group; 0: never.")
    ] = None,
    ready_fd: Annotated[
        int | None, typer.Option(metavar="FD", min=3, help="Write one byte to this descriptor once ready.")
    ] = None,
) -> None:
    """Run the daemon of this node in the foreground."""
    from eplb_async.policies.registry import check_choice
    from eplb_async.runtime.serve import run_daemon

    def read() -> Settings:
        settings = _settings(config, runtime_dir, exit_when_idle)
        check_choice(settings.daemon.policy, settings.daemon.policy_options)
        return settings

    run_daemon(read, ready_fd)


@app.command(
    epilog="Examples: [bold]eplb-async status --watch[/], [bold]eplb-async status --json | jq '.groups[].par_live'[/]"
)
def status(
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, once a second, until Ctrl-C.")] = False,
    config: Config = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Show the daemon, its groups and ranks, live PAR, the active plan and the last decisions."""
    from eplb_async.runtime.client import ControlClient

    with ControlClient(_settings(config, runtime_dir)) as client:
        if watch and not as_json:
            cli_show.watch_status(client.status)
            return
        while True:
            found = client.status()
            _print_json(found) if as_json else cli_show.show_status(found)
            if not watch:
                return
            time.sleep(1)


@app.command(epilog="Example: [bold]eplb-async history --json | jq '.[\"deepseek-v3\"][-1]'[/]")
def history(
    group: Group = "",
    as_json: AsJson = False,
    most: Annotated[int, typer.Option("--most", "-n", min=1, help="Newest decisions to show.")] = 32,
    config: Config = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Show what was decided, why, and what came of it."""
    from eplb_async.runtime.client import ControlClient

    with ControlClient(_settings(config, runtime_dir)) as client:
        found = client.history(group, most)
    _print_json(found) if as_json else cli_show.show_history(found)


@app.command(
    epilog="Examples: [bold]eplb-async rebalance[/], [bold]eplb-async rebalance deepseek-v3 --dry-run --json[/]"
)
def rebalance(  # size: options of a command
    group: Group = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and predict, but move nothing.")] = False,
    as_json: AsJson = False,
    deadline: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Longest wait for the outcome.")] = 300.0,
    config: Config = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Decide now, wait, and tell what came of it, or why nothing moves. Status 1 if it failed."""
    from eplb_async.observability.history import Outcome
    from eplb_async.runtime.client import ControlClient

    with ControlClient(_settings(config, runtime_dir)) as client:
        decision = client.rebalance(group, dry_run=dry_run, deadline_s=deadline)
    _print_json(decision) if as_json else cli_show.show_decision(decision)
    if decision.outcome in (Outcome.FAILED, Outcome.DROPPED, Outcome.UNKNOWN):
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]eplb-async pause deepseek-v3[/]. An active plan goes on; 'rebalance' still works.")
def pause(group: Group = "", config: Config = None, runtime_dir: RuntimeDir = None) -> None:
    """Stop decisions of the daemon's own, for one group or all."""
    from eplb_async.runtime.client import ControlClient

    with ControlClient(_settings(config, runtime_dir)) as client:
        print(f"paused: {', '.join(client.pause(group)) or 'no groups'}")


@app.command(epilog="Example: [bold]eplb-async resume deepseek-v3[/]")
def resume(group: Group = "", config: Config = None, runtime_dir: RuntimeDir = None) -> None:
    """Undo 'pause'."""
    from eplb_async.runtime.client import ControlClient

    with ControlClient(_settings(config, runtime_dir)) as client:
        print(f"resumed: {', '.join(client.resume(group)) or 'no groups'}")


@app.command(
    epilog="Example: [bold]eplb-async gc --dry-run[/]. Nothing that a living process may still use is removed."
)
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show, but remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove shared memory whose owners are gone."""
    from eplb_async.shm.gc import collect_garbage, stale_segments

    found = stale_segments() if dry_run else collect_garbage()
    if as_json:
        _print_json({"removed": not dry_run, "segments": [segment._asdict() for segment in found]})
    else:
        cli_show.show_garbage(found, dry_run=dry_run)


app.command(epilog=cli_plan.PLAN_EPILOG)(cli_plan.plan)
app.command(epilog=cli_plan.POLICIES_EPILOG)(cli_plan.policies)
app.command(epilog=cli_replay.REPLAY_EPILOG)(cli_replay.replay)
app.command(epilog=cli_advise.ADVISE_EPILOG)(cli_advise.advise)


def _settings(config: Path | None, runtime_dir: Path | None, exit_when_idle: float | None = None) -> Settings:
    """The settings with what the command line says over them.

    Raises:
        ConfigError: see load_settings.
    """
    import msgspec

    settings = load_settings(config)
    if runtime_dir is not None:
        settings = msgspec.structs.replace(settings, runtime_dir=str(runtime_dir.absolute()))
    if exit_when_idle is not None:
        changed = msgspec.structs.replace(settings.daemon, exit_when_idle_s=exit_when_idle)
        settings = msgspec.structs.replace(settings, daemon=changed)
    return settings


def _print_json(value: Any) -> None:
    import msgspec

    print(json.dumps(msgspec.to_builtins(value), allow_nan=False))

"""The commands `plan` and `policies`: planning from recorded loads, without a daemon and without torch.

Registered by cli.py. Nothing heavy is imported before a command runs; what is printed for people is in
observability/plan_report.py and, for policies, here.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eplb_async.core.config import load_settings, policy_cache
from eplb_async.core.errors import EplbError

if TYPE_CHECKING:
    from eplb_async.runtime.offline import Span
    from eplb_async.runtime.policy_list import OptionInfo, PolicyInfo

__all__ = ["PLAN_EPILOG", "POLICIES_EPILOG", "keep_compiled", "plan", "policies", "single_threaded"]

PLAN_EPILOG = (
    "Examples: [bold]eplb-async plan trace.npz --ranks 32 --slots 288 --out map.json[/], then from there "
    "[bold]eplb-async plan trace.npz --ranks 32 --slots 288 --current map.json --windows -8: --json[/]; "
    "[bold]echo '[[9, 2, 1, 4]]' | eplb-async plan - --policy random --option seed=7 --ranks 2 --slots 6[/]. "
    "PAR is max / mean rank load of a layer, weighted over windows by their tokens. Loads, bound and balancedness are of "
    "the sum of the windows, in tokens; the gap is the busiest rank's load / bound - 1."
)
POLICIES_EPILOG = (
    "Examples: [bold]eplb-async policies[/], [bold]eplb-async policies --json | jq -r '.policies[].name'[/]"
)

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_MOST_SLOTS = 1 << 20
"""More than any machine has; a slip of the finger should not fill the memory."""

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Ranks = Annotated[int, typer.Option(metavar="R", min=1, max=_MOST_SLOTS, help="Expert-parallel ranks.")]
Nodes = Annotated[int, typer.Option(metavar="N", min=1, help="Nodes; N divides R.")]
Groups = Annotated[int, typer.Option(metavar="G", min=1, help="The router's expert groups; G divides E.")]


def plan(  # size: options of a command
    loads: Annotated[
        str,
        typer.Argument(
            metavar="LOADS",
            help="Tokens per expert: .npz with an array 'counts', .npy, or JSON, of shape [E], [L, E] or [T, L, E] "
            "(windows, layers, experts). '-' reads standard input.",
        ),
    ],
    ranks: Ranks,
    slots: Annotated[
        int, typer.Option(metavar="P", min=1, max=_MOST_SLOTS, help="Slots of all ranks; R divides P, P >= E.")
    ],
    policy: Annotated[str, typer.Option(metavar="NAME", help="See 'eplb-async policies'.")] = "default",
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="As 'eplb-async policies' lists them; JSON, else text. May be given again."
        ),
    ] = None,
    nodes: Nodes = 1,
    groups: Groups = 1,
    table_length: Annotated[
        int, typer.Option(metavar="K", min=0, help="Most slots of one expert in a layer; 0: enough for all ranks.")
    ] = 0,
    windows: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Plan on windows A up to B - 1; negative: from the end. Else all."),
    ] = None,
    following: Annotated[
        str | None,
        typer.Option(
            "--next",
            metavar="C:D",
            help="Windows to score on as well. Else as many as were planned on, right after them.",
        ),
    ] = None,
    current: Annotated[
        Path | None,
        typer.Option(metavar="MAP", help="Live placement: .json ([L][P] or [P]) or .npy. Else the initial one."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="MAP", help="Write the new placement: .json or .npy, for --current or 'static'."),
    ] = None,
    slot_bytes: Annotated[
        int | None, typer.Option(metavar="BYTES", min=1, help="Weights of one expert in one layer: tells the transfer.")
    ] = None,
    repeat: Annotated[
        int, typer.Option(metavar="TIMES", min=1, help="Plans that are timed, warm; ms is their median.")
    ] = 3,
    as_json: AsJson = False,
) -> None:
    """Plan from recorded loads with any policy: balance before and after, bound and gap, moves, milliseconds."""
    options = _options(option or [])
    spans = _span("--windows", windows), _span("--next", following)
    single_threaded()
    from eplb_async.observability.plan_report import plan_tables
    from eplb_async.runtime.offline import OfflineRequest, Shape, plan_offline

    request = OfflineRequest(
        loads=loads,
        policy=policy,
        options=options,
        shape=Shape(
            num_slots=slots, num_ranks=ranks, num_nodes=nodes, num_expert_groups=groups, table_length=table_length
        ),
        windows=spans[0],
        next_windows=spans[1],
        current=current,
        out=out,
        slot_bytes=slot_bytes,
        repeats=repeat,
    )
    keep_compiled()
    # whatever a policy prints must not get between the lines of JSON
    with _progress() as status, contextlib.redirect_stdout(sys.stderr):
        report = plan_offline(request, status.update)
    if as_json:
        _print_json(report)
    else:
        Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(plan_tables(report))


def policies(as_json: AsJson = False) -> None:
    """List the policies, their options, and where third parties' come from."""
    from eplb_async.runtime.policy_list import list_policies, options_of_every_policy

    with contextlib.redirect_stdout(sys.stderr):
        found = list_policies()
    if as_json:
        _print_json({"policies": found, "options_of_every_policy": options_of_every_policy()})
    else:
        _show_policies(found, options_of_every_policy())


def _options(settings: Sequence[str]) -> dict[str, object]:
    """`key=value` texts as a policy's options: a value is JSON if it can be read as such, else the text itself.

    ["seed=7", "path=map.json"]: {"seed": 7, "path": "map.json"}.

    Raises:
        typer.BadParameter: no '=', no key, or a key given twice.
    """
    import msgspec

    options: dict[str, object] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{setting!r} is not KEY=VALUE", param_hint="--option")
        if key in options:
            raise typer.BadParameter(f"{key!r} is given twice", param_hint="--option")
        try:
            options[key] = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeEncodeError):
            options[key] = text
    return options


def _span(name: str, text: str | None) -> "Span | None":
    """Both ends of A:B: "3:8" as (3, 8), "-4:" as (-4, None); None for None.

    Raises:
        typer.BadParameter: it is not A:B.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(-?\d{1,18})?:(-?\d{1,18})?", text)
    if not found:
        raise typer.BadParameter(
            f"{text!r} is not A:B, two window numbers of which either may be left out", param_hint=name
        )
    first, last = (None if number is None else int(number) for number in found.groups())
    return first, last


def single_threaded() -> None:
    """One thread for numerics, as in the daemon's workers, so that the milliseconds are those of one core.

    Libraries read these when they are imported, so this comes before numpy.
    """
    for name in _THREADS:
        os.environ.setdefault(name, "1")


def keep_compiled() -> None:
    """Compiled policies are kept where the daemon keeps them, so that only the first plan on a host waits for numba."""
    from eplb_async.shm.segment import prepare_runtime_dir

    directory = load_settings().directory
    cache = policy_cache(directory)
    try:
        if cache.parent == directory:
            # code is loaded from there: never from a folder that others may write to
            prepare_runtime_dir(directory)
    except EplbError:
        return  # planning needs no such folder; it then compiles each time
    os.environ["NUMBA_CACHE_DIR"] = str(cache)


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A spinner on standard error with what is being done; nothing where that is no terminal."""
    with Console(stderr=True).status("starting") as status:
        yield status


def _print_json(value: Any) -> None:
    import msgspec

    # not the json module: a policy's option may be infinite, which msgspec writes as null
    print(msgspec.json.encode(value).decode())


def _show_policies(found: "Sequence[PolicyInfo]", every: "Sequence[OptionInfo]") -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for info in found:
        console.print(f"[bold]{escape(info.name)}[/] [dim]{escape(info.source)}[/]")
        console.print(f"  [red]{escape(info.problem)}[/]" if info.problem else f"  {escape(info.summary)}")
        _show_options(console, info.options)
    console.print("[dim]options of every policy[/]")
    _show_options(console, every)


def _show_options(console: Console, options: "Sequence[OptionInfo]") -> None:
    table = Table.grid(padding=(0, 2))
    for option in options:
        value = json.dumps(option.default)
        table.add_row(f"    [cyan]{option.name}[/]", escape(option.type), escape(value), escape(option.doc))
    if options:
        console.print(table)

"""What a balancer brings to a decode engine, and what it costs: modes side by side, outputs compared bit for bit.

    python -m benchmarks.engine --modes static,sync,ours --steps 2000 --tokens-per-expert 32 --trace TRACE.npz --json engine.json
    python -m benchmarks.engine --tiny                 # the same code, small: minutes to seconds, also without a GPU
    python -m benchmarks.engine --set daemon.policy=frontier --set hook.pull_bytes_per_step=134217728

All modes compute the same tokens with the same routing; only where experts live differs.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.engine.compare import first_difference
from benchmarks.engine.config import MODES, EngineConfig, tokens_per_rank
from benchmarks.engine.launching import rendezvous_in, run_mode, short_directory
from benchmarks.engine.plots import plot_runs
from benchmarks.engine.results import COLUMNS, RunFiles, Summary, read_run, summarise
from benchmarks.engine.serving import RunRequest
from benchmarks.reporting import show_table, write_json
from eplb_async.core.config import daemon_variables, load_settings, policy_cache
from eplb_async.core.daemon_settings import EAGER

__all__ = ["Options", "main", "run_modes"]

TINY = {
    "num_layers": 3,
    "num_experts": 16,
    "num_redundant": 4,
    "hidden": 64,
    "width": 32,
    "top_k": 4,
    "vocabulary": 512,
}
DEADLINE_S = 590.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of one command: modes to run, and how.

    Attributes:
        modes: names, in order; ratios are to the first.
        config: of the engine; "ideal" balances it.
        steps, skip, interval, ahead: see --help.
        device: "cuda" or "cpu".
        output: directory for one directory of files per mode.
        settings: EPLB_ASYNC_* variables over those that `settings` makes of the interval.
        environ: variables of rank processes.
        deadline_s: for each mode.
    """

    modes: tuple[str, ...]
    config: EngineConfig
    steps: int
    skip: int
    interval: int
    ahead: int
    device: str
    output: Path
    settings: dict[str, str]
    environ: dict[str, str]
    deadline_s: float = DEADLINE_S

    def daemon_settings(self, runtime_dir: str) -> dict[str, str]:
        """EPLB_ASYNC_* variables of a mode."""
        # a run is too short for gains to pay for their bytes; what is compared is what moving costs and brings
        daemon = {
            **EAGER,
            "policy": "frontier",
            "interval_steps": self.interval,
            "window_steps": max(1, self.interval // 4),
            "num_windows": 4,
            "par_threshold": 1.02,
            "poll_interval_s": 0.02,
            "discovery_interval_s": 0.1,
            "exit_when_idle_s": 900.0,
        }
        return daemon_variables(daemon) | self.settings | {"EPLB_ASYNC_RUNTIME_DIR": runtime_dir}


def run_modes(options: Options) -> tuple[list[dict[str, Any]], dict[str, RunFiles]]:
    """Run the modes one after the other; rows for the table, and each mode's files.

    Raises:
        EplbError: a rank or the daemon failed.
    """
    # compiled policies outlive a mode; daemon and ranks inherit it
    os.environ.setdefault("NUMBA_CACHE_DIR", str(policy_cache(options.output.resolve())))
    load_settings(environ=options.daemon_settings(""))  # bad ones are told before anything runs
    rows: list[dict[str, Any]] = []
    runs: dict[str, RunFiles] = {}
    compared_to: str | None = None
    for mode in options.modes:
        print(f"{mode}: {MODES[mode]}", flush=True)
        folder = options.output / mode
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("rank*"):
            old.unlink()
        with short_directory() as directory:
            request = _request(options, mode, folder, directory)
            decisions = run_mode(request, options.deadline_s)
        runs[mode] = read_run(folder)
        summary = summarise(runs[mode], min(options.skip, options.steps - 1))
        if mode == "ideal":
            outputs = "other routing"
        elif compared_to is None:
            compared_to, outputs = mode, "compared to"
        else:
            difference = first_difference(options.output / compared_to, folder)
            outputs = "equal" if difference is None else f"DIFFER at {difference.step}: {difference.what}"
        row = _label(options, summary) | {"outputs": outputs, "decisions": decisions, "ranks": runs[mode].facts}
        rows.append(row)
        write_json(folder / "summary.json", "engine", [row])
    return rows, runs


def _label(options: Options, summary: Summary) -> dict[str, Any]:
    config = options.config
    case = (
        f"{config.num_ranks} ranks, {config.num_layers} layers of {config.num_experts} + {config.num_redundant} experts, "
        f"top-{config.top_k}, hidden {config.hidden}, width {config.width}, {config.tokens_per_rank} sequences per rank, "
        f"{Path(config.trace).name} ({config.drift} every {config.steps_per_window} steps), {options.steps} steps"
    )
    return {"case": case} | summary.row()


def _request(options: Options, mode: str, folder: Path, directory: str) -> RunRequest:
    fields = {name: getattr(options.config, name) for name in options.config.__dataclass_fields__}
    return RunRequest(
        mode=mode,  # type: ignore[arg-type]
        config=EngineConfig(**{**fields, "balanced": mode == "ideal"}),
        steps=options.steps,
        interval=options.interval,
        ahead=options.ahead,
        group=f"engine-{os.getpid()}-{mode}",
        device=options.device,
        rendezvous=rendezvous_in(directory, mode),
        output=folder,
        settings=options.daemon_settings(str(Path(directory) / "run")),
        environ=options.environ,
    )


def _pairs(texts: list[str], prefix: str = "") -> dict[str, str]:
    """NAME=VALUE texts as a dictionary; with a prefix, `daemon.policy` becomes PREFIX + DAEMON_POLICY."""
    result = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE")
        result[prefix + name.upper().replace(".", "_") if prefix else name] = value
    return result


# size: the options of a command
def main(
    modes: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(MODES)}.")] = "static,sync,ours",
    steps: Annotated[int, typer.Option(help="Steps of each mode.")] = 2000,
    skip: Annotated[int, typer.Option(help="First steps left out of times and PAR.")] = 20,
    interval: Annotated[int, typer.Option(help="Steps between two rebalances, of sync and of ours.")] = 200,
    tokens_per_expert: Annotated[int, typer.Option(help="Pairs of an expert in a step, on average.")] = 32,
    trace: Annotated[str, typer.Option(help="An .npz with counts [T, L, E], or 'synthetic'.")] = "synthetic",
    steps_per_window: Annotated[int, typer.Option(help="Steps for which a window of the trace lasts.")] = 250,
    drift: Annotated[str, typer.Option(help="'switched' or 'interpolated' between windows.")] = "switched",
    ranks: Annotated[int, typer.Option(help="Rank processes; 0: one per GPU, or 2 without.")] = 0,
    layers: Annotated[int, typer.Option(help="MoE layers.")] = 16,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 128,
    redundant: Annotated[int, typer.Option(help="Slots beyond one per expert.")] = 16,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 8,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 4096,
    width: Annotated[int, typer.Option(help="Inner size of an expert.")] = 1536,
    vocabulary: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = 32_768,
    seed: Annotated[int, typer.Option(help="Of weights, tokens and routing.")] = 0,
    tiny: Annotated[bool, typer.Option(help="A tiny model instead of the sizes above.")] = False,
    graphs: Annotated[str, typer.Option(help="'whole' or 'none': CUDA graph of a step.")] = "whole",
    kernels: Annotated[str, typer.Option(help="'triton' or 'torch'.")] = "triton",
    products: Annotated[str, typer.Option(help="'grouped' (torch._grouped_mm) or 'triton'.")] = "grouped",
    ahead: Annotated[int, typer.Option(help="Unfinished steps before the one that is issued.")] = 1,
    device: Annotated[str, typer.Option(help="'cuda', 'cpu', or 'auto'.")] = "auto",
    settings: Annotated[list[str], typer.Option("--set", help="Of hook and daemon: daemon.policy=default.")] = [],  # noqa: B006
    env: Annotated[list[str], typer.Option(help="NAME=VALUE for rank processes.")] = [],  # noqa: B006
    deadline_s: Annotated[float, typer.Option(help="For each mode, all of it.")] = DEADLINE_S,
    output: Annotated[Path, typer.Option(help="Directory for the files of all modes.")] = Path("engine-runs"),
    json: Annotated[Path | None, typer.Option(help="Also write the rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw step times here (needs matplotlib).")] = None,
) -> None:
    """Run the modes, compare their outputs, print the table. Exits with 1 if outputs differ."""
    chosen = tuple(name.strip() for name in modes.split(",") if name.strip())
    if unknown := [name for name in chosen if name not in MODES]:
        raise typer.BadParameter(f"no mode {unknown[0]!r}; modes are {', '.join(MODES)}")
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    num_ranks = ranks or (max(1, torch.cuda.device_count()) if cuda else 2)
    if cuda and num_ranks > torch.cuda.device_count():
        raise typer.BadParameter(f"{num_ranks} ranks need as many GPUs; there are {torch.cuda.device_count()}")
    sizes: dict[str, Any] = {
        "num_layers": layers,
        "num_experts": experts,
        "num_redundant": redundant,
        "hidden": hidden,
        "width": width,
        "top_k": top_k,
        "vocabulary": vocabulary,
    }
    sizes = TINY if tiny else sizes
    config = EngineConfig(
        **sizes,
        num_ranks=num_ranks,
        tokens_per_rank=tokens_per_rank(tokens_per_expert, sizes["num_experts"], sizes["top_k"], num_ranks),
        seed=seed,
        trace=trace,
        steps_per_window=steps_per_window,
        drift=_one_of(drift, "switched", "interpolated"),  # type: ignore[arg-type]
        graphs=_one_of(graphs, "whole", "none"),  # type: ignore[arg-type]
        kernels=_one_of(kernels, "triton", "torch"),  # type: ignore[arg-type]
        products=_one_of(products, "grouped", "triton"),  # type: ignore[arg-type]
    )
    print(
        f"each rank: {config.weight_bytes / 1e9:.1f} GB of weights, about {config.activation_bytes / 1e9:.1f} GB for a step"
    )
    options = Options(
        modes=chosen,
        config=config,
        steps=steps,
        skip=skip,
        interval=interval,
        ahead=ahead,
        device="cuda" if cuda else "cpu",
        output=output,
        settings=_pairs(settings, "EPLB_ASYNC_"),
        environ=_pairs(env),
        deadline_s=deadline_s,
    )
    rows, runs = run_modes(options)
    show_table("Decode engine", COLUMNS, rows, "case", more={"device": rows[0]["ranks"][0]["device"]})
    if json is not None:
        write_json(json, "engine", rows)
    if plot is not None and not plot_runs(plot, runs, min(skip, steps - 1)):
        print("no plot: matplotlib is not installed")
    if any(str(row["outputs"]).startswith("DIFFER") for row in rows):
        raise typer.Exit(1)


def _one_of(value: str, *choices: str) -> str:
    if value not in choices:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(choices)}")
    return value


if __name__ == "__main__":
    typer.run(main)

"""Train the demo's model on text of eight domains, and measure what matters for balancing: how skewed its router is.

    python scripts/make_demo_text.py BUILD
    python -m eplb_async.demo.train train BUILD/train
    python -m eplb_async.demo.train evaluate

Every batch holds sequences of all domains in equal shares. The balancing loss sees the batch as a whole, so it keeps
experts alive over the mixture and leaves each domain free to have its own hot experts; it is weak, and weaker still
after the first tenth of the training. A batch is a function of (seed, step), so an interrupted training goes on from
its checkpoint with the batches it would have had.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from eplb_async.core.errors import ConfigError
from eplb_async.core.placement import initial_placement
from eplb_async.core.score import par, rank_load, windows_par
from eplb_async.core.spec import MoESpec
from eplb_async.demo.model import (
    EXPERT_TENSORS,
    LocalExperts,
    ModelShape,
    MoEModel,
    Routing,
    combine,
    load_model,
    save_model,
)
from eplb_async.demo.text import DOMAINS, load_domain

__all__ = ["DomainReport", "TrainingSettings", "app", "evaluate_domain", "share_distance", "skew_tables", "train_model"]

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train and measure the demo's MoE model.")
WEIGHTS = Path(__file__).parent / "weights" / "model.safetensors"


class TrainingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a training run depends on besides its text.

    Fields:
        steps: optimiser steps.
        seed: of the weights and of the batches.
        batch: sequences per step, a multiple of the number of domains.
        peak_rate: AdamW's learning rate after warm-up; it falls to a tenth on a cosine.
        warmup: steps of linear warm-up.
        balance: coefficient of the balancing loss (Switch Transformer, arXiv:2101.03961, eq. 4) during the first
            `balance_share` of the steps, from where it falls linearly to a tenth at the end.
        balance_share: see balance.
        save_every: steps between checkpoints.
    """

    steps: int = 2300
    seed: int = 1
    batch: int = 32
    peak_rate: float = 3e-3
    warmup: int = 100
    balance: float = 3e-3
    balance_share: float = 0.1
    save_every: int = 100


def train_model(
    text: Path, settings: TrainingSettings, checkpoint: Path | None, report: Callable[[int, str], None]
) -> MoEModel:
    """Train, going on from the checkpoint if it exists.

    Args:
        text: folder with `<domain>.txt` for every domain, made by scripts/make_demo_text.py.
        settings: see there.
        checkpoint: written every `save_every` steps and at the end; None: never.
        report: called after each step with (step, one line about it).

    Raises:
        ConfigError: a domain's text is missing, or the checkpoint is of other settings.
    """
    texts = [_read_training_text(text, domain) for domain in DOMAINS]
    torch.manual_seed(settings.seed)
    model = MoEModel(ModelShape(), dtypes=dict.fromkeys(EXPERT_TENSORS, torch.float32))
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=settings.peak_rate, betas=(0.9, 0.95), fused=True)
    first = _restore(model, optimiser, settings, checkpoint)
    experts = _TrainingExperts(model)
    for step in range(first, settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = _learning_rate(step, settings)
        tokens, targets = _training_batch(texts, settings, step, model.shape.context)
        routings: list[Routing] = []
        logits = model(tokens, experts, routings)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        imbalance = torch.stack([_balance_loss(routing) for routing in routings]).mean()
        torch.autograd.backward(loss + _balance_weight(step, settings) * imbalance)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if checkpoint is not None and ((step + 1) % settings.save_every == 0 or step + 1 == settings.steps):
            _save_checkpoint(model, optimiser, settings, step + 1, checkpoint)
        idle = min(
            int(torch.bincount(r.expert_ids_NK.flatten(), minlength=model.shape.num_experts).min()) for r in routings
        )
        bits = loss.item() / np.log(2)
        report(step, f"{bits:.3f} bits per byte, imbalance {imbalance.item():.2f}, coldest expert {idle} tokens")
    return model


class _TrainingExperts:
    """All experts in float32 with gradients: one product per expert instead of equal blocks. An `ExpertsFunction`."""

    def __init__(self, model: MoEModel) -> None:
        self.layers = [layer.experts for layer in model.moe_layers]

    def __call__(self, layer: int, hidden_ND: Tensor, expert_ids_NK: Tensor, gates_NK: Tensor) -> Tensor:
        """Compute with gradients."""
        experts = self.layers[layer]
        flat = expert_ids_NK.flatten()
        order = torch.argsort(flat)
        counts = torch.bincount(flat, minlength=len(experts.bias)).tolist()
        rows = torch.split(hidden_ND[order // expert_ids_NK.shape[1]], counts)
        outputs = []
        for x, gate_up, down, bias in zip(
            rows, *map(torch.unbind, (experts.gate_up, experts.down, experts.bias)), strict=True
        ):
            gate, up = functional.linear(x, gate_up).chunk(2, dim=1)
            outputs.append(torch.addmm(bias, functional.silu(gate) * up, down.t()))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return combine(torch.cat(outputs)[back].view(*expert_ids_NK.shape, -1), gates_NK)


def _balance_loss(routing: Routing) -> Tensor:
    """E * sum over experts of (share of the tokens) * (mean softmax): 1 when even."""
    num_experts = routing.softmax_NE.shape[1]
    share_E = torch.bincount(routing.expert_ids_NK.flatten(), minlength=num_experts) / routing.expert_ids_NK.numel()
    return num_experts * (share_E * routing.softmax_NE.mean(dim=0)).sum()


def _balance_weight(step: int, settings: TrainingSettings) -> float:
    """Constant for the first part of the training, then falling linearly to a tenth."""
    rest = (step / settings.steps - settings.balance_share) / (1 - settings.balance_share)
    return settings.balance * (1 - 0.9 * max(rest, 0.0))


def _learning_rate(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    if step < settings.warmup:
        return settings.peak_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.peak_rate * (0.55 + 0.45 * float(np.cos(np.pi * done)))


def _training_batch(
    texts: list[NDArray[np.uint8]], settings: TrainingSettings, step: int, length: int
) -> tuple[Tensor, Tensor]:
    """Tokens and targets of a step, int64 [B, T] each; the same number of random windows from every domain."""
    random = np.random.default_rng((settings.seed, step))
    rows = []
    for index in range(settings.batch):
        text = texts[index % len(texts)]
        start = int(random.integers(text.size - length))
        rows.append(text[start : start + length + 1])
    windows = torch.from_numpy(np.stack(rows).astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def _read_training_text(folder: Path, domain: str) -> NDArray[np.uint8]:
    """The training bytes of a domain."""
    path = folder / f"{domain}.txt"
    if not path.is_file():
        raise ConfigError(str(path), "no training text; make it with scripts/make_demo_text.py")
    return np.frombuffer(path.read_bytes(), dtype=np.uint8)


def _save_checkpoint(
    model: MoEModel, optimiser: torch.optim.Optimizer, settings: TrainingSettings, step: int, path: Path
) -> None:
    """Write a checkpoint; a killed process leaves the old one or the new one."""
    partial = path.with_suffix(".partial")
    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
    torch.save({**state, "settings": msgspec.to_builtins(settings)}, partial)
    partial.replace(path)


def _restore(model: MoEModel, optimiser: torch.optim.Optimizer, settings: TrainingSettings, path: Path | None) -> int:
    """Load a checkpoint if there is one; the next step to run."""
    if path is None or not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["settings"] != msgspec.to_builtins(settings):
        raise ConfigError(str(path), f"a checkpoint of other settings: {state['settings']}; use them, or remove it")
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])


@app.command("train")
def _train_command(
    text: Annotated[Path, typer.Argument(help="folder of training text, from scripts/make_demo_text.py")],
    out: Annotated[Path, typer.Option(help="where the weights go")] = WEIGHTS,
    checkpoint: Annotated[Path, typer.Option(help="resumed from if it exists")] = Path("demo_training.pt"),
    steps: Annotated[int, typer.Option(help="optimiser steps of 4,096 bytes")] = TrainingSettings().steps,
    seed: Annotated[int, typer.Option(help="of weights and batches")] = TrainingSettings().seed,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
) -> None:
    """Train the model and write its weights."""
    torch.set_num_threads(threads)
    settings = TrainingSettings(steps=steps, seed=seed)
    console = Console()
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=steps)
        began = time.monotonic()

        def report(step: int, line: str) -> None:
            progress.update(task, completed=step + 1)
            if step % 25 == 0 or step + 1 == steps:
                console.print(f"step {step:5} {line}, {time.monotonic() - began:.0f} s")

        model = train_model(text, settings, checkpoint, report)
    save_model(model, out)
    console.print(f"wrote {out}, {out.stat().st_size:,} bytes")


class DomainReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one domain's held-out text does to the model.

    Fields:
        domain: its name.
        bits_per_byte: mean cross-entropy of the next byte, in bits.
        load_WLE: tokens per expert in each window of text, int64 [W, L, E].
    """

    domain: str
    bits_per_byte: float
    load_WLE: NDArray[np.int64]


def evaluate_domain(model: MoEModel, domain: str, batch: int = 8) -> DomainReport:
    """Run a domain's held-out text through the model as it is served; a window is one batch."""
    text, length = load_domain(domain), model.shape.context
    starts = np.arange(0, text.size - length, length)
    total, loads = 0.0, []
    for first in range(0, len(starts) - batch + 1, batch):
        windows = torch.from_numpy(text[starts[first : first + batch, None] + np.arange(length + 1)].astype(np.int64))
        experts = LocalExperts(model)
        logits = model(windows[:, :-1], experts)
        total += functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
        loads.append(experts.load_LE.numpy())
    return DomainReport(domain=domain, bits_per_byte=total / len(loads) / float(np.log(2)), load_WLE=np.stack(loads))


def _router_skew(load_LE: NDArray[np.int64]) -> float:
    """Mean over layers of the hottest expert's load over the mean expert's."""
    return float((load_LE.max(axis=1) / load_LE.mean(axis=1)).mean())


def share_distance(first_LE: NDArray[np.int64], second_LE: NDArray[np.int64]) -> float:
    """Total-variation distance of two loads' shares (0 the same, 1 disjoint), mean over layers."""
    shares = [load_LE / load_LE.sum(axis=1, keepdims=True) for load_LE in (first_LE, second_LE)]
    return float(np.abs(shares[0] - shares[1]).sum(axis=1).mean() / 2)


def skew_tables(reports: Sequence[DomainReport], spec: MoESpec) -> list[Table]:
    """Two tables: quality and skew of each domain under the initial placement, and the distances between domains."""
    placement_LP = initial_placement(spec)
    quality = Table(
        "domain", "bits per byte", "PAR, mean of layers", "PAR, worst layer", "PAR of a step", "max / mean expert"
    )
    quality.add_column("hottest expert by layer")
    names = [report.domain for report in reports]
    distances = Table("", *names)
    for report in reports:
        load_LE = report.load_WLE.sum(axis=0)
        whole_L = par(rank_load(load_LE, placement_LP, spec.topology))
        step = windows_par(report.load_WLE, placement_LP, spec.topology).mean()
        cells = (report.bits_per_byte, whole_L.mean(), whole_L.max(), step, _router_skew(load_LE))
        hottest = " ".join(str(expert) for expert in load_LE.argmax(axis=1))
        quality.add_row(report.domain, *(f"{cell:.2f}" for cell in cells), hottest)
        row = (share_distance(load_LE, other.load_WLE.sum(axis=0)) for other in reports)
        distances.add_row(report.domain, *(f"{distance:.2f}" for distance in row))
    mixture_LE = np.sum([report.load_WLE.sum(axis=0) for report in reports], axis=0)
    whole_L = par(rank_load(mixture_LE, placement_LP, spec.topology))
    bits = float(np.mean([report.bits_per_byte for report in reports]))
    text = [f"{cell:.2f}" for cell in (bits, whole_L.mean(), whole_L.max(), _router_skew(mixture_LE))]
    quality.add_row("all", *text[:3], "", text[3], " ".join(str(expert) for expert in mixture_LE.argmax(axis=1)))
    return [quality, distances]


@app.command("evaluate")
def _evaluate_command(
    weights: Annotated[Path, typer.Option(help="a weights file of this script")] = WEIGHTS,
    ranks: Annotated[int, typer.Option(help="R of the initial placement")] = 4,
    redundant: Annotated[int, typer.Option(help="slots beyond one per expert")] = 8,
) -> None:
    """Measure held-out quality and router skew per domain (Markdown tables)."""
    torch.set_num_threads(1)
    model = load_model(weights)
    shape = model.shape
    spec = MoESpec(num_layers=shape.num_layers, num_experts=shape.num_experts, num_ranks=ranks, num_redundant=redundant)
    began = time.monotonic()
    reports = [evaluate_domain(model, domain) for domain in DOMAINS]
    spent_s = time.monotonic() - began
    console = Console(width=200)
    for table in skew_tables(reports, spec):
        table.box = MARKDOWN
        console.print(table)
    num_tokens = sum(int(report.load_WLE[:, 0].sum()) for report in reports) // shape.top_k
    console.print(
        f"{num_tokens:,} bytes in {spent_s:.1f} s: {num_tokens / spent_s:,.0f} bytes per second on one thread"
    )


if __name__ == "__main__":
    app()

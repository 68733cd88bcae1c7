"""Weights that move beside a real MoE decode step, on two GPUs: what the step notices, how fast bytes move, what a commit stalls.

    python -m benchmarks.bench_moves
    python -m benchmarks.bench_moves --tokens-per-expert 512 --rounds 5 --json moves.json

The engine of benchmarks/engine with perfectly balanced traffic and no redundant slots, so that every placement is as fast as any other:
what differs between the rows is not the balance. Blocks of steps, interleaved and repeated in one run of two processes:

    alone           no hook
    hook            the hook, no plan
    moving          plan after plan exchanges experts between the ranks, verified, at --bytes-per-step
    nccl            no hook; as many bytes per step by NCCL send/recv on a stream of their own (last, since it may hang)

A step's time is that between two events on the compute stream. Beside it, on idle GPUs: pulls with and without verification against one
plain copy of as many bytes from the peer, and commits' kernels alone, which is what "stall without copies" is without.
"""

import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere, installed or not

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.engine.config import EngineConfig, tokens_per_rank
from benchmarks.moves_rank import GROUP, Case, serve
from benchmarks.reporting import Column, show_table, write_json
from tests.rank.publisher import Publisher

__all__ = ["main"]

Row = dict[str, object]
DEADLINE_S = 240.0
STEPS = [
    Column(key="what", title="step, ms"),
    Column(key="p50", title="p50", digits=4, ratio=True),
    Column(key="p99", title="p99", digits=4, ratio=True),
    Column(key="max", title="max", digits=3),
    Column(key="mean", title="mean", digits=4, ratio=True),
    Column(key="steps", title="steps"),
    Column(key="gb_s", title="GB/s in", digits=1),
]
OTHERS = [
    Column(key="what", title="what"),
    Column(key="value", title="value", digits=1),
    Column(key="unit", title="unit"),
]


class Parent:
    """Two rank processes, and the plans that keep them moving."""

    def __init__(self, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self.case, self.pipes = case, []
        self.processes = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(case, rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self._collect()
        self.daemon = Publisher(GROUP, case.config.spec)
        self._turn = 0

    def ask(self, command: str, *arguments: Any) -> list[Any]:
        """The same of both ranks."""
        for pipe in self.pipes:
            pipe.send((command, arguments))
        return self._collect(moving=arguments[:1] == ("moving",))

    def moving(self, steps: int) -> list[Any]:
        """A block beside plans; what is left of the last plan is committed after it."""
        self._post()
        found = self.ask("block", "moving", steps)
        end = time.monotonic() + DEADLINE_S
        while not self.daemon.done():
            assert time.monotonic() < end, "the last plan does not end"
            self.ask("finish_plan")
        return found

    def close(self) -> None:
        """End the processes."""
        self.ask("close")
        for process in self.processes:
            process.join(30)
            process.kill()

    def _collect(self, moving: bool = False) -> list[Any]:
        end = time.monotonic() + DEADLINE_S
        while not all(pipe.poll() for pipe in self.pipes):
            if moving and self.daemon.done():
                self._post()
            for pipe, process in zip(self.pipes, self.processes, strict=True):
                if not process.is_alive() and not pipe.poll():
                    raise SystemExit("a rank ended; its error is above")
            if time.monotonic() > end:
                raise SystemExit("the ranks do not answer")
            time.sleep(0.0002)
        return [pipe.recv() for pipe in self.pipes]

    def _post(self) -> None:
        """A plan that exchanges some experts of each layer between the ranks, twice."""
        spec, rows = self.case.config.spec, self.case.rows_per_commit
        width, changes, rows_LP = spec.slots_per_rank, [], self.daemon.rows_LP.copy()
        for _ in range(2):
            for layer in range(spec.num_layers):
                slots = (self._turn * rows + np.arange(rows)) % width
                row_P = rows_LP[layer].copy()
                row_P[slots], row_P[slots + width] = row_P[slots + width].copy(), row_P[slots].copy()
                rows_LP[layer] = row_P
                changes.append((layer, row_P))
            self._turn += 1
        self.daemon.applied(self.daemon.post(self.daemon.plan(changes)))


def summary(what: str, blocks: list[list[dict[str, Any]]], times: NDArray[np.float64]) -> Row:
    """One row of the table; times of both ranks together."""
    seconds = sum(float(block["ms"].sum()) for pair in blocks for block in pair) / 1e3
    moved = sum(block["bytes"] for pair in blocks for block in pair)
    p50, p99 = np.percentile(times, (50, 99)).tolist()
    row: Row = {"what": what, "p50": p50, "p99": p99, "max": float(times.max()), "mean": float(times.mean())}
    return row | {"steps": len(times)} | ({"gb_s": moved / seconds / 1e9} if moved else {})


def together(blocks: list[list[dict[str, Any]]], commits: bool | None = None) -> NDArray[np.float64]:
    """Step times of all blocks, of steps with or without a commit if asked. The first steps of a block are left out."""
    found = []
    for pair in blocks:
        for block in pair:
            chosen = np.ones(len(block["ms"]), dtype=bool) if commits is None else (block["commits"] > 0) == commits
            chosen[:5] = False
            found.append(block["ms"][chosen])
    return np.concatenate(found)


def report(case: Case, blocks: dict[str, list[list[dict[str, Any]]]], facts: list[Row]) -> tuple[list[Row], list[Row]]:
    """The tables' rows."""
    rows = [summary(kind, found, together(found)) for kind, found in blocks.items()]
    quiet, stalled = together(blocks["moving"], False), together(blocks["moving"], True)
    rows.insert(3, summary("moving, steps without a commit", [], quiet))
    rows.insert(4, summary("moving, steps with a commit", [], stalled))
    copy_ms = next(float(str(fact["value"])) for fact in facts if str(fact["what"]).startswith("commit's kernel")) / 1e3
    stall_us = (stalled - np.median(quiet) - copy_ms) * 1e3
    # per commit, on the slower rank
    facts += [
        {"what": f"stall of a commit step without the copies, {name}", "value": float(value), "unit": "us"}
        for name, value in zip(("p50", "p99", "max"), (*np.percentile(stall_us, (50, 99)), stall_us.max()), strict=True)
    ]
    facts.append({"what": "commits seen", "value": float(len(stalled)), "unit": ""})
    hosts = {
        kind: np.concatenate([block["host_us"][5:] for pair in blocks[kind] for block in pair])
        for kind in ("hook", "moving")
    }
    for kind, values in hosts.items():
        for name, value in zip(("p50", "p99"), np.percentile(values, (50, 99)), strict=True):
            facts.append({"what": f"host time in the hook, {kind}, {name}", "value": float(value), "unit": "us"})
    return rows, facts


def main(  # size: options
    tokens_per_expert: Annotated[int, typer.Option(help="Pairs of a step for each expert, on average.")] = 32,
    layers: Annotated[int, typer.Option(help="MoE layers.")] = 16,
    experts: Annotated[int, typer.Option(help="Experts; half of them on each rank.")] = 128,
    steps: Annotated[int, typer.Option(help="Steps of a block.")] = 300,
    rounds: Annotated[int, typer.Option(help="Blocks of each kind.")] = 3,
    bytes_per_step: Annotated[int, typer.Option(help="Pacing: hook.pull_bytes_per_step.")] = 38 << 20,
    rows_per_commit: Annotated[int, typer.Option(help="Experts that each rank receives in one commit.")] = 4,
    verify: Annotated[str, typer.Option(help="hook.verify.")] = "all",
    nccl: Annotated[bool, typer.Option(help="Also measure NCCL send/recv.")] = True,
    json: Annotated[Path | None, typer.Option(help="Also write the rows here.")] = None,
) -> None:
    """Measure, print, and write JSON if asked."""
    config = EngineConfig(
        num_ranks=2,
        tokens_per_rank=tokens_per_rank(tokens_per_expert, experts, 8, 2),
        num_layers=layers,
        num_experts=experts,
        num_redundant=0,
        balanced=True,
    )
    with tempfile.TemporaryDirectory(prefix="eplb-moves-", dir="/tmp") as directory:
        case = Case(
            config=config,
            steps=steps,
            bytes_per_step=bytes_per_step,
            rows_per_commit=rows_per_commit,
            verify=verify,
            directory=directory,
        )
        parent = Parent(case)
        expert = config.expert_bytes
        facts: list[Row] = []
        for what, command in {
            "plain copy from the peer, one rank": ("plain_copy", 16 * expert, True),
            "plain copy from the peer, both ranks at once": ("plain_copy", 16 * expert, False),
            "pull of 16 experts, both ranks, not verified": ("idle_transfer", 16, False),
            "pull of 16 experts, both ranks, verified": ("idle_transfer", 16, True),
        }.items():
            found = parent.ask(*command)
            facts.append({"what": what, "value": float(found[0]), "unit": "GB/s"})
        kernel_ms = max(parent.ask("commit_kernel", rows_per_commit))
        facts.append({"what": f"commit's kernel, {rows_per_commit} experts", "value": 1e3 * kernel_ms, "unit": "us"})
        blocks: dict[str, list[list[dict[str, Any]]]] = {"alone": [], "hook": [], "moving": []}
        for _ in range(rounds):
            for kind, kept in blocks.items():
                kept.append(parent.moving(steps) if kind == "moving" else parent.ask("block", kind, steps))
        for name, value in parent.ask("statistics")[0].items():
            facts.append({"what": f"hook: {name}", "value": float(value), "unit": "us" if " p" in name else ""})
        if nccl:
            blocks["nccl"] = [parent.ask("block", "nccl", steps) for _ in range(rounds)]
            for pair in blocks["nccl"]:
                for block in pair:
                    block["bytes"] = steps * expert
        parent.close()
    label = (
        f"{layers} layers x {experts} experts, {tokens_per_expert} tokens per expert, {expert / 1e6:.1f} MB per expert"
    )
    rows, facts = report(case, blocks, facts)
    more: Row = {"gpu": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"}
    rows, facts = [row | {"case": label} for row in rows], [fact | {"case": label} for fact in facts]
    show_table("Weights that move beside the forward", STEPS, rows, "case", more=more)
    show_table("Beside it", OTHERS, facts, "case", more=more)
    if json is not None:
        write_json(json, "moves", [*rows, *facts], more)


if __name__ == "__main__":
    typer.run(main)

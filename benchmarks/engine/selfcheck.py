"""Does the engine's step do on this device what it should? One process, one device, under a minute.

    python -m benchmarks.engine.selfcheck                    # at the benchmark's sizes, on a GPU with 25 GB free
    python -m benchmarks.engine.selfcheck --tiny             # anywhere

Checks that kernels equal their torch twins, that both kinds of grouped products agree, that a row's result has the same bits
wherever it stands and whatever else is in its group, and that the captured graph computes what the step does without it. Prints
one line per check with times, and exits with 1 if any failed.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated

import torch
import typer

from benchmarks.engine import kernels
from benchmarks.engine.config import EngineConfig
from benchmarks.engine.kernels import LocalPairs, order_pairs
from benchmarks.engine.model import Engine
from eplb_async.core.placement import initial_placement
from eplb_async.rank.maps import Maps

__all__ = ["checks", "main"]

Check = tuple[str, Callable[[], object]]
RELATIVE, ABSOLUTE = 2e-2, 2e-2
"""Of bfloat16 results that were rounded after sums in another order."""


def checks(config: EngineConfig, device: torch.device) -> Iterator[Check]:
    """Names and functions; a function raises where its check fails, and may return a remark."""
    cuda = device.type == "cuda"
    slots = config.spec.slots_per_rank
    torch.manual_seed(0)
    slots_MK = torch.randint(0, slots + slots // 4, (config.num_tokens, config.top_k), device=device)
    pairs = order_pairs(slots_MK, 0, slots)
    count = int(pairs.num_rows)
    rows = torch.randn((config.num_pairs, config.hidden), device=device).bfloat16()
    weights = (torch.randn((slots, 2 * config.width, config.hidden), device=device) * config.hidden**-0.5).bfloat16()
    if cuda:
        yield from _twins(config, pairs, count, rows)
        yield (
            "grouped products: torch against a loop of matmuls",
            lambda: _close(_product(rows, weights, pairs, "grouped")[:count], _reference(rows, weights, pairs)),
        )
        yield (
            "grouped products: Triton against a loop of matmuls",
            lambda: _close(_product(rows, weights, pairs, "triton")[:count], _reference(rows, weights, pairs)),
        )
    for products in ("grouped", "triton") if cuda else ("grouped",):
        yield (
            f"products ({products}): a row has the same bits in any place and company",
            lambda products=products: _same_bits(config, rows, weights, products),  # type: ignore[misc]
        )
        if cuda:
            yield (
                f"products ({products}): time",
                lambda products=products: _timed(lambda: _product(rows, weights, pairs, products)),  # type: ignore[misc]
            )
    yield "a step: runs, and again with the same bits", lambda: _steps(config, device, "none")
    if cuda:
        yield "a step in a CUDA graph: the same bits", lambda: _steps(config, device, "whole")


def _twins(config: EngineConfig, pairs: LocalPairs, count: int, rows: torch.Tensor) -> Iterator[Check]:
    tokens = rows[: config.num_tokens]
    both = torch.randn((config.num_pairs, 2 * config.width), device=rows.device).bfloat16()
    hidden = torch.randn((config.num_tokens, config.hidden), device=rows.device)
    gates = torch.rand((config.num_tokens, config.top_k), device=rows.device)
    per_token = rows.view(config.num_tokens, config.top_k, config.hidden)
    functions: dict[str, Callable[[str], torch.Tensor]] = {
        "gather_rows": lambda kind: kernels.gather_rows(tokens, pairs, config.top_k, kind)[:count],
        "expand_rows": lambda kind: kernels.expand_rows(rows, pairs, kind),
        "silu_mul": lambda kind: kernels.silu_mul(both, pairs.num_rows, kind)[:count],
        "combine": lambda kind: kernels.combine(hidden, per_token, gates, kind),
    }
    for name, function in functions.items():
        yield f"{name}: Triton equals torch", lambda f=function: _close(f("triton"), f("torch"))  # type: ignore[misc]


def _product(rows: torch.Tensor, weights: torch.Tensor, pairs: LocalPairs, products: str) -> torch.Tensor:
    return kernels.grouped_product(rows, weights, pairs, products)


def _reference(rows: torch.Tensor, weights_SOI: torch.Tensor, pairs: LocalPairs) -> torch.Tensor:
    parts, first = [], 0
    for slot, end in enumerate(pairs.ends_S.tolist()):
        parts.append(rows[first:end] @ weights_SOI[slot].T)
        first = end
    return torch.cat(parts)


def _close(found: torch.Tensor, expected: torch.Tensor) -> str:
    torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=ABSOLUTE)
    return "bit-equal" if torch.equal(found, expected) else "close"


def _same_bits(config: EngineConfig, rows: torch.Tensor, weights: torch.Tensor, products: str) -> None:
    """The same rows sent to slot 1 once alone in their group, once behind others, once before."""
    pairs_in_all, mine = config.num_pairs, min(7, config.num_pairs // 4)
    results = []
    for before, after in ((0, 0), (pairs_in_all // 3, 0), (5, pairs_in_all // 2)):
        slots = torch.full((pairs_in_all, 1), config.spec.slots_per_rank, device=rows.device)
        slots[: before + mine + after] = 1
        pairs = order_pairs(slots, 0, config.spec.slots_per_rank)
        arranged = rows.roll(before, dims=0)
        results.append(_product(arranged, weights, pairs, products)[before : before + mine])
    for other in results[1:]:
        assert torch.equal(results[0], other), "bits differ: outputs would depend on the placement"


def _steps(config: EngineConfig, device: torch.device, graphs: str) -> str:
    """Two passes over some steps give the same records as a pass without a graph; the mean time of a step."""
    steps, records = 4, []
    engine = Engine(replace(config, graphs="none"), 0, device)
    engine.use(Maps(initial_placement(engine.spec), engine.spec, device))
    engine.prepare(0, steps)
    passes = 2 if graphs == "none" else 3
    for index in range(passes):
        if index == 1 and graphs == "whole":
            engine.config = replace(config, graphs="whole")
            engine.warm_up()
        engine.reset()
        kept = []
        for step in range(steps):
            engine.run_step(step)
            kept.append(engine.record.clone())
        records.append(torch.stack(kept))
    for other in records[1:]:
        assert torch.equal(records[0], other), "records differ"
    tokens = records[0][:, : config.tokens_per_rank]
    assert int(tokens.min()) < int(tokens.max()), "all tokens are the same"
    engine.reset()
    remark = _timed(lambda: engine.run_step(0))
    engine.close()
    return remark


def _timed(function: Callable[[], object]) -> str:
    """Mean time of ten calls, after two."""
    for _ in range(2):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return f"{(time.perf_counter() - start) * 100:.3f} ms"


def main(
    tiny: Annotated[bool, typer.Option(help="Small sizes.")] = False,
    tokens: Annotated[int, typer.Option(help="Tokens of the step.")] = 512,
    layers: Annotated[int, typer.Option(help="Layers of the step.")] = 2,
) -> None:
    """Run all checks."""
    from benchmarks.engine.__main__ import TINY

    torch.set_num_threads(1)
    config = EngineConfig(num_ranks=1, num_layers=layers, tokens_per_rank=tokens)
    if tiny:
        config = replace(config, **{**TINY, "tokens_per_rank": 32})  # type: ignore[arg-type]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    failed = 0
    for name, check in checks(config, device):
        start = time.perf_counter()
        try:
            remark = check()
            verdict = f"ok      {remark or ''}"
        except Exception as error:  # noqa: BLE001 (it is printed, and makes the command fail)
            failed += 1
            verdict = f"FAILED  {type(error).__name__}: {error}"
        print(f"{name:75} {time.perf_counter() - start:6.1f} s  {verdict}", flush=True)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

"""The fuzzer behind `scripts/fuzz`: seeded inputs by the million against one target, with an eye on time and memory.

Input number i of a seed is always the same bytes, whatever came before it: `--only i` makes it again.
"""

import json as json_module
import logging
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Annotated, Protocol

import typer
from rich.console import Console
from rich.progress import Progress

from tests.faults.fuzz_control import ControlFuzz
from tests.faults.fuzz_files import SettingsFuzz, TracesFuzz
from tests.faults.fuzz_plan import PlanFuzz

__all__ = ["TARGETS", "Campaign", "Target", "app", "input_of", "run"]

app = typer.Typer(add_completion=False)

INPUT_LIMIT_S = 5.0
GROWTH_BYTES = 256 << 20
SETTLED = 2000
"""Inputs after which memory is compared: caches and pools are filled by then."""
MOST_FINDINGS = 20


class Target(Protocol):
    """What is fuzzed."""

    name: str

    def make(self, rng: Random) -> bytes:
        """An input."""
        ...

    def check(self, data: bytes) -> str:
        """Feed it; what came of it in a few words. Any exception is a finding."""
        ...

    def close(self) -> str:
        """The end; something to say, or ""."""
        ...


class TooSlow(Exception):
    """An input took longer than it may."""


TARGETS: dict[str, Callable[[], Target]] = {
    "control": ControlFuzz,
    "plan": PlanFuzz,
    "settings": SettingsFuzz,
    "traces": TracesFuzz,
}


@dataclass
class Campaign:
    """What came of many inputs; `findings` are (number, input, error)."""

    target: str
    seed: int
    inputs: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, bytes, str]] = field(default_factory=list)
    seconds: float = 0.0
    slowest_s: float = 0.0
    grown_bytes: int = 0
    told: str = ""


def input_of(target: Target, seed: int, number: int) -> bytes:
    """Input `number` of a seed."""
    return target.make(Random(seed << 32 | number))


def run(target: Target, inputs: int, seed: int, progress: Callable[[int], None] | None = None) -> Campaign:
    """Feed `inputs` inputs; ends early after MOST_FINDINGS. Does not close the target. Main thread only."""
    campaign = Campaign(target.name, seed)
    start, settled = time.monotonic(), 0
    before = signal.signal(signal.SIGALRM, _too_slow)
    try:
        for number in range(inputs):
            _feed(target, campaign, number)
            if number == SETTLED:
                settled = _resident_bytes()
            if number % 1000 == 999 and settled:
                campaign.grown_bytes = max(campaign.grown_bytes, _resident_bytes() - settled)
                if campaign.grown_bytes > GROWTH_BYTES:
                    campaign.findings.append((number, b"", f"memory grew by {campaign.grown_bytes:,} bytes"))
            if number % 1000 == 999 and progress is not None:
                progress(1000)
            if len(campaign.findings) >= MOST_FINDINGS:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    campaign.seconds = time.monotonic() - start
    return campaign


def _feed(target: Target, campaign: Campaign, number: int) -> None:
    data = input_of(target, campaign.seed, number)
    campaign.inputs += 1
    start = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, INPUT_LIMIT_S)
    try:
        campaign.kinds[target.check(data)] += 1
    except Exception as error:  # noqa: BLE001 (whatever it raises is what is looked for)
        campaign.findings.append((number, data, f"{type(error).__name__}: {error}"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    campaign.slowest_s = max(campaign.slowest_s, time.perf_counter() - start)


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow(f"more than {INPUT_LIMIT_S:g} s")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@app.command()
def main(
    target: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.")],
    inputs: Annotated[int, typer.Option(help="How many.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    only: Annotated[int, typer.Option(help="Feed this input alone, with its traceback.")] = -1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Fuzz one target; status 1 if an input crashed it, was handled wrongly, took too long, or made memory grow.

    Example: scripts/fuzz --target plan --inputs 1000000 --seed 3
    """
    console = Console(stderr=True)
    if target not in TARGETS:
        raise typer.BadParameter(f"no target {target!r}; known: {', '.join(TARGETS)}")
    logging.getLogger("eplb_async").setLevel(logging.CRITICAL)  # it says what is wrong with each input
    fuzzed = TARGETS[target]()
    try:
        if only >= 0:
            data = input_of(fuzzed, seed, only)
            console.print(repr(data))
            console.print(fuzzed.check(data))
            return
        with Progress(console=console) as progress:
            task = progress.add_task(f"fuzzing {target}", total=inputs)
            campaign = run(fuzzed, inputs, seed, lambda done: progress.advance(task, done))
    finally:
        told = fuzzed.close()
    campaign.told = told
    _report(campaign, console, json)
    raise typer.Exit(1 if campaign.findings else 0)


def _report(campaign: Campaign, console: Console, as_json: bool) -> None:
    for number, data, error in campaign.findings:
        console.print(f"--only {number}: {error}\n  {data[:200]!r}", markup=False)
    found = {
        "target": campaign.target,
        "seed": campaign.seed,
        "inputs": campaign.inputs,
        "kinds": dict(campaign.kinds.most_common()),
        "findings": len(campaign.findings),
        "seconds": round(campaign.seconds, 1),
        "slowest_ms": round(campaign.slowest_s * 1e3, 1),
        "memory_grown_mib": round(campaign.grown_bytes / 2**20, 1),
        "note": campaign.told,
    }
    if as_json:
        print(json_module.dumps(found))
    else:
        for key, value in found.items():
            console.print(f"{key:18} {value}")

"""Tables of what the cases wrote: step times and throughput, balance and its way back after a change, outputs, faults."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Steps", "par_series", "rebalances", "report", "runs_in", "steps_of"]

AROUND_CHANGE_S = 0.02
"""A change of the router stops the engine: steps so close to one are left out."""
LOCAL_STEPS = 51
"""Of both ranks; a step near an event is compared with the median of this many around it."""
TREND_STEPS = 401
"""Contexts grow, and so do steps: what is long is told from the median of this many around it, more than a plan lasts."""
LONG_MS = 1.0
SMOOTH_STEPS = 10

Array = NDArray[np.float64]
Run = Mapping[str, Any]


def report(folder: Path) -> str:
    """Markdown of all results in a folder; sections without results are left out."""
    runs = runs_in(folder)
    sections = {"decode": _decode, "prefill": _prefill, "outputs": _outputs, "faults": _faults}
    return "\n\n".join(f"## {name}\n\n{make(runs[name])}" for name, make in sections.items() if name in runs)


def runs_in(folder: Path) -> Mapping[str, Mapping[str, list[Run]]]:
    """What the cases wrote: by scenario and mode."""
    runs: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*-*-*.json")):
        scenario, *mode, _ = path.stem.split("-")
        runs[scenario]["-".join(mode)].append(json.loads(path.read_text()))
    return runs


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Steps of both ranks in the order of time, between two marks, without those around changes of the router.

    Attributes:
        starts: when each began.
        ms: until the next began.
        device_ms: device time from the end of its forward to the end of the next one's.
        with_plan: a plan, or a rebalance of vLLM's, was under way.
    """

    starts: Array
    ms: Array
    device_ms: Array
    with_plan: NDArray[np.bool_]


def steps_of(run: Run, begin: str = "begin", end: str = "end") -> Steps:
    """See Steps."""
    parts = []
    for worker in run["workers"]:
        began, device = np.array(worker["begin"]), np.array(worker["device_ms"])
        took, busy = 1e3 * np.diff(began), np.zeros(len(began))
        for when, _, held, *_ in worker["eplb"]:
            index = int(np.searchsorted(began, when)) - 1
            busy[index] = max(busy[index], held)
        inside = (began[:-1] >= run["marks"][begin]) & (began[1:] <= run["marks"][end])
        for before, after in run["changes"]:
            inside &= (began[1:] < before - AROUND_CHANGE_S) | (began[:-1] > after + AROUND_CHANGE_S)
        number = min(len(took), len(device))
        part = np.stack([began[:number], took[:number], device[:number], busy[:number]])
        parts.append(part[:, inside[:number]])
    joined = np.concatenate(parts, axis=1)
    starts, ms, device_ms, with_plan = joined[:, np.argsort(joined[0], kind="stable")]
    return Steps(starts=starts, ms=ms, device_ms=device_ms, with_plan=with_plan > 0)


def rebalances(run: Run) -> list[tuple[int, int]]:
    """(steps from a rank's first step with the plan to its last commit, entries) of each plan of ours within the run, rank 0."""
    found, begun, entries = [], None, 0
    for index, (_, _, busy, _, length) in enumerate(run["workers"][0]["eplb"]):
        if busy and begun is None:
            begun = index
        entries = max(entries, length) if busy else entries
        if not busy and begun is not None:
            found.append((index - begun, entries))
            begun, entries = None, 0
    return found


def _decode(modes: Mapping[str, list[Run]]) -> str:
    rows, paired = [], []
    for mode, runs in modes.items():
        columns = [_decode_values(run) for run in runs]
        rows.append([mode, len(runs), *_cells(columns, _DECODE_COLUMNS)])
        if any(steps_of(run).with_plan.any() for run in runs):
            paired.append([mode, len(runs), *_cells([_paired_values(run) for run in runs], _PAIRED_COLUMNS)])
    both = _table(["mode", "runs", *_DECODE_COLUMNS], rows)
    within = _table(["mode", "runs", *_PAIRED_COLUMNS], paired)
    return f"{both}\n\nWithin a run, steps with a plan under way against those without:\n\n{within}"


def _decode_values(run: Run) -> dict[str, float]:
    steps = steps_of(run)
    over = steps.device_ms - _running_median(steps.device_ms, TREND_STEPS)
    values = {
        "p50": float(np.median(steps.ms)),
        "p99": float(np.percentile(steps.ms, 99)),
        "max": float(steps.ms.max()),
        "tokens": 1e3 * run["scenario"]["batch"] / float(steps.ms.mean()),
        "device_p50": float(np.median(steps.device_ms)),
        "device_p99": float(np.percentile(steps.device_ms, 99)),
        "over_p99": float(np.percentile(over, 99)),
        "over_max": float(over.max()),
        "long": 100 * float((over > LONG_MS).mean()),
        "num_steps": len(over),
    }
    if run["workers"][0]["eplb"]:
        held = [1e6 * took for worker in run["workers"] for _, took, *_ in worker["eplb"]]
        values["held"] = float(np.median(held))
    if found := rebalances(run):
        values["plans"] = len(found)
        whole = [steps for steps, entries in found if not entries or entries >= run["scenario"]["layers"]]
        if whole:
            values["whole"], values["whole_max"] = float(np.median(whole)), max(whole)
    if "check" in run:
        values["wrong"] = run["check"]["wrong_slots"] + run["check"]["wrong_map_entries"]
    return values


def _paired_values(run: Run) -> dict[str, float]:
    steps = steps_of(run)
    device, plan = steps.device_ms, steps.with_plan
    if not plan.any() or plan.all():
        return {"share": 100 * float(plan.mean())}
    over, without = device - _running_median(device, TREND_STEPS), device[~plan]
    return {
        "share": 100 * float(plan.mean()),
        "mean_without": float(without.mean()),
        "mean_with": float(device[plan].mean()),
        "p99_without": float(np.percentile(without, 99)),
        "p99_with": float(np.percentile(device[plan], 99)),
        "long_without": 100 * float((over[~plan] > LONG_MS).mean()),
        "long_with": 100 * float((over[plan] > LONG_MS).mean()),
        "over_without": float(over[~plan].max()),
        "over_with": float(over[plan].max()),
        "throughput": 100 * float(without.mean() / device.mean()),
    }


def _cells(values: Sequence[Mapping[str, float]], columns: Mapping[str, tuple[str, int]]) -> list[str]:
    return [_spread([value[key] for value in values if key in value], digits) for key, digits in columns.values()]


_DECODE_COLUMNS = {
    "p50 ms": ("p50", 3),
    "p99 ms": ("p99", 3),
    "longest ms": ("max", 2),
    "tok/s": ("tokens", 0),
    "device p50 ms": ("device_p50", 3),
    "device p99 ms": ("device_p99", 3),
    "device, over the median around it: p99 ms": ("over_p99", 3),
    "max ms": ("over_max", 2),
    "more than 1 ms, % of steps": ("long", 2),
    "steps": ("num_steps", 0),
    "host time in EPLB, p50 us": ("held", 0),
    "rebalances": ("plans", 0),
    "steps of a rebalance, p50": ("whole", 0),
    "steps of a rebalance, max": ("whole_max", 0),
    "wrong slots and map entries": ("wrong", 0),
}
_PAIRED_COLUMNS = {
    "steps with a plan, %": ("share", 0),
    "mean ms without": ("mean_without", 3),
    "with": ("mean_with", 3),
    "p99 ms without": ("p99_without", 2),
    "with ": ("p99_with", 2),
    "over the median around it by more than 1 ms, % of those without": ("long_without", 2),
    "of those with": ("long_with", 2),
    "by at most, ms, without": ("over_without", 2),
    "with  ": ("over_with", 2),
    "throughput, % of that without plans": ("throughput", 2),
}


def _prefill(modes: Mapping[str, list[Run]]) -> str:
    rows = []
    for mode, runs in modes.items():
        values: dict[str, list[float]] = defaultdict(list)
        for run in runs:
            steps = steps_of(run)
            change, begin, end = run["marks"]["change_0"], run["marks"]["begin"], run["marks"]["end"]
            spans = {
                "before": (begin + 0.5 * (change - begin), change),
                "change": (change, end),
                "after": (change + 0.5 * (end - change), end),
            }
            for name, (first, last) in spans.items():
                inside = (steps.starts >= first) & (steps.starts < last)
                values[f"tokens_{name}"].append(_tokens_per_s(run, first, last))
                values[f"p99_{name}"].append(float(np.percentile(steps.ms[inside], 99)))
                values[f"max_{name}"].append(float(steps.ms[inside].max()))
            for name, par in _pars(run, spans):
                values[name].append(par)
            restored = _restored_s(run, change)
            if restored is not None:
                values["restored"].append(restored)
            if "check" in run:
                values["wrong"].append(run["check"]["wrong_slots"] + run["check"]["wrong_map_entries"])
            if mode.startswith("ours"):
                done = [decision for decision in run["decisions"] if decision["outcome"] == "finished"]
                values["plans"].append(len(done))
                values["moves"].append(sum(decision["num_moves"] for decision in done))
        rows.append([mode, len(runs), *(_spread(values[key], digits) for key, digits in _PREFILL_COLUMNS.values())])
    return _table(["mode", "runs", *_PREFILL_COLUMNS], rows)


_PREFILL_COLUMNS = {
    "tok/s before the change": ("tokens_before", 0),
    "PAR before": ("par_before", 3),
    "tok/s from the change on": ("tokens_change", 0),
    "tok/s at the end": ("tokens_after", 0),
    "PAR at the end": ("par_after", 3),
    "p99 ms from the change on": ("p99_change", 1),
    "max ms from the change on": ("max_change", 1),
    "seconds until balance is back": ("restored", 2),
    "plans": ("plans", 0),
    "experts moved": ("moves", 0),
    "wrong slots and map entries": ("wrong", 0),
}


def _tokens_per_s(run: Run, first: float, last: float) -> float:
    """Of one rank's steps that began between two times."""
    began, tokens = np.array(run["workers"][0]["begin"]), np.array(run["workers"][0]["tokens"])
    inside = np.flatnonzero((began >= first) & (began < last))
    return float(tokens[inside[:-1]].sum() / (began[inside[-1]] - began[inside[0]]))


def _pars(run: Run, spans: Mapping[str, tuple[float, float]]) -> Iterator[tuple[str, float]]:
    when, par = par_series(run)
    for name, (first, last) in spans.items():
        inside = (when >= first) & (when < last)
        if inside.any():
            yield f"par_{name}", float(par[inside].mean())


def par_series(run: Run) -> tuple[Array, Array]:
    """When steps began whose loads were kept, and their PAR, mean over layers."""
    worker = run["workers"][0]
    known = [(entry[0], par) for entry, par in zip(worker["eplb"], worker["par"], strict=False) if par is not None]
    when, par = zip(*known, strict=True) if known else ((), ())
    return np.array(when), np.array(par)


def _restored_s(run: Run, change: float) -> float | None:
    """From the change of traffic until nine tenths of what balancing brings back are back, of the PAR's running mean."""
    when, par = par_series(run)
    after = when > change
    when, par = when[after], par[after]
    if len(par) < 4 * SMOOTH_STEPS:
        return None
    smooth = np.convolve(par, np.full(SMOOTH_STEPS, 1 / SMOOTH_STEPS), "valid")
    first, last = float(smooth[0]), float(np.mean(par[-len(par) // 4 :]))
    if first - last < 0.01:
        return None
    back = np.flatnonzero(smooth <= last + 0.1 * (first - last))
    return float(when[back[0] + SMOOTH_STEPS - 1] - change) if len(back) else None


def _outputs(modes: Mapping[str, list[Run]]) -> str:
    rows = []
    reference = next(iter(modes.values()))[0]["digests"]
    for mode, runs in modes.items():
        for run in runs:
            pairs = list(zip(run["digests"], reference, strict=False))
            check = run.get("check", {})
            finished = [decision for decision in run.get("decisions", []) if decision["outcome"] == "finished"]
            rows.append(
                [
                    mode,
                    len(pairs),
                    len(pairs) * run["scenario"]["tokens"],
                    sum(ours != theirs for ours, theirs in pairs),
                    len(set(run["digests"])),
                    run["distinct_tokens"],
                    len(finished),
                    sum(decision["num_committed"] for decision in finished),
                    sum(decision["num_moves"] for decision in finished),
                    check.get("wrong_slots", "-"),
                    check.get("wrong_map_entries", "-"),
                ]
            )
    head = ["mode", "requests", "tokens", "requests that differ from the first run", "different answers"]
    more = ["different tokens", "plans committed", "layer commits", "experts moved", "wrong slots", "wrong map entries"]
    return _table([*head, *more], rows)


def _faults(modes: Mapping[str, list[Run]]) -> str:
    rows = []
    for mode, runs in modes.items():
        for run in runs:
            steps, marks = steps_of(run), run["marks"]
            local = steps.device_ms - _running_median(steps.device_ms, LOCAL_STEPS)
            about = [marks[name] for name in ("kill_0", "serve_0", "fault_0")]
            # the step in which an event happens is left out: planting the fault stops the engine
            near = [_longest(local, steps.starts, mark, mark + 1.0) for mark in about]
            calm = [_longest(local, steps.starts, mark - 1.05, mark - 0.05) for mark in about]
            killed = run["decisions_of_the_killed"]
            drops = [decision for decision in run["decisions"] if decision["outcome"] == "dropped"]
            rows.append(
                [
                    mode,
                    run["unfinished"],
                    *(f"{value:.1f} ({before:.1f})" for value, before in zip(near, calm, strict=True)),
                    sum(decision["outcome"] == "finished" for decision in killed),
                    sum(decision["outcome"] == "finished" for decision in run["decisions"]),
                    len(drops),
                    run["status_exit"],
                    run["check"]["wrong_slots"] + run["check"]["wrong_map_entries"],
                    len(run["segments_left"]),
                ]
            )
    head = ["mode", "failed requests", "longest step over the local median in 1 s from the kill (before it), ms"]
    head += ["from the restart", "from the fault"]
    more = ["plans before the kill", "plans of the new daemon", "of them dropped", "exit of `status`"]
    return _table([*head, *more, "wrong slots and map entries", "segments left"], rows)


def _longest(local: Array, starts: Array, first: float, last: float) -> float:
    return float(local[(starts > first) & (starts < last)].max())


def _running_median(values: Array, width: int) -> Array:
    half = width // 2
    padded = np.pad(values, half, mode="symmetric")
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1))


def _spread(values: Sequence[float], digits: int) -> str:
    """Median and range over the runs."""
    if not values:
        return "-"
    middle = f"{median(values):,.{digits}f}"
    low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
    return middle if low == high else f"{middle} ({low} to {high})"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])

"""From the files of a mode's ranks to one summary, and to rows of a table."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.reporting import Column
from eplb_async.core.score import par

__all__ = ["COLUMNS", "RunFiles", "Summary", "read_run", "summarise"]

COLUMNS = [
    Column(key="mode", title="mode"),
    Column(key="mean_ms", title="mean ms", ratio=True),
    Column(key="p50_ms", title="p50 ms", ratio=True),
    Column(key="p99_ms", title="p99 ms", ratio=True),
    Column(key="max_ms", title="max ms", digits=1),
    Column(key="total_s", title="total s", digits=2),
    Column(key="tokens_per_s", title="tokens/s", digits=0, ratio=True),
    Column(key="par", title="PAR", ratio=True),
    Column(key="plans", title="plans"),
    Column(key="commits", title="commits"),
    Column(key="moves", title="moves"),
    Column(key="hook_p50_us", title="hook p50 us", digits=1),
    Column(key="outputs", title="outputs"),
]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What all ranks of a mode left (see serving.py).

    Attributes:
        step_ms_RT: times of each rank.
        rows_TLR: pairs that each rank computed.
        maps_TLP: the placement of each step, the same on all ranks.
        hook_us_RT: host time in the hook.
        facts: of each rank.
    """

    step_ms_RT: NDArray[np.float64]
    rows_TLR: NDArray[np.int64]
    maps_TLP: NDArray[np.int16]
    hook_us_RT: NDArray[np.float64]
    facts: list[dict[str, Any]]

    @property
    def commits(self) -> list[tuple[int, int, int]]:
        """(step, layer, slots that changed) for every layer whose placement is another than one step before."""
        changed_TL = (self.maps_TLP[1:] != self.maps_TLP[:-1]).sum(axis=2)
        return [(int(t) + 1, int(layer), int(changed_TL[t, layer])) for t, layer in np.argwhere(changed_TL)]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A mode's numbers; the first `skip` steps are left out of times and PAR.

    Attributes:
        mode: which.
        mean_ms, p50_ms, p99_ms, max_ms, total_s: of the steps, each as long as on its slowest rank.
        tokens_per_s: of all ranks.
        par: mean over steps and layers of max / mean over ranks of the pairs they computed.
        plans, commits, moves: plans applied, layers committed (one step and layer each), slots filled anew.
        hook_p50_us, hook_p99_us: host time in before_forward and after_forward, all ranks' steps.
        commit_p50_ms, commit_max_ms: of steps with a commit or a stop of the world.
        steps, skip: how many.
    """

    mode: str
    mean_ms: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    total_s: float
    tokens_per_s: float
    par: float
    plans: int
    commits: int
    moves: int
    hook_p50_us: float | None
    hook_p99_us: float | None
    commit_p50_ms: float | None
    commit_max_ms: float | None
    steps: int
    skip: int

    def row(self) -> dict[str, Any]:
        """By field."""
        return asdict(self)


def read_run(folder: Path) -> RunFiles:
    """Read a mode's directory.

    Raises:
        FileNotFoundError: it holds no run.
        ValueError: its ranks did not have the same placement, or the same routing, at some step.
    """
    count = len(list(folder.glob("rank*.step_ms.npy")))
    if not count:
        raise FileNotFoundError(f"{folder} holds no run")
    times, rows, maps, ids, hook, facts = [], [], [], [], [], []
    for rank in range(count):
        times.append(np.load(folder / f"rank{rank}.step_ms.npy"))
        with np.load(folder / f"rank{rank}.npz") as file:
            rows.append(file["rows_TL"])
            maps.append(file["maps_TLP"])
            ids.append(file["ids_T"])
            hook.append(file["before_us_T"] + file["after_us_T"])
        facts.append(json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")))
    for what, arrays in (("placement", maps), ("routing", ids)):
        for rank, array in enumerate(arrays):
            if not np.array_equal(array, arrays[0]):
                step = int(np.argwhere(array != arrays[0])[0, 0])
                raise ValueError(f"{folder}: rank {rank} had another {what} than rank 0 at step {step}")
    return RunFiles(
        step_ms_RT=np.stack(times),
        rows_TLR=np.stack(rows, axis=-1),
        maps_TLP=maps[0],
        hook_us_RT=np.stack(hook),
        facts=facts,
    )


def par_per_step(run: RunFiles) -> NDArray[np.float64]:
    """PAR of each step, mean over layers, [T]."""
    return np.asarray(par(run.rows_TLR).mean(axis=1), dtype=np.float64)


def summarise(run: RunFiles, skip: int) -> Summary:
    """The numbers of a mode. `skip`: first steps that do not count; fewer than there are."""
    facts = run.facts[0]
    step_ms = run.step_ms_RT.max(axis=0)[skip:]
    p50, p99 = np.percentile(step_ms, (50, 99)).tolist()
    config = facts["config"]
    commits, rebalances = run.commits, facts["rebalances"]
    plans = facts["hook"]["num_plans"] - facts["hook"]["num_drops"] if facts["hook"] else len(rebalances)
    hook = np.percentile(run.hook_us_RT[:, skip:], (50, 99)).tolist() if facts["hook"] else [None, None]
    stopped = sorted({rebalance["step"] for rebalance in rebalances} or {step for step, _, _ in commits})
    at_commits = run.step_ms_RT.max(axis=0)[[step for step in stopped if step >= skip]]
    return Summary(
        mode=facts["mode"],
        mean_ms=float(step_ms.mean()),
        p50_ms=p50,
        p99_ms=p99,
        max_ms=float(step_ms.max()),
        total_s=float(step_ms.sum()) / 1e3,
        tokens_per_s=len(step_ms) * config["num_ranks"] * config["tokens_per_rank"] / (float(step_ms.sum()) / 1e3),
        par=float(par_per_step(run)[skip:].mean()),
        plans=plans,
        commits=len(commits),
        moves=sum(moves for _, _, moves in commits),
        hook_p50_us=hook[0],
        hook_p99_us=hook[1],
        commit_p50_ms=float(np.median(at_commits)) if len(at_commits) else None,
        commit_max_ms=float(at_commits.max()) if len(at_commits) else None,
        steps=len(run.step_ms_RT[0]),
        skip=skip,
    )

"""Ranks on one or two GPUs, in processes of their own: the protocol as on the CPU, and what only devices can break.

`make test-gpu` also runs tests/rank/test_plans.py and test_faults.py with EPLB_TEST_DEVICE=cuda.
"""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from eplb_async.core.errors import PeerLost
from eplb_async.core.spec import MoESpec
from tests.gpu import ranks as on_gpu
from tests.model.trace_check import check_traces
from tests.rank.harness import RankGroup, hook_settings
from tests.rank.publisher import Publisher, shuffled
from tests.rank.test_plans import corrupt
from tests.rank.test_traces import events_of
from tests.rank.tracing import TracedHook

pytestmark = pytest.mark.gpu

PAIR = MoESpec(num_layers=3, num_experts=10, num_ranks=2, num_redundant=2)
MANY = MoESpec(num_layers=40, num_experts=6, num_ranks=2)


def shuffle_all(daemon: Publisher, random: np.random.Generator) -> None:
    """Post a plan that changes every layer, and take it for applied."""
    spec = daemon.spec
    changes = [(layer, shuffled(daemon.rows_LP[layer], random, spec)) for layer in range(spec.num_layers)]
    daemon.applied(daemon.post(daemon.plan(changes)))


@pytest.mark.parametrize("lag", [1, 2])
def test_plans_are_committed_as_the_model_allows(group: str, runtime_dir: Path, lag: int) -> None:
    """Equal maps in each step, every slot its expert's bytes, and event traces that are behaviours of the model."""
    settings = hook_settings(runtime_dir, lag=lag, staging_rows=3)
    with RankGroup(group, PAIR, settings, hook_class=TracedHook, device="cuda") as ranks:
        ranks.attach()
        daemon, random = Publisher(group, PAIR), np.random.default_rng(lag)
        start = daemon.rows_LP.tolist()
        for _ in range(6):
            shuffle_all(daemon, random)
            ranks.step_until(daemon.done)
            assert ranks.rows() == daemon.rows_LP.tolist()
            ranks.check()
        traces, info = ranks.all("call", events_of), daemon.words.info
        found = check_traces(traces, daemon.trace, start, PAIR.slots_per_rank, info.lag, 3)
        daemon.close()
    assert found.accepted, str(found)


def test_a_captured_forward_sees_new_maps(group: str, runtime_dir: Path) -> None:
    """I8: at the replay after the commit; the hook's calls inside of the capture did nothing."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir), device="cuda") as ranks:
        ranks.attach()
        daemon, random = Publisher(group, PAIR), np.random.default_rng(5)
        for _ in range(3):
            shuffle_all(daemon, random)
            while not daemon.done():
                assert all(all(same) for same in ranks.all("call", on_gpu.graph_reads_new_maps, 5))
            assert ranks.rows() == daemon.rows_LP.tolist()
        daemon.close()


def test_nothing_waits_for_the_device(group: str, runtime_dir: Path) -> None:
    """With a plan and without: torch sees no synchronisation, and the profiler none of the calls that wait."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir), device="cuda") as ranks:
        ranks.attach()
        daemon, random = Publisher(group, PAIR), np.random.default_rng(6)
        shuffle_all(daemon, random)
        while not daemon.done():
            ranks.all("call", on_gpu.unsynchronised_steps, 20)
        shuffle_all(daemon, random)
        for calls in ranks.all("call", on_gpu.counted_calls, 200):
            waits = {name for name in calls if "Synchronize" in name}
            # the profiler itself waits once when it ends
            assert sum(calls[name] for name in waits) <= 2, calls
        ranks.step_until(daemon.done)
        ranks.check()
        daemon.close()


def test_corrupted_bytes_are_caught_and_dropped_everywhere(group: str, runtime_dir: Path) -> None:
    """A source that changed since attach: the puller's fingerprint differs, all ranks drop the plan at one step."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir), device="cuda") as ranks:
        ranks.attach()
        # expert 2 has this replica only, so rank 1 has to pull it
        ranks.ask(0, "call", corrupt, 0, 2)
        daemon = Publisher(group, PAIR)
        row_P, width = daemon.rows_LP[0].copy(), PAIR.slots_per_rank
        row_P[[2, width]] = row_P[[width, 2]]
        before = ranks.rows()
        daemon.post(daemon.plan([(0, row_P)]))
        ranks.step_until(daemon.done)
        assert ranks.rows() == before
        assert [ranks.ask(rank, "statistics_of", "num_drops") for rank in range(2)] == [1, 1]
        assert "do not match the fingerprint" in ranks.ask(1, "statistics_of", "last_error")
        daemon.close()


def test_no_memory_for_staging_is_an_error_of_attach(group: str, runtime_dir: Path) -> None:
    """Named, with what was asked for and what to set, and nothing is left behind."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir, staging_rows=1 << 31), device="cuda") as ranks:
        errors = ranks.all("call", on_gpu.try_attach)
        assert all(error.startswith("SpecError: no memory on cuda:") for error in errors), errors
        assert all("hook.staging_rows" in error for error in errors)


@pytest.mark.timeout(300)
def test_ten_thousand_commits_leave_memory_and_handles_where_they_were(group: str, runtime_dir: Path) -> None:
    """Of device memory and of files, after a first plan that loads what is loaded once."""
    with RankGroup(group, MANY, hook_settings(runtime_dir), device="cuda") as ranks:
        ranks.attach()
        daemon, random, before = Publisher(group, MANY), np.random.default_rng(8), []
        plans, commits = 0, 0
        while commits < 10_000:
            shuffle_all(daemon, random)
            while not daemon.done():
                (commits, drops), _ = ranks.all("call", on_gpu.commit_many, 20)
                assert drops == 0
            plans += 1
            if plans == 5:
                before = ranks.all("call", on_gpu.device_memory) + ranks.all("call", on_gpu.open_files)
        assert ranks.all("call", on_gpu.device_memory) + ranks.all("call", on_gpu.open_files) == before
        ranks.check()
        daemon.close()


def test_ranks_that_attach_again_leave_no_memory_behind(group: str, runtime_dir: Path) -> None:
    """Handles are closed and pages given back at detach."""
    with RankGroup(group, PAIR, hook_settings(runtime_dir), device="cuda") as ranks:
        found = []
        for _ in range(6):
            ranks.attach()
            ranks.step(5)
            ranks.all("detach")
            found.append(ranks.all("call", on_gpu.device_memory))
        assert found[-1] == found[1]


def test_a_killed_rank_ends_the_group_and_the_next_one_works(group: str, runtime_dir: Path) -> None:
    """Kill -9 while others read its memory: PeerLost names it, no crash, and all attach again to a new incarnation."""
    settings = hook_settings(runtime_dir, pull_bytes_per_step=1)
    with RankGroup(group, PAIR, settings, device="cuda") as ranks:
        ranks.attach()
        daemon = Publisher(group, PAIR)
        shuffle_all(daemon, np.random.default_rng(9))
        ranks.step(3)
        daemon.close()
        ranks.send(0, "step", 400)
        ranks.kill(1)
        error = ranks.receive(0)
        assert isinstance(error, PeerLost)
        assert error.rank == 1
        rows = np.array(ranks.rows(), dtype=np.int32)
        ranks.ask(0, "detach")
        ranks.restart(1)
        # the new process loads its weights by the map that the others have
        ranks.attach(rows)
        ranks.step(5)
        ranks.check()


def test_memory_that_cannot_be_shared_is_refused(group: str, runtime_dir: Path) -> None:
    """Expandable segments have no IPC handle: attach says what to set."""
    script = f"""
        import torch
        from tests.rank.harness import hook_settings
        from eplb_async import MoESpec, RankHook
        from eplb_async.core.errors import SpecError
        from pathlib import Path

        weights = [torch.zeros(2, 1 << 20, device="cuda")]
        load = torch.zeros(1, 2, dtype=torch.int32, device="cuda")
        try:
            RankHook.attach(group="{group}", rank=0, spec=MoESpec(num_layers=1, num_experts=2, num_ranks=1),
                            weights=weights, load=load, settings=hook_settings(Path("{runtime_dir}")))
        except SpecError as error:
            assert "expandable_segments:False" in str(error), error
        else:
            raise SystemExit("it attached")
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", dedent(script)],
        env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr

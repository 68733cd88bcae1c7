"""What an engine sees of the hook, on one rank."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from eplb_async.core.errors import HookClosed, LifecycleError, UnknownName
from eplb_async.core.load import LoadKind, Phase
from eplb_async.core.plan import FIRST_COUNTER, counter
from eplb_async.rank.hook import RankHook
from eplb_async.rank.stager import Stager
from eplb_async.shm.ring import PHASES, Batch, LoadRing
from tests.rank.publisher import Publisher
from tests.rank.solo import SOLO, attached


def records(hook: RankHook) -> Batch:
    """What a daemon reads from the ring of rank 0."""
    ring = LoadRing.open(hook.group, 0, hook._parts.membership.words.incarnation)
    batch = ring.read()
    ring.close()
    return batch


def run_plan(hook: RankHook, daemon: Publisher) -> None:
    """Change all layers, to the last commit."""
    changes = [(layer, np.roll(daemon.rows_LP[layer], 1)) for layer in range(SOLO.num_layers)]
    plan = daemon.post(daemon.plan(changes))
    while not daemon.done():
        with hook.step():
            time.sleep(1e-4)  # a forward that leaves the interpreter to the threads, as real ones do
    daemon.applied(plan)


def test_a_step_records_its_load_and_zeroes_it(group: str, runtime_dir: Path) -> None:
    """The record holds step, phase, map version, tokens and counts; the tensor is zero for the next step."""
    with attached(group, runtime_dir) as (hook, load):
        for step in range(3):
            with hook.step("prefill", num_tokens=10 + step):
                load += step + 1
            assert not load.any()
        batch = records(hook)
    assert batch.step.tolist() == [0, 1, 2]
    assert [PHASES[phase] for phase in batch.phase] == [Phase.PREFILL] * 3
    assert batch.tokens.tolist() == [10, 11, 12]
    assert batch.version.tolist() == [FIRST_COUNTER] * 3
    assert (batch.counts == np.arange(1, 4)[:, None, None]).all()


def test_a_record_tells_how_long_the_step_before_took(group: str, runtime_dir: Path) -> None:
    """By the hook's clock, or as the engine measured it; the first step has none before it."""
    with attached(group, runtime_dir) as (hook, _):
        for measured in (None, None, 1234.5, 0):
            with hook.step("decode", last_step_us=measured):
                time.sleep(2e-3)
        batch = records(hook)
    first, clocked, *measured_us = batch.previous_us.tolist()
    assert (first, measured_us) == (0, [1234, 0])
    assert 2000 <= clocked < 2_000_000
    assert not batch.pulled.any()


def test_records_tell_what_was_pulled(group: str, runtime_dir: Path) -> None:
    """All that a plan pulls is told, each byte once."""
    with attached(group, runtime_dir) as (hook, _):
        run_plan(hook, Publisher(group, SOLO))
        batch = records(hook)
        assert batch.pulled.sum() == hook.statistics().bytes_pulled > 0
        assert batch.pulled[0] == 0


def test_what_a_forward_was_may_be_told_afterwards(group: str, runtime_dir: Path) -> None:
    """`after_forward` replaces what before_forward said, each part for itself; a forward that turns out idle counts nothing."""
    with attached(group, runtime_dir) as (hook, load):
        for after in ({}, {"phase": "prefill", "num_tokens": 9}, {"num_tokens": 0}, {"phase": Phase.DUMMY}):
            hook.before_forward("decode", num_tokens=4)
            load += 1
            hook.after_forward(**after)
        hook.before_forward("mixed", num_tokens=3)
        hook.after_forward()
        batch = records(hook)
    assert [PHASES[number].value for number in batch.phase] == ["decode", "prefill", "decode", "dummy", "mixed"]
    assert batch.tokens.tolist() == [4, 9, 0, 4, 3]
    assert batch.counts.any(axis=(1, 2)).tolist() == [True, True, True, False, False]


def test_an_unknown_phase_afterwards_leaves_the_step_open(group: str, runtime_dir: Path) -> None:
    """It is the caller's error; told again with a known one, the step ends as usual."""
    with attached(group, runtime_dir) as (hook, _):
        hook.before_forward()
        with pytest.raises(UnknownName, match="decoding"):
            hook.after_forward("decoding")
        hook.after_forward("decode")
        assert [PHASES[number].value for number in records(hook).phase] == ["decode"]


@pytest.mark.parametrize("phase", ["dummy", "profile"])
def test_idle_steps_count_no_load(group: str, runtime_dir: Path, phase: str) -> None:
    """Dummy and profile steps are steps and are recorded as such, but without their counts, which are not kept either."""
    with attached(group, runtime_dir) as (hook, load):
        with hook.step(phase):
            load += 5
        with hook.step(Phase.MIXED):
            pass
        batch = records(hook)
    assert [PHASES[number].value for number in batch.phase] == [phase, "mixed"]
    assert not batch.counts.any()


@pytest.mark.parametrize(
    ("width", "kind", "found"),
    [
        (SOLO.num_experts, None, LoadKind.LOGICAL),
        (SOLO.num_slots, LoadKind.GLOBAL_SLOTS, LoadKind.GLOBAL_SLOTS),
        (SOLO.slots_per_rank, LoadKind.LOCAL_SLOTS, LoadKind.LOCAL_SLOTS),
    ],
)
def test_the_ring_says_what_is_counted(
    group: str, runtime_dir: Path, width: int, kind: LoadKind | None, found: LoadKind
) -> None:
    """Counts of experts, of all slots, or of own slots go into the ring as they are, with their kind."""
    load = torch.zeros(SOLO.num_layers, width, dtype=torch.int32)
    with attached(group, runtime_dir, load=load, load_kind=kind) as (hook, load):
        with hook.step():
            load += torch.arange(width, dtype=torch.int32)
        ring = LoadRing.open(group, 0, hook._parts.membership.words.incarnation)
        assert ring.info.kind is found
        assert ring.read().counts[0].tolist() == [list(range(width))] * SOLO.num_layers
        ring.close()


def test_counts_carry_the_version_of_the_maps_they_were_made_with(group: str, runtime_dir: Path) -> None:
    """The version of a record is `decided` when its forward began: it changes at the step of the commit."""
    with attached(group, runtime_dir) as (hook, _):
        daemon = Publisher(group, SOLO)
        run_plan(hook, daemon)
        versions = records(hook).version.tolist()
        daemon.close()
    assert sorted(set(versions)) == [FIRST_COUNTER, counter(1, 1), counter(2, 0)]
    assert versions == sorted(versions)


def test_commits_are_told_without_looking_at_the_device(group: str, runtime_dir: Path) -> None:
    """`num_commits` grows by one with each entry, and `live` is the placement in the tensors, of which an older copy stays as it was."""
    with attached(group, runtime_dir) as (hook, _):
        daemon, before = Publisher(group, SOLO), hook.live
        rows = before.rows_LP.tolist()
        assert (hook.num_commits, before.versions) == (0, (0,) * SOLO.num_layers)
        run_plan(hook, daemon)
        assert hook.num_commits == SOLO.num_layers
        assert hook.live.rows_LP.tolist() == hook.slot_to_expert_LP.tolist() != rows
        assert hook.live.versions == tuple(counter(1, layer + 1) for layer in range(SOLO.num_layers))
        assert before.rows_LP.tolist() == rows
        daemon.close()


def test_a_full_ring_never_blocks(group: str, runtime_dir: Path) -> None:
    """Without a reader the oldest records are overwritten, and the reader is told how many."""
    with attached(group, runtime_dir, ring_records=4) as (hook, _):
        for _ in range(50):
            hook.before_forward()
            hook.after_forward()
        batch = records(hook)
    assert batch.lost == 46
    assert batch.step.tolist() == [46, 47, 48, 49]


def test_idle_steps_take_the_short_way_and_a_plan_ends_it(group: str, runtime_dir: Path) -> None:
    """Nothing happens: no step polls or looks for copies. A plan, and an abort, are seen at the next step all the same."""
    with attached(group, runtime_dir) as (hook, _):
        for _ in range(5):
            with hook.step():
                pass
        polls = hook.statistics().times["poll"].num
        for _ in range(50):
            with hook.step():
                pass
        assert hook.statistics().times["poll"].num == polls
        assert hook.statistics().times["agree"].num == 55
        daemon = Publisher(group, SOLO)
        run_plan(hook, daemon)
        assert hook.slot_to_expert_LP.tolist() == daemon.rows_LP.tolist()
        for _ in range(5):
            with hook.step():
                pass
        polls = hook.statistics().times["poll"].num
        with hook.step():
            pass
        assert hook.statistics().times["poll"].num == polls
        daemon.abort(2)
        for _ in range(5):
            with hook.step():
                pass
        assert hook.statistics().num_drops == 1
        daemon.close()


def test_map_tensors_keep_their_memory(group: str, runtime_dir: Path) -> None:
    """I8: commits rewrite rows in place; captured graphs go on reading the same addresses."""
    with attached(group, runtime_dir) as (hook, _):
        maps = hook.slot_to_expert_LP, hook.dispatch_table_LEK, hook.dispatch_count_LE
        before = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in maps]
        daemon = Publisher(group, SOLO)
        for _ in range(3):
            run_plan(hook, daemon)
        maps = hook.slot_to_expert_LP, hook.dispatch_table_LEK, hook.dispatch_count_LE
        assert [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in maps] == before
        assert hook.slot_to_expert_LP.tolist() == daemon.rows_LP.tolist()
        daemon.close()


def test_an_unknown_phase_is_refused_before_the_step(group: str, runtime_dir: Path) -> None:
    """The message lists the phases, and the step can still be made."""
    with attached(group, runtime_dir) as (hook, _):
        with pytest.raises(UnknownName, match="decode, dummy, mixed, prefill, profile"):
            hook.before_forward("warmup")
        with hook.step():
            pass
        assert hook.statistics().step == 1


def test_steps_do_not_nest(group: str, runtime_dir: Path) -> None:
    """before_forward twice is an error of the engine; the step that runs is not disturbed."""
    with attached(group, runtime_dir) as (hook, load):
        hook.before_forward("decode")
        load += 1
        with pytest.raises(LifecycleError, match="after_forward of step 0 was not called"):
            hook.before_forward("decode")
        hook.after_forward()
        hook.after_forward()
        assert records(hook).counts.sum() == load.numel()
        assert hook.statistics().step == 1


def test_a_forward_that_raises_still_counts_as_a_step(group: str, runtime_dir: Path) -> None:
    """The other ranks made that step; its load is thrown away."""
    with attached(group, runtime_dir) as (hook, load):
        with pytest.raises(ZeroDivisionError), hook.step("decode"):
            load.add_(1).add_(1 // 0)
        with hook.step("decode"):
            load += 2
        batch = records(hook)
    assert batch.step.tolist() == [0, 1]
    assert [PHASES[phase] for phase in batch.phase] == [Phase.DUMMY, Phase.DECODE]
    assert batch.counts[0].sum() == 0
    assert (batch.counts[1] == 2).all()


def test_a_capture_is_not_a_step(group: str, runtime_dir: Path) -> None:
    """While a graph is captured the hook does nothing, whatever it is asked."""
    capturing = False
    with attached(group, runtime_dir) as (hook, load):
        hook._parts = dataclasses.replace(hook._parts, capturing=lambda: capturing)
        with hook.step():
            pass
        capturing = True
        for _ in range(3):
            with hook.step("decode"):
                load += 1
        capturing = False
        load.zero_()
        with hook.step():
            pass
        batch = records(hook)
    assert batch.step.tolist() == [0, 1]
    assert not batch.counts.any()


def test_use_after_detach(group: str, runtime_dir: Path) -> None:
    """A step is refused with the reason; maps and statistics can still be read; a second detach does nothing."""
    with attached(group, runtime_dir) as (hook, _):
        with hook.step():
            pass
        hook.detach()
        hook.detach()
        with pytest.raises(HookClosed, match="it was detached"), hook.step():
            pass
        assert hook.statistics().step == 1
        assert hook.dispatch_count_LE.sum() == SOLO.num_slots * SOLO.num_layers


def test_detach_in_the_middle_of_a_step(group: str, runtime_dir: Path) -> None:
    """The ring is gone when the step ends: nothing is recorded, and nothing breaks."""
    with attached(group, runtime_dir) as (hook, load):
        with hook.step():
            load += 1
            hook.detach()
        hook.after_forward()


def test_a_step_that_fails_inside_closes_the_hook(
    group: str, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word of that step is out: to try again could decide it twice, so only detaching is left."""
    with attached(group, runtime_dir) as (hook, _):
        with monkeypatch.context() as patch:
            patch.setattr(hook, "_adopt", lambda words: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                hook.before_forward()
        with pytest.raises(HookClosed, match="division by zero"):
            hook.before_forward()


def test_statistics_tell_that_a_dropped_plan_still_drains(
    group: str, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I5: a transfer that does not end blocks further plans; an operator can see that it does."""
    with attached(group, runtime_dir) as (hook, _):
        assert not hook.statistics().draining
        monkeypatch.setattr(Stager, "orphaned", True)
        assert hook.statistics().draining


def test_statistics_tell_what_happened(group: str, runtime_dir: Path) -> None:
    """Plans, commits, rows and bytes since attach, and a time for each phase of the hook."""
    with attached(group, runtime_dir) as (hook, _):
        daemon = Publisher(group, SOLO)
        run_plan(hook, daemon)
        statistics = hook.statistics()
        daemon.close()
    assert (statistics.generation, statistics.position) == (2, 0)
    assert (statistics.num_plans, statistics.num_commits, statistics.num_drops) == (1, 2, 0)
    row_bytes = hook._parts.transfer.weights.slot_bytes[0]
    assert statistics.bytes_pulled == statistics.rows_pulled * row_bytes > 0
    assert statistics.staging_bytes >= SOLO.slots_per_rank * row_bytes
    assert list(statistics.times) == ["poll", "agree", "commit", "issue", "record"]
    assert statistics.times["commit"].num == 2
    assert statistics.times["agree"].num == statistics.step
    assert all(0 <= timing.p50_us <= timing.p99_us <= timing.max_us for timing in statistics.times.values())

"""Attach takes everything back when it fails on its own rank, and detach does so even if a thread hangs."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from eplb_async.core.errors import DaemonUnavailable, PlacementError, SpecError, UnknownName
from eplb_async.core.placement import initial_placement
from eplb_async.rank import assembly, platform, streams
from eplb_async.rank.hook import RankHook
from eplb_async.rank.transfer.shm import ShmTransfer
from tests.conftest import segments_left
from tests.rank.harness import hook_settings, make_weights
from tests.rank.solo import SOLO, attached


def threads() -> set[str]:
    """Names of the hook's threads in this process."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("eplb-")}


LOST_LP = initial_placement(SOLO)[:, ::-1] * 0
LOAD = torch.zeros(SOLO.num_layers, SOLO.num_experts, dtype=torch.int32)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"placement": LOST_LP}, PlacementError, "has no slot for expert 1"),
        ({"placement": initial_placement(SOLO)[:1]}, PlacementError, "of 1 layers was given; the spec has 2"),
        ({"load": LOAD.float()}, SpecError, "torch.float32"),
        ({"load": LOAD[:, :3]}, SpecError, "needed"),
        ({"load": LOAD.to("meta")}, SpecError, "on meta"),
        ({"staging_rows": 1}, SpecError, "staging_rows is 1; needed at least 2"),
        ({"daemon": "required"}, DaemonUnavailable, "start one"),
        ({"daemon": "perhaps"}, UnknownName, "auto, optional, required"),
    ],
    ids=str,
)
def test_bad_arguments_leave_nothing(
    group: str, runtime_dir: Path, fields: dict[str, Any], error: type[Exception], text: str
) -> None:
    """Each has its own error, before or after segments were made; neither segments nor threads stay."""
    with pytest.raises(error, match=text), attached(group, runtime_dir, **fields):
        pass
    assert not segments_left(group)
    assert not threads()


def test_plain_cpu_tensors_are_refused(group: str, runtime_dir: Path) -> None:
    """Other ranks could not read them; the message says how to make some that they can."""
    weights = make_weights(SOLO, initial_placement(SOLO), 0)
    with pytest.raises(SpecError, match="share_weights"):
        RankHook.attach(group=group, rank=0, spec=SOLO, weights=weights, load=LOAD, settings=hook_settings(runtime_dir))


@pytest.mark.parametrize("rank", [-1, 1])
def test_a_rank_that_does_not_exist_is_refused(group: str, runtime_dir: Path, rank: int) -> None:
    """Ranks are 0..R-1."""
    settings = hook_settings(runtime_dir)
    with pytest.raises(SpecError, match=f"rank {rank} was given; ranks are 0..0"):
        RankHook.attach(group=group, rank=rank, spec=SOLO, weights=[], load=LOAD, settings=settings)


@pytest.mark.parametrize("part", ["Maps", "Recorder", "PlanReader", "ExpertFingerprints", "Stager", "Committer"])
def test_whatever_fails_after_joining_the_group_is_left(
    group: str, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A rank that cannot build its parts is no member, and its segments are gone."""
    module = platform if part in ("Maps", "Recorder") else assembly
    original = getattr(module, part)

    class Broken(original):  # type: ignore[misc,valid-type]
        def __init__(self, *arguments: object) -> None:
            raise MemoryError(part)

    monkeypatch.setattr(module, part, Broken)
    with pytest.raises(MemoryError, match=part), attached(group, runtime_dir):
        pass
    assert not segments_left(group)


def test_detach_leaves_the_group_though_a_thread_hangs(
    group: str, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I5: a transfer that never ends is reported, and keeps no segment and no membership."""
    gate = threading.Event()
    monkeypatch.setattr(streams, "CLOSE_DEADLINE_S", 0.05)
    with attached(group, runtime_dir) as (hook, _):
        assert isinstance(hook._parts.transfer, ShmTransfer)
        stream = hook._parts.transfer.stream
        stream.submit(lambda: gate.wait(30.0))
        with pytest.raises(TimeoutError, match="eplb-transfer"):
            hook.detach()
        assert all(name.endswith("weights.0") for name in segments_left(group))
        hook.detach()
    gate.set()
    stream.close()

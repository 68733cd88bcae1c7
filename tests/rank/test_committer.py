"""Commits: rows, maps and the live placement at the issue; rows free and counted at the end."""

import numpy as np
import pytest
import torch

from eplb_async.core.config import HookSettings
from eplb_async.core.errors import TransferFailed
from eplb_async.core.plan import FIRST_COUNTER, counter
from eplb_async.rank.committer import Committer
from eplb_async.rank.maps import Maps
from eplb_async.rank.stager import Stager
from eplb_async.shm.live import LivePlacement
from tests.rank.prepared import SPEC, held_transfer, prepared


def test_a_commit_ends_on_the_device(group: str) -> None:
    """I1, I13: maps and the live placement change when it is issued; `poll` tells of it, and rows are free, when it ended."""
    transfer, plan = held_transfer(2), prepared((0, 1), (1, 1))
    start_LP = np.tile(np.arange(4, dtype=np.int32), (2, 1))
    maps, stager = (
        Maps(start_LP, SPEC, torch.device("cpu")),
        Stager(transfer, HookSettings(), lambda layer, expert: None),
    )
    live = LivePlacement.create(group, SPEC, start_LP, incarnation=1)
    committer = Committer(transfer, maps, stager, live)
    stager.start(plan)
    stager.issue(FIRST_COUNTER)
    transfer.end_pulls()
    stager.poll()
    for position in (1, 2):
        committer.commit(plan, position)
    assert committer.running == [1, 2]
    assert maps.version_L == [counter(1, 1), counter(1, 2)]
    found = live.read()
    assert found is not None
    assert found[0].tolist() == maps.slot_to_expert_LP.tolist() == [[3, 0, 1, 2], [2, 3, 0, 1]]
    assert found[1].tolist() == maps.version_L
    assert committer.poll() is None

    transfer.commits[1][-1].done = True
    assert committer.poll() is None  # in order
    transfer.commits[0][-1].done = True
    assert committer.poll() == (1, 2)
    assert committer.running == []
    assert committer.num_commits == 2
    live.segment.unlink()
    live.close()
    transfer.close()


def test_a_commit_that_fails_is_raised() -> None:
    """Others have committed: there is no way back, so it is not swallowed."""
    transfer, plan = held_transfer(2), prepared((0, 1))
    maps = Maps(np.tile(np.arange(4, dtype=np.int32), (2, 1)), SPEC, torch.device("cpu"))
    stager = Stager(transfer, HookSettings(), lambda layer, expert: None)
    committer = Committer(transfer, maps, stager, None)
    stager.start(plan)
    stager.issue(FIRST_COUNTER)
    transfer.end_pulls()
    stager.poll()
    committer.commit(plan, 1)
    transfer.commits[0][-1].error = TransferFailed("broken device")
    transfer.commits[0][-1].done = True
    with pytest.raises(TransferFailed, match="broken device"):
        committer.poll()
    transfer.close()

"""kill -9 of daemons and ranks in real processes; the long form is scripts/stress."""

from pathlib import Path

import pytest

from eplb_async.runtime.client import ControlClient
from eplb_async.shm.gc import collect_garbage
from eplb_async.shm.segment import list_segments
from tests.faults.harness import MOMENTS, SPEC, FaultGroup, wait_for
from tests.faults.stress import kill_daemons, problems_of

__all__: list[str] = []


@pytest.mark.timeout(240)
def test_daemons_killed_at_each_moment_leave_ranks_right(group: str, runtime_dir: Path) -> None:
    """Whenever the daemon dies, ranks step on with equal maps and right weights, and the next daemon goes on."""
    with FaultGroup(group, runtime_dir) as faults:
        found = kill_daemons(faults, len(MOMENTS), seed=1)
        reports = faults.stop()
    assert problems_of(reports) == []
    assert found["kills"] == len(MOMENTS)
    assert min(report.generation for report in reports) > len(MOMENTS)


@pytest.mark.timeout(120)
def test_killed_rank_is_named_and_cleaned_up(group: str, runtime_dir: Path) -> None:
    """The other ranks raise PeerLost with its number, status says that it is gone, gc leaves nothing of the group."""
    with FaultGroup(group, runtime_dir) as faults:
        faults.start_daemon()
        faults.kill_rank(2)
        others = [rank for rank in range(SPEC.num_ranks) if rank != 2]
        reports = faults.reports(others)
        assert [report.lost for report in reports] == [2, 2, 2]
        assert not [wrong for report in reports for wrong in report.wrong]

        def told() -> bool:
            with ControlClient(faults.settings) as client:
                groups = client.status().groups
                return any("rank 2" in problem for group in groups for problem in group.problems)

        wait_for(told, 10, "status to name the lost rank")
    collect_garbage(group)
    assert not [name for name, owner, _ in list_segments() if owner == group]

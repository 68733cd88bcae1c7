"""Random faults in real processes, checked after each: the short form of scripts/chaos, and that its checks see something."""

from pathlib import Path

import numpy as np
import pytest

from eplb_async.rank.transfer.shm import LAYOUT
from eplb_async.shm.layout import segment_name
from eplb_async.shm.segment import Segment
from tests.faults.chaos import problems_of, run_chaos, segments_of
from tests.faults.chaos_group import ChaosGroup

__all__: list[str] = []


@pytest.mark.timeout(300)
def test_short_chaos(group: str, runtime_dir: Path) -> None:
    """No invariant, no output and no segment suffers from faults; damage that the harness plants itself is seen."""
    with ChaosGroup(group, runtime_dir, step_s=0.005) as chaos:
        tally = run_chaos(chaos, num_events=6, seed=2136)
        assert problems_of(tally) == []
        assert tally.incarnations > 1
        assert tally.steps > 100

        chaos.join()
        weights = Segment.open(segment_name(group, "weights.1"), LAYOUT)
        damaged = weights.array(np.uint8, (64,))
        damaged[:] = 255
        del damaged
        weights.close()
        line = b'{"event": "forward", "step": 999999, "maps": []}\n'
        with chaos._paths[2].open("ab") as file:
            file.write(line)
        chaos.wait_steps(5)
        chaos.end_incarnation()
        assert any("rank 1 layer 0" in wrong for wrong in tally.wrong)
        assert any("999999" in violation for violation in tally.violations)
    assert segments_of(group) == []

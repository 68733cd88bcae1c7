"""Recording on the device: what it counted, when it had, and never before."""

from collections.abc import Iterator

import pytest
import torch

from eplb_async.core.load import LoadKind, Phase
from eplb_async.rank.recorder import Recorder
from eplb_async.shm.ring import PHASES, LoadRing

pytestmark = pytest.mark.gpu

SLOW_CYCLES = 400_000_000
"""A kernel of about a quarter of a second."""


@pytest.fixture
def load() -> torch.Tensor:
    """Counts of two layers of five experts."""
    return torch.zeros(2, 5, dtype=torch.int32, device="cuda")


@pytest.fixture
def ring(group: str, load: torch.Tensor) -> Iterator[LoadRing]:
    """With eight records."""
    made = LoadRing.create(Recorder.ring_info(group, 0, load, LoadKind.LOGICAL, 8), incarnation=1)
    yield made
    made.segment.unlink()
    made.close()


@pytest.fixture
def recorder(load: torch.Tensor, ring: LoadRing) -> Iterator[Recorder]:
    """Of that ring."""
    from eplb_async.rank.cuda.driver import load_driver
    from eplb_async.rank.cuda.recorder import CudaRecorder
    from eplb_async.rank.cuda.streams import ComputeStream

    made = CudaRecorder(load, ring, load_driver(), ComputeStream(load.device))
    yield made
    made.close()


def finish(recorder: Recorder) -> torch.Tensor:
    """One more record, which publishes the last one, and the end of all of them; returns the counts."""
    recorder.record(99, Phase.DUMMY, 0, 0)
    torch.cuda.synchronize()
    return recorder._load


def test_records_hold_what_was_counted(load: torch.Tensor, recorder: Recorder) -> None:
    """Counts of traffic, zeros for dummy steps and failed forwards; the tensor is zeroed each time."""
    load += 3
    recorder.record(0, Phase.DECODE, 11, 5)
    load += 4
    recorder.record(1, Phase.DUMMY, 12, 0)
    load += 5
    recorder.discard(2, 13)
    load += torch.arange(10, device="cuda", dtype=torch.int32).view(2, 5)
    recorder.record(3, Phase.PREFILL, 14, 9, 900, 64)
    assert not finish(recorder).any()
    batch = recorder.ring.read()
    assert batch.counts.sum(axis=(1, 2)).tolist() == [30, 0, 0, 45]
    assert batch.counts[3].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert batch.version.tolist() == [11, 12, 13, 14]
    assert batch.previous_us.tolist() == [0, 0, 0, 900]
    assert batch.pulled.tolist() == [0, 0, 0, 64]
    assert [PHASES[phase] for phase in batch.phase] == [Phase.DECODE, Phase.DUMMY, Phase.DUMMY, Phase.PREFILL]


def test_the_last_record_is_published_at_the_end(load: torch.Tensor, recorder: Recorder) -> None:
    """A record is published with the next one, and when the rank detaches."""
    load += 1
    recorder.record(0, Phase.DECODE, 0, 0)
    torch.cuda.synchronize()
    assert recorder.ring.num_published == 0
    ring = LoadRing.open(recorder.ring.info.group, 0, 1)
    recorder.close()
    assert ring.read().counts.sum() == 10
    ring.close()


def test_the_host_is_steps_ahead_and_records_come_when_the_device_has_written_them(
    load: torch.Tensor, recorder: Recorder
) -> None:
    """Nothing is published before the forward that counted has ended, and recording never waits for that."""
    torch.cuda._sleep(SLOW_CYCLES)
    for step in range(5):
        load += step
        recorder.record(step, Phase.DECODE, 0, 0)
    assert recorder.ring.num_published == 0
    assert not torch.cuda.current_stream().query()
    finish(recorder)
    batch = recorder.ring.read()
    assert batch.counts.sum(axis=(1, 2)).tolist() == [0, 10, 20, 30, 40]
    assert batch.lost == 0


def test_a_device_that_is_a_whole_ring_behind_loses_the_oldest(load: torch.Tensor, recorder: Recorder) -> None:
    """What was claimed again is counted as lost, what is read is right."""
    torch.cuda._sleep(SLOW_CYCLES)
    for step in range(10):
        load += step
        recorder.record(step, Phase.DECODE, 0, step)
    finish(recorder)
    batch = recorder.ring.read()
    # eleven were claimed, ten of them published, and there is room for eight
    assert batch.lost == 3
    assert batch.tokens.tolist() == list(range(3, 10))
    assert batch.counts[:, 0, 0].tolist() == list(range(3, 10))


def test_forwards_from_a_graph_are_recorded(load: torch.Tensor, recorder: Recorder) -> None:
    """The hook's calls stay outside of the graph, which counts into the same tensor at every replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        load += 2
    for step in range(3):
        for _ in range(step + 1):
            graph.replay()
        recorder.record(step, Phase.DECODE, 0, 0)
    finish(recorder)
    assert recorder.ring.read().counts[:, 1, 4].tolist() == [2, 4, 6]


def test_the_engine_may_change_its_stream(load: torch.Tensor, recorder: Recorder) -> None:
    """Records follow one another whatever stream is current, without the engine's help."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    for step in range(6):
        with torch.cuda.stream(streams[step % 3]):
            streams[step % 3].wait_stream(streams[step % 3 - 1])
            torch.cuda._sleep(SLOW_CYCLES // 50)
            load += 1
            recorder.record(step, Phase.DECODE, 0, 0)
    finish(recorder)
    assert recorder.ring.read().counts[:, 0, 0].tolist() == [1] * 6

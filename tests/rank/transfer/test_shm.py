"""Weights in shared memory: pulled from any rank, checked, committed; segments that go when they should."""

import threading
from collections.abc import Iterator

import msgspec
import pytest
import torch

from eplb_async.core.errors import NoSharedMemory, SpecError, TransferFailed
from eplb_async.core.spec import MoESpec
from eplb_async.rank.fingerprint import fingerprint
from eplb_async.rank.streams import Completion, HostStream
from eplb_async.rank.transfer.base import Pull
from eplb_async.rank.transfer.shm import MOST_ABANDONED, SharedWeights, ShmTransfer, share_weights
from eplb_async.rank.weights import WeightRows
from tests.conftest import segments_left

SPEC = MoESpec(num_layers=2, num_experts=4, num_ranks=2)


def layers_of(rank: int) -> list[dict[str, torch.Tensor]]:
    """Two layers of three tensors of different types, different on each rank."""
    return [
        {
            "w": torch.full((2, 3, 5), 10.0 * rank + layer, dtype=torch.bfloat16),
            "w8": torch.full((2, 7), 1.0 + rank, dtype=torch.float8_e4m3fn),
            "scale": torch.tensor([layer + 0.5, rank + 0.25]),
        }
        for layer in range(2)
    ]


@pytest.fixture
def ranks(group: str) -> Iterator[list[tuple[SharedWeights, ShmTransfer]]]:
    """Two ranks in this process, connected."""
    made = []
    for rank in range(2):
        weights = share_weights(group, rank, layers_of(rank))
        made.append((weights, ShmTransfer(WeightRows(weights, SPEC), 2, HostStream(f"rank {rank}"), weights)))
    for _, transfer in made:
        for rank in range(2):
            transfer.connect(rank, made[rank][1].export())
    yield made
    for weights, transfer in made:
        transfer.close()
        weights.close()


def ended(transfer: ShmTransfer, completion: Completion[None]) -> Completion[None]:
    """Wait for a pull."""
    transfer.stream.close()
    assert completion.done
    return completion


def test_shared_weights_are_what_was_given(ranks: list[tuple[SharedWeights, ShmTransfer]]) -> None:
    """Names, types, shapes and contents; they can be computed with."""
    weights, _ = ranks[1]
    assert len(weights) == 2
    for found, given in zip(weights, layers_of(1), strict=True):
        assert list(found) == list(given)
        assert all(torch.equal(found[name].view(torch.uint8), given[name].view(torch.uint8)) for name in given)


def test_a_pull_and_a_commit_move_all_tensors(ranks: list[tuple[SharedWeights, ShmTransfer]]) -> None:
    """Nothing changes before the commit, and only the one slot with it."""
    (mine, transfer), (theirs, _) = ranks
    expected = [fingerprint(tensor[1]) for tensor in ranks[1][1].weights.rows[1]]
    completion = ended(transfer, transfer.pull(1, Pull(3, 1, 1, 0), 1, expected))
    assert completion.error is None
    before = layers_of(0)[1]
    assert all(torch.equal(mine[1][name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)
    assert transfer.commit(1, [(1, 0)], []).done
    for name, tensor in before.items():
        assert torch.equal(mine[1][name][:1].view(torch.uint8), theirs[1][name][1:].view(torch.uint8))
        assert torch.equal(mine[1][name][1:].view(torch.uint8), tensor[1:].view(torch.uint8))


def test_other_bytes_than_expected_are_an_error(ranks: list[tuple[SharedWeights, ShmTransfer]]) -> None:
    """The completion says layer, expert, tensor and source."""
    (_, transfer), (theirs, other) = ranks
    expected = [fingerprint(tensor[0]) for tensor in other.weights.rows[0]]
    theirs[0]["scale"][0] += 1
    completion = ended(transfer, transfer.pull(0, Pull(2, 1, 0, 1), 0, expected))
    assert isinstance(completion.error, TransferFailed)
    assert "layer 0 expert 2 tensor 2 from rank 1 slot 0" in str(completion.error)


def test_exports_that_do_not_fit_are_refused(ranks: list[tuple[SharedWeights, ShmTransfer]]) -> None:
    """Nonsense, a segment that is gone, or other shapes."""
    (_, transfer), (theirs, other) = ranks
    exported = msgspec.json.decode(other.export())
    gone = msgspec.json.encode({**exported, "segment": exported["segment"] + "9"})
    short = msgspec.json.encode({**exported, "tensors": exported["tensors"][:1]})
    for wrong, text in ((b"{", "cannot be reached"), (gone, "cannot be reached"), (short, "other shapes")):
        with pytest.raises(TransferFailed, match=text):
            transfer.connect(1, wrong)
    assert len(theirs) == 2


def test_a_living_process_keeps_its_weights(group: str) -> None:
    """A second set of weights as the same rank is refused; after `close` there is room again, and tensors stay readable."""
    weights = share_weights(group, 0, layers_of(0))
    with pytest.raises(NoSharedMemory, match="exists"):
        share_weights(group, 0, layers_of(0))
    tensor = weights[0]["scale"]
    weights.close()
    assert not segments_left(group)
    assert tensor.tolist() == [0.5, 0.25]
    share_weights(group, 0, layers_of(0)).close()


def test_parameters_are_shared_without_their_graph(group: str) -> None:
    """Engines hold weights as parameters: what comes back takes part in no backward pass."""
    weights = share_weights(group, 0, [[torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.zeros(2, 3))]])
    assert not any(tensor.requires_grad for tensor in weights[0].values())
    weights.close()


def test_tensors_elsewhere_are_refused_before_anything_is_made(group: str) -> None:
    """Only CPU tensors can be copied into shared memory."""
    with pytest.raises(SpecError, match="lie on meta"):
        share_weights(group, 0, [torch.zeros(2, 3, device="meta")])
    assert not segments_left(group)


def test_hung_pulls_that_are_given_up_touch_nothing_new(ranks: list[tuple[SharedWeights, ShmTransfer]]) -> None:
    """Whenever they end, they write rows of the old staging memory; new pulls into rows of the same numbers run beside them."""
    _, transfer = ranks[0]
    blocked, old = threading.Event(), transfer.stream
    transfer.stream.submit(lambda: blocked.wait(60.0))
    hung = transfer.pull(0, Pull(1, 1, 0, 0), 0, None)
    assert transfer.abandon()
    fresh = ended(transfer, transfer.pull(1, Pull(0, 0, 1, 1), 0, None))
    assert fresh.error is None
    before = [part.clone() for part in transfer.staging.tensors(1, 0)]
    blocked.set()
    old.close()
    assert hung.done
    assert hung.error is None
    assert all(torch.equal(a, b) for a, b in zip(before, transfer.staging.tensors(1, 0), strict=True))


def test_pulls_are_given_up_a_few_times_only(ranks: list[tuple[SharedWeights, ShmTransfer]]) -> None:
    """Each time costs a thread and a staging buffer until its pulls end."""
    _, transfer = ranks[0]
    assert [transfer.abandon() for _ in range(MOST_ABANDONED + 2)] == [True] * MOST_ABANDONED + [False] * 2

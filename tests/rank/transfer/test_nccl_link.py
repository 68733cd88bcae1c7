"""NCCL between two GPUs as if they were two nodes: both directions at once, off the compute stream."""

import multiprocessing
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import TCPStore


def serve(rank: int, port: int, answers: Any) -> None:
    """Swap three tensors each way, twice, then two ranks alone."""
    from eplb_async.rank.fingerprint import fingerprint
    from eplb_async.rank.transfer.nccl_link import NcclLink

    device, other = torch.device("cuda", rank), 1 - rank
    torch.cuda.set_device(device)
    link = NcclLink(TCPStore("127.0.0.1", port, is_master=False), rank, 2, device)
    sent = [torch.full((1000 + i,), 10 * rank + i, dtype=torch.uint8, device=device) for i in range(3)]
    found = []
    for _ in range(2):
        received = [torch.zeros_like(tensor) for tensor in sent]
        torch.cuda.synchronize()
        with link.beside():
            link.swap([(tensor, other) for tensor in sent], [(tensor, other) for tensor in received])
            found += [int(tensor[0]) for tensor in received if bool((tensor == tensor[0]).all())]
            assert link.compute(received) == [fingerprint(tensor.cpu()) for tensor in received]
    link.close()
    answers.put((rank, found))


@pytest.mark.multi_gpu
def test_messages_go_both_ways_at_once() -> None:
    """No rank waits for the other's receive, and bytes and order are kept."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=serve, args=(rank, store.port, answers), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=100) for _ in processes)
    for process in processes:
        process.join(20)
    assert found == {0: [10, 11, 12] * 2, 1: [0, 1, 2] * 2}

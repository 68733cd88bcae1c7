"""The demo as a user runs it: the command, its JSON, its exit status, and what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eplb_async.core.spec import MoESpec
from eplb_async.demo.main import ORDER
from eplb_async.demo.model import load_model
from eplb_async.demo.reference import Reference
from eplb_async.demo.report import DaemonFacts, summarise
from eplb_async.demo.serving import RankResult, demo_spec
from eplb_async.demo.text import DOMAINS, Stream

__all__: list[str] = []


@pytest.mark.timeout(300)
def test_demo_command_serves_rebalances_and_proves_itself() -> None:
    """A short demo ends with status 0 and one JSON object: outputs equal, plans made, PAR lower, nothing lost or left."""
    command = [sys.executable, "-m", "eplb_async", "demo", "--json", "--steps-per-domain", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["outputs_equal"] is True
    assert result["logits_bit_equal"] is True
    assert result["plans"] >= 2
    assert result["moves"] > 0
    assert result["bytes_moved"] > 0
    assert result["lost_records"] == 0
    assert result["par_live_after_first"] < result["par_static_after_first"]
    assert {"par_static", "par_live", "worst_step_added_us", "trigger_to_commit_s"} <= result.keys()
    assert not [name for name in os.listdir("/dev/shm") if f"eplb_async.{os.getuid()}.demo." in name]


def test_demo_refuses_weights_that_are_none(tmp_path: Path) -> None:
    """A wrong weights file is one clear line and status 1, before any process is started."""
    wrong = tmp_path / "weights.safetensors"
    wrong.write_bytes(b"no weights")
    command = [sys.executable, "-m", "eplb_async", "demo", "--weights", str(wrong)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(wrong) in done.stderr


def test_order_has_every_domain_once() -> None:
    """The demo streams all the text there is."""
    assert sorted(ORDER) == sorted(DOMAINS)


def test_summary_tells_a_wrong_output() -> None:
    """One differing byte anywhere makes the outputs unequal; equal bytes with other bits are told apart."""
    stream = Stream(domains=("python", "web"), steps_per_domain=2, num_ranks=2, batch=1, length=8)
    ranks = [RankResult.empty(stream, _spec()) for _ in range(2)]
    for rank in ranks:
        rank.received_TL[:] = 10
        rank.static_TLR[:] = 5
        rank.digests.extend(["a"] * stream.num_steps)
    tokens = np.zeros((stream.num_steps, 2, 1, 8), dtype=np.uint8)
    digests = tuple([("a", "a")] * stream.num_steps)
    facts = DaemonFacts(lost_records=0, trigger_to_commit_s={}, moves={}, bytes_moved={})
    load_TLE = np.zeros((stream.num_steps, 1, 1), dtype=np.int64)
    same = summarise(stream, ranks, Reference(tokens, digests, load_TLE), facts, 1.0)
    assert (same.outputs_equal, same.logits_bit_equal) == (True, True)
    other = tokens.copy()
    other[3, 1, 0, 7] = 1
    assert not summarise(stream, ranks, Reference(other, digests, load_TLE), facts, 1.0).outputs_equal
    bits = (*digests[:-1], ("a", "b"))
    assert not summarise(stream, ranks, Reference(tokens, bits, load_TLE), facts, 1.0).logits_bit_equal


def _spec() -> MoESpec:
    return demo_spec(load_model(), 2)

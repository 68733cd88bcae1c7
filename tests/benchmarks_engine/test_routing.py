"""Routing: the same in every run, as the trace says, distinct within a token."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.engine.config import EngineConfig, tokens_per_rank
from benchmarks.engine.routing import Routing, gates_LMK, load_shares, shares_at
from eplb_async.core.placement import expert_to_slots, initial_placement

__all__: list[str] = []

CPU = torch.device("cpu")
CONFIG = EngineConfig(
    num_layers=2,
    num_experts=16,
    num_redundant=4,
    hidden=16,
    width=8,
    top_k=4,
    vocabulary=64,
    tokens_per_rank=64,
    steps_per_window=10,
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three windows of skewed counts, four layers."""
    random = np.random.default_rng(1)
    counts = random.lognormal(sigma=0.8, size=(3, 4, 16))
    # no expert can be in more tokens than there are
    share = np.minimum(counts / counts.sum(axis=2, keepdims=True), 0.2)
    path = tmp_path / "trace.npz"
    np.savez(path, counts=(share / share.sum(axis=2, keepdims=True) * 100_000).astype(np.int32))
    return path


def test_ids_are_the_same_however_they_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps drawn one by one, in parts of their tokens, or all at once have the same ids; another seed has others."""
    whole = Routing.load(CONFIG, CPU).ids(0, 12)
    single = torch.cat([Routing.load(CONFIG, CPU).ids(step, 1) for step in range(12)])
    assert torch.equal(whole, single)
    monkeypatch.setattr("benchmarks.engine.routing.ELEMENTS", CONFIG.num_layers * CONFIG.num_experts * 7)
    assert torch.equal(whole, Routing.load(CONFIG, CPU).ids(0, 12))
    assert not torch.equal(whole, Routing.load(replace(CONFIG, seed=1), CPU).ids(0, 12))


def test_ids_are_distinct_within_a_token() -> None:
    """Drawn without replacement."""
    ordered = Routing.load(CONFIG, CPU).ids(0, 4).sort(dim=-1).values.int()
    assert (ordered[..., 1:] > ordered[..., :-1]).all()


@pytest.mark.parametrize("step", [0, 10, 25])
def test_counts_follow_the_trace(trace: Path, step: int) -> None:
    """Over many tokens each expert's part of all pairs is the window's share, hot experts included."""
    config = replace(CONFIG, trace=str(trace), tokens_per_rank=20_000)
    routing = Routing.load(config, CPU)
    ids = routing.ids(step, 1)[0].to(torch.int64)
    wanted_LE = shares_at(routing.shares_TLE, step, config)
    for layer in range(config.num_layers):
        drawn_E = torch.bincount(ids[layer].flatten(), minlength=config.num_experts).numpy() / config.num_pairs
        assert np.abs(drawn_E - wanted_LE[layer]).max() < 0.012
    with np.load(trace) as file:
        counts_E = file["counts"][(step // 10) % 3, 2]
    np.testing.assert_allclose(wanted_LE[1], counts_E / counts_E.sum())


def test_interpolated_shares_pass_from_window_to_window() -> None:
    """Half way they are the mean of both; at a window's first step they are that window's."""
    config = replace(CONFIG, drift="interpolated")
    shares = load_shares(config)
    np.testing.assert_allclose(shares_at(shares, 15, config), (shares[1] + shares[2]) / 2)
    np.testing.assert_allclose(shares_at(shares, 80, config), shares[0])


def test_a_trace_of_other_experts_is_refused(trace: Path) -> None:
    """The message says what was found and needed."""
    with pytest.raises(ValueError, match=r"\[3, 4, 16\]; needed \[T, L, 32\]"):
        load_shares(replace(CONFIG, trace=str(trace), num_experts=32))


@pytest.mark.parametrize("tokens_per_expert", [32, 512])
def test_balanced_ids_balance_the_ranks(tokens_per_expert: int) -> None:
    """At the size of the benchmark no rank has more than a thousandth above the mean, by the initial dispatch table."""
    tokens = tokens_per_rank(tokens_per_expert, 128, 8, 2)
    config = EngineConfig(num_layers=1, tokens_per_rank=tokens, balanced=True)
    ids_MK = Routing.load(config, CPU).ids(0, 1)[0, 0].numpy().astype(np.int64)
    table_LEK, count_LE = expert_to_slots(initial_placement(config.spec), 128, config.spec.max_replicas)
    entry_MK = np.arange(config.num_tokens)[:, None] % count_LE[0, ids_MK]
    per_rank = np.bincount((table_LEK[0, ids_MK, entry_MK] // config.spec.slots_per_rank).ravel())
    assert per_rank.max() / per_rank.mean() < 1.001


def test_gates_are_positive_and_sum_to_one() -> None:
    """Over the experts of a token; they do not depend on the ranks."""
    gates = gates_LMK(CONFIG, CPU)
    assert (gates > 0).all()
    torch.testing.assert_close(gates.sum(dim=2), torch.ones(CONFIG.num_layers, CONFIG.num_tokens))
    assert torch.equal(gates, gates_LMK(replace(CONFIG, num_ranks=4, tokens_per_rank=32), CPU))


def test_tokens_per_rank() -> None:
    """32 pairs for each of 128 experts with top-8 on 2 ranks are 256 sequences; what does not divide is refused."""
    assert tokens_per_rank(32, 128, 8, 2) == 256
    with pytest.raises(ValueError, match="do not divide"):
        tokens_per_rank(1, 10, 8, 2)

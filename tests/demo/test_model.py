"""The demo's model: its experts' results must not depend on how rows are grouped, and its own router must be skewed."""

import functools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import eplb_async.demo.model as module
from eplb_async.core.errors import ConfigError, SpecError
from eplb_async.core.placement import initial_placement
from eplb_async.core.score import par, rank_load
from eplb_async.core.spec import MoESpec
from eplb_async.demo.model import (
    BLOCK_ROWS,
    EXPERT_TENSORS,
    LocalExperts,
    ModelShape,
    MoEModel,
    combine,
    expert_ffn,
    grouped_ffn,
    load_model,
    save_model,
)
from eplb_async.demo.reference import logits_digest, next_tokens, run_reference
from eplb_async.demo.text import DOMAINS, Stream
from eplb_async.demo.train import TrainingSettings, evaluate_domain, share_distance, train_model

TINY = ModelShape(num_layers=2, num_experts=8, top_k=2, hidden=32, expert_width=16, num_heads=2, context=16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits are promised for one torch thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def packaged() -> MoEModel:
    """The weights in the package, loaded once."""
    return load_model()


@pytest.fixture
def trained() -> MoEModel:
    """The weights in the package."""
    return packaged()


def weights_of(tensors: dict[str, torch.Tensor], expert: int) -> dict[str, torch.Tensor]:
    """One expert of stacked tensors."""
    return {name: tensor[expert] for name, tensor in tensors.items()}


def plain_ffn(rows: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The formula, in float64."""
    gate, up = (rows.double() @ weights["gate_up"].double().t()).chunk(2, dim=1)
    return (gate * torch.sigmoid(gate) * up) @ weights["down"].double().t() + weights["bias"].double()


def test_expert_ffn_is_the_formula(trained: MoEModel) -> None:
    """down(silu(gate) * up) + bias, for no row, one, a block and 20 rows (the worked example)."""
    weights = weights_of(trained.layer_expert_tensors(1), 3)
    for num_rows in (0, 1, BLOCK_ROWS, 20):
        rows = torch.randn(num_rows, trained.shape.hidden)
        torch.testing.assert_close(expert_ffn(rows, weights).double(), plain_ffn(rows, weights), rtol=1e-4, atol=1e-5)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**31), num_rows=st.integers(1, 150))
def test_a_row_has_the_same_bits_in_any_company(seed: int, num_rows: int) -> None:
    """A row's result is the same alone, in any subset, at any place, and beside huge or NaN rows."""
    random = torch.Generator().manual_seed(seed)
    trained = packaged()
    weights = weights_of(trained.layer_expert_tensors(seed % 5), seed % 32)
    rows = torch.randn(num_rows, trained.shape.hidden, generator=random)
    whole = expert_ffn(rows, weights)
    order = torch.randperm(num_rows, generator=random)[: 1 + seed % num_rows]
    assert torch.equal(expert_ffn(rows[order], weights), whole[order])
    place = int(order[0])
    assert torch.equal(expert_ffn(rows[place : place + 1], weights), whole[place : place + 1])
    company = torch.full_like(rows, float("nan") if seed % 2 else 1e30)
    company[num_rows - 1 - place] = rows[place]
    assert torch.equal(expert_ffn(company, weights)[num_rows - 1 - place], whole[place])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), num_rows=st.integers(0, 100), num_ranks=st.sampled_from([1, 2, 4]))
def test_sharding_changes_no_bit(seed: int, num_rows: int, num_ranks: int) -> None:
    """Rows sent to copies of experts in other stacks, in another order and in parts, come back with the same bits."""
    trained = packaged()
    shape, random = trained.shape, torch.Generator().manual_seed(seed)
    tensors = trained.layer_expert_tensors(seed % shape.num_layers)
    hidden = torch.randn(num_rows, shape.hidden, generator=random)
    # rows prefer few experts, as real ones do
    ids = torch.randint(0, shape.num_experts, (num_rows, shape.top_k), generator=random) ** 2 // shape.num_experts
    gates = torch.rand(num_rows, shape.top_k, generator=random)
    whole = combine(grouped_ffn(hidden, ids, tensors), gates)
    rows, flat = hidden.repeat_interleave(shape.top_k, dim=0), ids.flatten()
    rank = torch.randint(0, num_ranks, (len(flat),), generator=random)
    slot_to_expert = torch.randperm(shape.num_experts, generator=random)
    slots = {name: tensor[slot_to_expert].clone() for name, tensor in tensors.items()}
    places = torch.argsort(slot_to_expert)[flat]
    outputs = torch.empty_like(rows)
    for one in range(num_ranks):
        mine = torch.nonzero(rank == one).flatten()
        mine = mine[torch.randperm(len(mine), generator=random)]
        outputs[mine] = grouped_ffn(rows[mine], places[mine, None], slots)[:, 0]
    assert torch.equal(combine(outputs.view(num_rows, shape.top_k, shape.hidden), gates), whole)


def test_every_product_has_one_shape(trained: MoEModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of BLOCK_ROWS, whatever the number of rows: some kernels would hide a wrong one from the tests of bits."""
    seen = set()
    mm, addmm = torch.mm, torch.addmm

    def spy_mm(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.add((rows.shape[0], rows.data_ptr() % 64))
        return mm(rows, weights)

    def spy_addmm(bias: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        seen.add((rows.shape[0], out.data_ptr() % 64))
        return addmm(bias, rows, weights, out=out)

    monkeypatch.setattr(torch, "mm", spy_mm)
    monkeypatch.setattr(torch, "addmm", spy_addmm)
    tensors = trained.layer_expert_tensors(0)
    for num_rows in (1, 15, 16, 17, 100):
        rows = torch.randn(num_rows, trained.shape.hidden)
        expert_ffn(rows, weights_of(tensors, 0))
        grouped_ffn(rows, torch.randint(0, 32, (num_rows, 4)), tensors)
    assert seen == {(BLOCK_ROWS, 0)}


def test_grouped_ffn_is_expert_ffn_row_by_row(trained: MoEModel) -> None:
    """[N, K, D] holds for each row and k what that expert alone gives."""
    tensors = trained.layer_expert_tensors(0)
    hidden = torch.randn(5, trained.shape.hidden)
    ids = torch.tensor([[0, 1], [1, 0], [31, 2], [1, 31], [7, 8]])
    outputs = grouped_ffn(hidden, ids, tensors)
    for row in range(5):
        for k in range(2):
            one = expert_ffn(hidden[row : row + 1], weights_of(tensors, int(ids[row, k])))[0]
            assert torch.equal(outputs[row, k], one)


def test_combine_adds_in_the_order_of_k() -> None:
    """1e8 + 1 - 1e8 is 0 in float32 when added from the left, and that order is the contract."""
    outputs = torch.tensor([[[1e8], [1.0], [-1e8]]])
    assert combine(outputs, torch.ones(1, 3)).item() == 0.0
    assert combine(outputs[:, [0, 2, 1]], torch.ones(1, 3)).item() == 1.0


def test_experts_function_replaces_the_experts_only(trained: MoEModel) -> None:
    """The model calls it once per layer, in order, with float32 rows, int64 ids and gates that sum to 1."""
    calls = []

    def experts(layer: int, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        calls.append(layer)
        assert hidden.shape == (2 * 9, trained.shape.hidden)
        assert ids.shape == gates.shape == (2 * 9, trained.shape.top_k)
        assert (hidden.dtype, ids.dtype, gates.dtype) == (torch.float32, torch.int64, torch.float32)
        torch.testing.assert_close(gates.sum(dim=1), torch.ones(2 * 9))
        assert all(len(set(row)) == trained.shape.top_k for row in ids.tolist())
        return local(layer, hidden, ids, gates)

    local = LocalExperts(trained)
    tokens = Stream(batch=2, length=9).tokens(0, 0)
    logits = trained(tokens, experts)
    assert calls == list(range(trained.shape.num_layers))
    assert torch.equal(logits, trained(tokens, LocalExperts(trained)))
    assert int(local.load_LE.sum()) == 2 * 9 * trained.shape.top_k * trained.shape.num_layers


def test_the_model_sees_no_future(trained: MoEModel) -> None:
    """Logits at a position do not change when later bytes do."""
    tokens = Stream(batch=1, length=32).tokens(0, 0)
    changed = tokens.clone()
    changed[:, 20:] = 65
    first, second = (trained(batch, LocalExperts(trained)) for batch in (tokens, changed))
    torch.testing.assert_close(first[:, :20], second[:, :20])
    assert not torch.allclose(first[:, 20:], second[:, 20:])


def test_layer_expert_tensors_can_be_held_by_slots(trained: MoEModel) -> None:
    """Several tensors of two dtypes, each with E first and contiguous rows: what the hook asks for."""
    shape = trained.shape
    for layer in range(shape.num_layers):
        tensors = trained.layer_expert_tensors(layer)
        assert {name: tensor.dtype for name, tensor in tensors.items()} == EXPERT_TENSORS
        assert all(tensor.shape[0] == shape.num_experts and tensor.is_contiguous() for tensor in tensors.values())


def test_weights_file_is_small_and_loads_fast() -> None:
    """2 to 8 MB, under a second, in a fresh interpreter too (without the import of torch)."""
    path = Path(module.__file__).parent / "weights" / "model.safetensors"
    assert 2e6 < path.stat().st_size < 8e6
    code = (
        "import time\nfrom eplb_async.demo.model import load_model\n"
        "began = time.perf_counter()\nload_model()\nprint(time.perf_counter() - began)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 1.0


def test_save_and_load_keep_the_served_bits(tmp_path: Path) -> None:
    """What is loaded computes what was saved, and has the stored dtypes."""
    torch.manual_seed(0)
    model = MoEModel(TINY).requires_grad_(False)
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    assert loaded.shape == TINY
    tokens = torch.randint(0, 256, (2, 16))
    assert torch.equal(model(tokens, LocalExperts(model)), loaded(tokens, LocalExperts(loaded)))


def test_a_foreign_weights_file_is_refused(tmp_path: Path) -> None:
    """A safetensors file without our shape is named, and what would be right."""
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(SpecError, match=r"x\.safetensors has no shape.*eplb_async\.demo\.train"):
        load_model(tmp_path / "x.safetensors")


def test_an_odd_head_is_refused() -> None:
    """Rotary positions need heads of even size."""
    with pytest.raises(SpecError, match="hidden 32 does not divide into 3 heads"):
        MoEModel(ModelShape(hidden=32, num_heads=3))


def test_reference_repeats_bit_for_bit(trained: MoEModel) -> None:
    """Two runs give the same bytes, digests and loads; the loads count every routed token; progress is told."""
    stream = Stream(domains=("web", "chinese"), steps_per_domain=2, num_ranks=2, batch=1, length=64)
    finished: list[int] = []
    first, second = run_reference(trained, stream, finished.append), run_reference(trained, stream)
    assert finished == [1, 2, 3, 4]
    assert np.array_equal(first.next_tokens, second.next_tokens)
    assert first.next_tokens.shape == (4, 2, 1, 64)
    assert first.digests == second.digests
    assert len({digest for step in first.digests for digest in step}) == 8
    assert np.array_equal(first.load_TLE, second.load_TLE)
    assert (first.load_TLE.sum(axis=2) == 2 * 64 * trained.shape.top_k).all()


def test_digest_and_next_tokens_read_the_bits() -> None:
    """One changed bit changes the digest; of equal logits the smallest byte wins."""
    logits = torch.zeros(1, 2, 256)
    logits[0, 1, [7, 200]] = 1.0
    assert next_tokens(logits).tolist() == [[0, 7]]
    changed = logits.clone()
    changed[0, 0, 0] = torch.finfo(torch.float32).tiny
    assert logits_digest(logits) == logits_digest(logits.clone()) != logits_digest(changed)


def test_the_trained_router_is_skewed_and_domains_differ(trained: MoEModel) -> None:
    """Static PAR on 4 ranks of 10 slots is well above 1.15 in each domain, and domains have other hot experts."""
    spec = MoESpec(num_layers=5, num_experts=32, num_ranks=4, num_redundant=8)
    loads = {}
    for domain in ("python", "russian", "japanese"):
        report = evaluate_domain(trained, domain)
        assert report.bits_per_byte < 3.0
        loads[domain] = report.load_WLE.sum(axis=0)
        assert par(rank_load(loads[domain], initial_placement(spec), spec.topology)).mean() > 1.2
    for one, other in (("python", "russian"), ("python", "japanese"), ("russian", "japanese")):
        assert share_distance(loads[one], loads[other]) > 0.25
        assert (loads[one].argmax(axis=1) != loads[other].argmax(axis=1)).any()


def test_training_learns_and_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after 3 of 6 steps and run again, it gives the same weights as in one go, and the loss falls."""
    monkeypatch.setattr("eplb_async.demo.train.ModelShape", lambda: TINY)
    for domain in DOMAINS:
        (tmp_path / f"{domain}.txt").write_bytes(bytes(range(32, 127)) * 8)
    lines: list[str] = []
    options = TrainingSettings(steps=6, batch=8, warmup=2, save_every=3)
    whole = train_model(tmp_path, options, None, lambda step, line: lines.append(line))
    assert float(lines[-1].split()[0]) < float(lines[0].split()[0])

    def stop(step: int, line: str) -> None:
        if step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train_model(tmp_path, options, tmp_path / "c.pt", stop)
    steps: list[int] = []
    resumed = train_model(tmp_path, options, tmp_path / "c.pt", lambda step, line: steps.append(step))
    assert steps == [3, 4, 5]
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ConfigError, match="a checkpoint of other settings"):
        train_model(tmp_path, TrainingSettings(steps=7, batch=8), tmp_path / "c.pt", stop)
    with pytest.raises(ConfigError, match="no training text; make it with"):
        train_model(tmp_path / "nowhere", options, None, stop)


def test_throughput_is_enough_for_the_demo(trained: MoEModel) -> None:
    """2,000 bytes per second on one thread: five times less than measured, so a busy machine passes, a mistake not."""
    stream = Stream()
    trained(stream.tokens(0, 0), LocalExperts(trained))
    began = time.perf_counter()
    for rank in range(4):
        trained(stream.tokens(1, rank), LocalExperts(trained))
    assert 4 * stream.batch * stream.length / (time.perf_counter() - began) > 2_000

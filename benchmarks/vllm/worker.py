"""What runs inside vLLM's workers: seeded weights, a router whose traffic can be set, timers, and checks of every slot.

Nothing here is needed to serve. vLLM imports this file by name (worker_extension_cls); importing it patches the dummy loader, which else
gives two replicas of an expert different bytes, and the gates, which get a bias at a fixed address that captured graphs read.

Answers travel as JSON text: the engine's encoder refuses many types.
"""

import functools
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch

import vllm.distributed.eplb.eplb_state as eplb_module
from vllm.distributed import get_ep_group
from vllm.model_executor.layers import linear
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

__all__ = ["BenchExtension"]

NOISE = 1.28
"""Deviation of router logits: that of a Gumbel variable, with which a bias of log w draws expert e in proportion to w."""


def _patch_gates() -> None:
    old = linear.ReplicatedLinear.__init__
    if getattr(old, "eplb_bench", False):
        return

    @functools.wraps(old)
    def init(self: Any, input_size: int, output_size: int, bias: bool = True, *args: Any, **kwargs: Any) -> None:
        old(self, input_size, output_size, bias, *args, **kwargs)
        if kwargs.get("prefix", "").endswith(".mlp.gate"):
            self.bias = torch.nn.Parameter(torch.zeros(output_size, dtype=self.params_dtype), requires_grad=False)

    init.eplb_bench = True  # type: ignore[attr-defined]
    linear.ReplicatedLinear.__init__ = init


def _load_seeded(loader: Any, model: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
    """Weights that depend on names and experts alone: the same in every run, on every rank, in every replica."""
    experts, rank = model_config.hf_config.num_experts, get_ep_group().rank_in_group
    with torch.inference_mode():
        for index, (name, tensor) in enumerate(sorted(model.named_parameters())):
            if tensor.dim() == 3:  # slots of this rank, [S, out, in]
                for slot in range(tensor.shape[0]):
                    _fill(tensor[slot], 1_000_000 * (index + 1) + (rank * tensor.shape[0] + slot) % experts)
            elif ".gate." in name and tensor.dim() == 2:
                _fill(tensor, index, NOISE)
            elif tensor.dim() == 2:  # a part of a tensor: each rank has its own
                _fill(tensor, 1_000 * (rank + 1) + index, tensor.shape[-1] ** 0.5 if "embed" in name else 1.0)
            else:
                tensor.fill_(1.0 if "norm" in name else 0.0)
    torch.cuda.synchronize()


def _fill(tensor: torch.Tensor, seed: int, scale: float = 1.0) -> None:
    """Normal numbers: outputs have `scale` times the inputs' deviation. Of embeddings this makes 1, so that tokens stay apart."""
    generator = torch.Generator(device=tensor.device)
    generator.manual_seed(seed)
    values = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32)
    tensor.copy_(values * (scale / tensor.shape[-1] ** 0.5))


_patch_gates()
DummyModelLoader.load_weights = _load_seeded
if os.environ.get("EPLB_BENCH_RECORD_ALL"):
    # where balance itself is measured: vLLM counts only in the steps before a rearrangement
    for cls in {eplb_module.EplbState, *eplb_module.EplbState.__mro__} - {object}:
        if "_should_record_current_step" in vars(cls):
            cls._should_record_current_step = lambda self, log_stats=False: True


def _as_json(function: Callable[..., Any]) -> Callable[..., str]:
    @functools.wraps(function)
    def answer(*args: Any, **kwargs: Any) -> str:
        return json.dumps(function(*args, **kwargs), default=str)

    return answer


class BenchExtension:
    """Methods that `LLM.collective_rpc` calls on each worker. Names begin with bench_."""

    model_runner: Any
    vllm_config: Any

    def _state(self) -> Any:
        runner = self.model_runner
        return runner.eplb.state if hasattr(runner, "eplb") else runner.eplb_state

    def _hook(self) -> Any:
        ours = getattr(self._state(), "eplb_async", None)
        return ours._groups[0].hook if ours is not None else None

    @_as_json
    def bench_about(self) -> Any:
        """Versions, devices, and who balances."""
        import vllm

        state, hook = self._state(), self._hook()
        return {
            "runner": type(self.model_runner).__module__,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name(),
            "graphs": str(self.vllm_config.compilation_config.cudagraph_mode),
            "eplb": str(self.vllm_config.parallel_config.eplb_config) if state is not None else "off",
            "balancer": "eplb_async" if hook is not None else "vllm" if state is not None else "none",
            "group": hook.group if hook is not None else "",
            "reserved_gib": round(torch.cuda.memory_reserved() / 2**30, 2),
        }

    @_as_json
    def bench_router(self, bias_LE: Any) -> Any:
        """Give each layer's gate its bias; between two steps, on the stream of the forwards."""
        with torch.inference_mode():
            for layer, row in zip(self._layers(), bias_LE, strict=True):
                gate = layer.mlp.gate
                gate.bias.copy_(torch.tensor(row, dtype=gate.bias.dtype, device=gate.bias.device))
        torch.cuda.synchronize()

    def _layers(self) -> Any:
        return self.model_runner.get_model().model.layers

    @_as_json
    def bench_probe(self, loads: bool) -> Any:
        """Note when each step begins and ends, how long the balancer holds it, and where a plan stands; with loads, per-rank loads."""
        runner, state = self.model_runner, self._state()
        record: dict[str, list[Any]] = {"begin": [], "tokens": [], "events": [], "eplb": [], "loads": []}
        self.bench_record = record
        execute = runner.execute_model

        def timed_execute(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            record["begin"].append(time.perf_counter())
            record["tokens"].append(scheduled.total_num_scheduled_tokens)
            result = execute(scheduled, *args, **kwargs)
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            record["events"].append(event)
            return result

        runner.execute_model = timed_execute
        if state is None:
            return
        model_state, hook, step = next(iter(state.model_states.values())), self._hook(), state.step
        num_ranks = get_ep_group().world_size

        def timed_step(*args: Any, **kwargs: Any) -> Any:
            if loads:
                counts_LP = model_state.expert_load_pass
                record["loads"].append(counts_LP.reshape(counts_LP.shape[0], num_ranks, -1).sum(-1))
            start = time.perf_counter()
            result = step(*args, **kwargs)
            took = time.perf_counter() - start
            plan = hook._plan if hook is not None else None
            busy = plan is not None if hook is not None else bool(model_state.rebalanced)
            commits = hook.num_commits if hook is not None else 0
            record["eplb"].append((start, took, int(busy), commits, plan.length if plan is not None else 0))
            return result

        state.step = timed_step

    @_as_json
    def bench_fetch(self) -> Any:
        """What the probe has noted; per step with load the PAR, mean over layers."""
        record: dict[str, Any] = {**self.bench_record, "par": []}
        torch.cuda.synchronize()
        events = record.pop("events")
        # of each step but the last: device time from the end of its forward to the end of the next one's
        record["device_ms"] = [first.elapsed_time(second) for first, second in itertools.pairwise(events)]
        for ranks_LR in record.pop("loads"):
            values = ranks_LR.double()
            par = (values.max(dim=1).values / values.mean(dim=1)).mean().item()
            record["par"].append(None if math.isnan(par) else round(par, 5))
        hook = self._hook()
        if hook is not None:
            statistics = hook.statistics()
            record["statistics"] = {name: getattr(statistics, name) for name in statistics.__struct_fields__}
        return record

    @_as_json
    def bench_sums(self) -> Any:
        """A checksum of every slot and expert tensor of this rank: [L][S][tensors]."""
        weights = next(iter(self._state().model_states.values())).model.expert_weights
        with torch.inference_mode():
            return [
                [[_checksum(tensor[slot]) for tensor in tensors] for slot in range(tensors[0].shape[0])]
                for tensors in weights
            ]

    @_as_json
    def bench_maps(self) -> Any:
        """The expert of each slot [L][P], and how many entries of the dispatch tables contradict it."""
        model_state = next(iter(self._state().model_states.values()))
        experts_LP = model_state.physical_to_logical_map.cpu()
        table, count = model_state.logical_to_physical_map.cpu(), model_state.logical_replica_count.cpu()
        wrong = sum(
            int(experts_LP[layer, slot]) != expert
            for layer in range(table.shape[0])
            for expert in range(table.shape[1])
            for slot in table[layer, expert, : count[layer, expert]].tolist()
        )
        wrong += int((count.sum(1) != experts_LP.shape[1]).sum())
        return {"experts": experts_LP.tolist(), "wrong_entries": wrong}

    @_as_json
    def bench_spoil(self) -> Any:
        """Exchange the weights of two slots of the first layer, as a wrong commit would."""
        tensors = next(iter(self._state().model_states.values())).model.expert_weights[0]
        if get_ep_group().rank_in_group == 0:
            with torch.inference_mode():
                for tensor in tensors:
                    tensor[[0, 1]] = tensor[[1, 0]].clone()
        torch.cuda.synchronize()

    @_as_json
    def bench_fault(self) -> Any:
        """Make rank 1 find other bytes than it expects in the next row that it pulls."""
        if get_ep_group().rank_in_group != 1:
            return
        transfer = self._hook()._parts.transfer
        pull = transfer.pull

        def spoiled(layer: int, what: Any, row: int, fingerprints: Any) -> Any:
            transfer.pull = pull
            return pull(layer, what, row, [number ^ 1 for number in fingerprints or ()])

        transfer.pull = spoiled


def _checksum(tensor: torch.Tensor) -> int:
    words = tensor.contiguous().view(torch.int16).reshape(-1).to(torch.int64)
    places = torch.arange(1, len(words) + 1, device=words.device) % 65_521
    return int((words * places).sum())

"""Scenarios and modes: what vLLM is started with. Plain data, for the process that starts vLLM and for the report."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from eplb_async.core.daemon_settings import EAGER

__all__ = ["MODES", "SCENARIOS", "Mode", "Scenario", "engine_arguments", "parse_case", "write_model"]

NEVER = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Mode:
    """Who balances.

    Attributes:
        about: for people.
        eplb: vLLM's --eplb-config beside the redundant experts; None switches EPLB off.
        ours: the plugin is on.
        settings: of eplb_async, over the scenario's.
        runner: "V2" picks vLLM's second model runner.
    """

    about: str
    eplb: dict[str, Any] | None = None
    ours: bool = False
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    runner: str = ""


MODES: dict[str, Mode] = {
    "off": Mode(about="EPLB off, one slot per expert"),
    "static": Mode(
        about="vLLM's EPLB with its slots, but never rebalanced", eplb={"step_interval": NEVER, "use_async": False}
    ),
    "sync_gloo": Mode(
        about="vLLM, stop the world, torch_gloo", eplb={"use_async": False, "communicator": "torch_gloo"}
    ),
    "sync_nccl": Mode(
        about="vLLM, stop the world, torch_nccl", eplb={"use_async": False, "communicator": "torch_nccl"}
    ),
    "async": Mode(about="vLLM, asynchronous (torch_gloo)", eplb={"use_async": True, "communicator": "torch_gloo"}),
    "ours": Mode(about="eplb_async", eplb={}, ours=True),
    "ours_all": Mode(
        about="eplb_async, policy `default`, which moves nearly all experts every time",
        eplb={},
        ours=True,
        settings={
            "daemon": {"policy": "default", "min_gain": 0.0},
            "hook": {"pull_bytes_per_step": 128 << 20, "staging_rows": 144},
        },
    ),
    "ours_v2": Mode(about="eplb_async, vLLM's V2 model runner", eplb={}, ours=True, runner="V2"),
    "spoiled": Mode(
        about="static, with two experts' weights exchanged: outputs must differ",
        eplb={"step_interval": NEVER, "use_async": False},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A model, its traffic and what is measured.

    Attributes:
        kind: decode, prefill or outputs; see serving.py.
        layers, top_k: of the model; 128 experts, hidden 2048, width 768 as Qwen3-30B-A3B.
        redundant: slots beside one per expert.
        batch: requests that decode together; of prefill, requests per step.
        prompt: tokens of a prompt.
        steps: measured steps; of outputs, waves of requests.
        tokens: of each request's answer, where it is not the steps.
        changes: shares of the steps at which the router gets another bias.
        events: name -> share of the steps at which it happens; see serving.py.
        window, interval: steps of load that a decision sees, and between decisions; vLLM's, and ours where `ours` says nothing.
        ours: settings of eplb_async, in JSON.
        record_loads: keep the counts of every step (vLLM's own keeps those before a rearrangement).
    """

    kind: str
    layers: int = 16
    top_k: int = 8
    redundant: int = 16
    batch: int = 256
    prompt: int = 16
    steps: int = 1000
    tokens: int = 1
    changes: tuple[float, ...] = ()
    events: tuple[tuple[str, float], ...] = ()
    window: int = 50
    interval: int = 100
    ours: str = "{}"
    record_loads: bool = False


def _ours(policy: str, *, daemon: dict[str, Any] | None = None, **hook: Any) -> str:
    eager = {**EAGER, "policy": policy, "par_threshold": 1.0, "min_gain": 0.0, "num_windows": 1, "history_length": 4096}
    often = {"poll_interval_s": 0.02, "discovery_interval_s": 0.1}
    return json.dumps({"daemon": {**eager, **often, **(daemon or {})}, "hook": hook})


SCENARIOS: dict[str, Scenario] = {
    # other experts are hot every 100 steps, so that there is always something to move: what does moving cost?
    "decode": Scenario(
        kind="decode",
        changes=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        ours=_ours("frontier", daemon={"min_gain": 0.005}),
    ),
    "faults": Scenario(
        kind="decode",
        steps=2000,
        changes=(0.2, 0.4, 0.6, 0.8),
        events=(("kill", 0.15), ("status", 0.25), ("serve", 0.3), ("fault", 0.75)),
        ours=_ours("default", pull_bytes_per_step=128 << 20, staging_rows=144),
    ),
    # traffic that balance pays for: steps of prompts, skew of a real trace; the plugin's daemon with its own thresholds
    "prefill": Scenario(
        kind="prefill",
        batch=16,
        prompt=1024,
        steps=320,
        changes=(0.3,),
        ours=json.dumps(
            {
                "daemon": {
                    **EAGER,
                    "policy": "frontier",
                    "window_steps": 5,
                    "num_windows": 4,
                    "interval_steps": 20,
                    "discovery_interval_s": 0.1,
                },
                "hook": {},
            }
        ),
        record_loads=True,
    ),
    # one expert per token: then sums do not depend on where an expert lies, and tokens must be equal
    "outputs": Scenario(
        kind="outputs",
        layers=8,
        top_k=1,
        batch=64,
        steps=26,
        tokens=256,
        window=4,
        interval=8,
        changes=(0.2, 0.4, 0.6, 0.8),
        ours=_ours("default", daemon={"poll_interval_s": 0.002}, pull_bytes_per_step=1 << 30, copies_per_step=512),
    ),
}


def parse_case(text: str) -> tuple[str, Scenario, str]:
    """(scenario's name, scenario, mode) of "decode:ours" or "decode:ours:steps=300:interval=50".

    Raises:
        ValueError: no such scenario, mode or number.
    """
    name, _, rest = text.partition(":")
    mode, *changes = rest.split(":")
    if name not in SCENARIOS or mode not in MODES:
        raise ValueError(f"{text!r}: needed SCENARIO:MODE, of {', '.join(SCENARIOS)} and {', '.join(MODES)}")
    scenario, numbers = SCENARIOS[name], {}
    for change in changes:
        key, _, value = change.partition("=")
        if not isinstance(asdict(scenario).get(key), int) or not value.isdecimal():
            raise ValueError(f"{text!r}: {change!r} is not a number of a scenario")
        numbers[key] = int(value)
    return name, replace(scenario, **numbers), mode  # type: ignore[arg-type]


def write_model(scenario: Scenario, folder: Path) -> Path:
    """A folder with the configuration of a Qwen3-MoE without weights; the worker makes them up."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": scenario.layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "hidden_act": "silu",
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": scenario.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 32_000,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def engine_arguments(scenario: Scenario, mode: str, folder: Path) -> dict[str, Any]:
    """Keyword arguments of vllm.LLM."""
    chosen, decodes = MODES[mode], scenario.kind != "prefill"
    longest = scenario.prompt + (scenario.steps + 200 if scenario.kind == "decode" else scenario.tokens) + 8
    arguments: dict[str, Any] = {
        "model": str(write_model(scenario, folder)),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "seed": 0,
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "max_model_len": longest,
        "max_num_seqs": scenario.batch if decodes else 64,
        "max_num_batched_tokens": 8192 if decodes else scenario.batch * scenario.prompt,
        "gpu_memory_utilization": 0.6,
        "kv_cache_memory_bytes": 16 << 30,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "worker_extension_cls": "benchmarks.vllm.worker.BenchExtension",
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [scenario.batch],
        },
    }
    if chosen.eplb is not None:
        config = {"num_redundant_experts": scenario.redundant, **chosen.eplb}
        if not chosen.ours:
            config = {"window_size": scenario.window, "step_interval": scenario.interval, **config}
        arguments |= {"enable_eplb": True, "eplb_config": config}
    if chosen.ours:
        settings = json.loads(scenario.ours)
        settings["daemon"] = {"window_steps": scenario.window, "interval_steps": scenario.interval} | settings["daemon"]
        for table, values in chosen.settings.items():
            settings[table] |= values
        arguments["additional_config"] = {"eplb_async": settings}
    return arguments

"""A model in vLLM's offline LLM, balanced by eplb_async, on the GPUs of one host.

    python examples/vllm_offline.py MODEL --tensor-parallel-size N [--redundant 16] [--policy frontier] [--rounds 20]

The model's experts and the redundant ones together must divide by N. In vLLM's log, "eplb_async balances ..." says that it took over.
At the end it prints what `eplb-async status` and `eplb-async history` would show in another shell, in short.
"""

import argparse

from eplb_async.core.config import load_settings
from eplb_async.core.errors import EplbError
from eplb_async.runtime.client import ControlClient

__all__ = ["engine_arguments", "main"]

PROMPTS = (
    "Explain why the sky is blue.",
    "Écris un poème sur la mer.",
    "def quicksort(values):",
    "请介绍一下长城的历史。",
)


def engine_arguments(model: str, num_ranks: int, num_redundant: int, policy: str) -> dict[str, object]:
    """Keyword arguments of vllm.LLM."""
    return {
        "model": model,
        "tensor_parallel_size": num_ranks,
        "enable_expert_parallel": True,
        "enable_eplb": True,
        "eplb_config": {"num_redundant_experts": num_redundant},
        "additional_config": {"eplb_async": {"daemon": {"policy": policy}}},
    }


def show_status() -> None:
    """What the daemon knows of the groups on this host."""
    try:
        with ControlClient(load_settings()) as client:
            groups, decisions = client.status().groups, client.history()
    except EplbError as error:
        print(f"no daemon answers: {error}")
        return
    for group in groups:
        par = "no traffic yet" if group.par_live is None else f"PAR {group.par_live:.3f}"
        print(f"{group.group}: {group.state}, {len(group.ranks)} ranks, {par}, generation {group.generation}")
        for decision in decisions.get(group.group, []):
            print(f"  decision {decision.number}: {decision.outcome.value}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tensor-parallel-size", type=int, required=True)
    parser.add_argument("--redundant", type=int, default=16, help="slots beside one per expert")
    parser.add_argument("--policy", default="frontier", help="see eplb-async policies")
    parser.add_argument("--rounds", type=int, default=20, help="batches of 256 requests")
    given = parser.parse_args()

    from vllm import LLM, SamplingParams

    llm = LLM(**engine_arguments(given.model, given.tensor_parallel_size, given.redundant, given.policy))
    sampling = SamplingParams(max_tokens=128, temperature=1.0)
    for _ in range(given.rounds):
        llm.generate(list(PROMPTS) * 64, sampling)
    show_status()


if __name__ == "__main__":  # vLLM's workers import this file
    main()

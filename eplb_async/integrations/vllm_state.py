"""vLLM's EplbState with our hook in it.

    add_model       vLLM's own, then: all ranks attach, and the model's layers get the hook's map tensors
    step            behind each forward: the hook's step ends, the next begins. No collective, no wait for the device
    rearrange       with is_profile: nothing, there is no buffer to reserve; else the daemon is asked for a plan
    everything else that moves weights does nothing: the hook does

What vLLM's kernels read is the hook's own tensors: int64 as theirs, at addresses that graphs may capture, but with rows of K entries
(as many as an expert can have slots) instead of 1,024, of which a kernel reads only the first few.

If one model cannot be taken over, none is: vLLM's own state is made anew for all, and this class is then nothing but its parent.
"""

from collections.abc import Sequence
from typing import Any

import torch

from eplb_async.core.config import Settings
from eplb_async.core.errors import EngineDeclined, EplbError
from eplb_async.core.load import Phase
from eplb_async.integrations.engine_group import EngineGroup, Offer, TorchRanks, as_expected, engine_settings, spec_of
from eplb_async.integrations.vllm_surface import VLLM

__all__ = ["VllmBalancer", "state_class"]


def state_class(theirs: type[Any]) -> type[Any]:
    """A subclass of vLLM's EplbState."""

    class AsyncEplbState(theirs):  # type: ignore[misc]
        """See the module."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.eplb_async: VllmBalancer | None = VllmBalancer.of(self)

        def add_model(self, *args: Any, **kwargs: Any) -> None:
            super().add_model(*args, **kwargs)
            if self.eplb_async is not None:
                try:
                    self.eplb_async.add(self, args, kwargs)
                except EngineDeclined as error:
                    VLLM.stays(error)
                    added, self.eplb_async = self.eplb_async.give_back(), None
                    if len(added) > 1:  # those before this one have our tensors
                        self.model_states.clear()
                        for given, named in added:
                            super().add_model(*given, **named)

        def prepare_forward(self, model_config: Any, num_unpadded_tokens: int, *args: Any, **kwargs: Any) -> None:
            super().prepare_forward(model_config, num_unpadded_tokens, *args, **kwargs)
            if self.eplb_async is not None:
                # drafts of the same step come here too, with fewer tokens
                self.eplb_async.num_tokens = max(self.eplb_async.num_tokens, num_unpadded_tokens)

        def step(self, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False) -> None:
            if self.eplb_async is None:
                super().step(is_dummy, is_profile, log_stats)
            elif not is_profile:
                self.expert_rearrangement_step += 1
                if log_stats and self.expert_rearrangement_step % self.eplb_async.log_interval == 0:
                    self.eplb_async.log_balance(self)
                self.eplb_async.step(is_dummy)

        def rearrange(self, is_profile: bool = False, *args: Any, **kwargs: Any) -> Any:
            if self.eplb_async is None:
                return super().rearrange(is_profile, *args, **kwargs)
            if not is_profile:
                self.eplb_async.ask_for_plan()
            return None

        def start_async_loop(self, *args: Any, **kwargs: Any) -> None:
            if self.eplb_async is None:
                super().start_async_loop(*args, **kwargs)

        def drain_async(self) -> None:
            if self.eplb_async is None:
                super().drain_async()

        def update_mapping(self, *args: Any, **kwargs: Any) -> None:
            if self.eplb_async is not None:
                raise EngineDeclined(["the mapping of a model that eplb_async balances changes by its plans alone"])
            super().update_mapping(*args, **kwargs)

    AsyncEplbState.__name__ = AsyncEplbState.__qualname__ = theirs.__name__
    return AsyncEplbState


class VllmBalancer:
    """Our side of one EplbState: a group for each model.

    Attributes:
        num_tokens: of the step under way, without padding.
        log_interval: steps between two lines about balance, where vLLM is told to log it.
    """

    def __init__(self, settings: Settings, max_decode_tokens: int, log_interval: int) -> None:
        self.num_tokens, self.log_interval = 0, log_interval
        self._settings, self._max_decode_tokens = settings, max_decode_tokens
        self._groups: list[EngineGroup] = []
        self._added: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @classmethod
    def of(cls, state: Any) -> "VllmBalancer | None":
        """For a new EplbState; None, and a warning, where vLLM's own must stay."""
        from vllm.config import get_current_vllm_config_or_none

        config, parallel = get_current_vllm_config_or_none(), state.parallel_config
        extra = getattr(config, "additional_config", None)
        try:
            settings = engine_settings(extra.get("eplb_async") if isinstance(extra, dict) else None)
            if not settings.integration.enabled:
                VLLM.logger.info("eplb_async is switched off (integration.enabled); vLLM's own EPLB stays")
                return None
            if parallel.enable_elastic_ep:
                raise EngineDeclined(["elastic expert parallelism changes the ranks of a running model"])
        except EplbError as error:
            VLLM.stays(error)
            return None
        return cls(settings, _max_decode_tokens(config), parallel.eplb_config.log_balancedness_interval)

    def add(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model that vLLM has just added: attach, and give its layers the hook's tensors.

        Args:
            state: vLLM's.
            args, kwargs: as its add_model was called.

        Raises:
            EngineDeclined: on all ranks, if one cannot.
        """
        from vllm.distributed import get_ep_group

        self._added.append((args, kwargs))
        model_state, ep_group = next(reversed(state.model_states.values())), get_ep_group()
        ranks = TorchRanks(ep_group.cpu_group)
        part = f"{len(self._groups) + 1}" if self._groups else ""
        group = EngineGroup.join(
            ranks, lambda: as_expected("vLLM", lambda: _offer(model_state, ranks.size, part)), self._settings
        )
        self._groups.append(group)
        _use_tensors(model_state, group)
        state.is_async = False  # vLLM starts its own worker where this is true
        VLLM.logger.info(
            "eplb_async balances %s: group %s, policy %s, see `eplb-async status`",
            model_state.model_name,
            group.hook.group,
            self._settings.daemon.policy,
        )

    def give_back(self) -> Sequence[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Leave all groups; returns how add_model was called for each model."""
        while self._groups:
            self._groups.pop().close()
        return self._added

    def step(self, is_dummy: bool) -> None:
        """A forward of all models has ended."""
        if is_dummy:
            phase = Phase.DUMMY
        else:
            # more tokens than decoding requests can have: there is a prompt among them
            phase = Phase.MIXED if self.num_tokens > self._max_decode_tokens else Phase.DECODE
        for group in self._groups:
            group.step(phase, self.num_tokens)
        self.num_tokens = 0

    def ask_for_plan(self) -> None:
        """Of each group's daemon."""
        for group in self._groups:
            group.ask_for_plan()

    def log_balance(self, state: Any) -> None:
        """The line that vLLM logs for --eplb-config.log_balancedness, with an all-reduce and a wait, as there."""
        loads = state._sync_load_pass()
        for group, load_LP, model_state in zip(self._groups, loads, state.model_states.values(), strict=True):
            ranks_LR = load_LP.reshape(load_LP.shape[0], group.hook.spec.num_ranks, -1).sum(dim=-1).float()
            mean, most = torch.stack([ranks_LR.mean(dim=1).sum(), ranks_LR.max(dim=1).values.sum()]).tolist()
            if group.hook.rank == 0:
                VLLM.logger.info(
                    "EPLB step: %d for model %s: avg_tokens=%.2f, max_tokens=%d, balancedness=%.4f (eplb_async, generation %d)",
                    state.expert_rearrangement_step,
                    model_state.model_name,
                    mean,
                    most,
                    mean / most if most else 0.0,
                    group.hook.statistics().generation,
                )


def _offer(model_state: Any, num_ranks: int, part: str) -> Offer:
    model = model_state.model
    return Offer(
        model=model_state.model_name,
        part=part,
        spec=spec_of(
            model.num_moe_layers,
            model.num_logical_experts,
            model.num_physical_experts,
            num_ranks,
            model.num_expert_groups,
        ),
        weights=model.expert_weights,
        load=model_state.expert_load_pass,
        placement=model_state.physical_to_logical_map.cpu().numpy(),
    )


def _use_tensors(model_state: Any, group: EngineGroup) -> None:
    """The hook's maps for vLLM's, and no memory for what the hook does not need. Graphs are captured later."""
    hook = group.hook
    model_state.physical_to_logical_map = hook.slot_to_expert_LP
    model_state.logical_to_physical_map = hook.dispatch_table_LEK
    model_state.logical_replica_count = hook.dispatch_count_LE
    model_state.model.set_eplb_state(model_state.expert_load_pass, hook.dispatch_table_LEK, hook.dispatch_count_LE)
    model_state.expert_load_window = model_state.expert_load_window[:0].clone()
    model_state.expert_buffer, model_state.communicator = [], None


def _max_decode_tokens(config: Any) -> int:
    """Tokens of a forward in which every request decodes."""
    if config is None:
        return 0
    speculative = config.speculative_config
    drafted = getattr(speculative, "num_speculative_tokens", None) or 0
    return int(config.scheduler_config.max_num_seqs * (1 + drafted))

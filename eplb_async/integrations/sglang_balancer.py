"""SGLang's EPLBManager with our hook in it.

    ModelRunner.initialize ends       `join`: all ranks attach. The model is loaded; KV cache and graphs come later
    ModelRunner.forward begins        `note`: what kind of forward it is
    on_forward_pass_end               the hook's step ends, the next begins; rows of maps that a commit changed are copied
    rebalance                         the daemon is asked for a plan
    disable_rebalance, new weights    `leave`: on all ranks between the same two forwards, as SGLang calls these on all

Before `join`, after `leave`, and wherever anything does not fit, the class is nothing but its parent: SGLang's recorder has counted all the
time, and its maps are kept right, so that its own balancing goes on from where ours ended.
"""

from collections.abc import Iterator
from typing import Any

from eplb_async.core.config import Settings
from eplb_async.core.errors import EngineDeclined, EplbError
from eplb_async.core.load import Phase
from eplb_async.integrations.engine_group import EngineGroup, TorchRanks, agree, engine_settings
from eplb_async.integrations.sglang_engine import SglangModel, engine_ranks, refusals
from eplb_async.integrations.sglang_maps import MetadataMirror
from eplb_async.integrations.sglang_surface import SGLANG

__all__ = ["SglangBalancer", "balancer_class"]

PHASES = {
    "DECODE": Phase.DECODE,
    "TARGET_VERIFY": Phase.DECODE,
    "MIXED": Phase.MIXED,
    "EXTEND": Phase.PREFILL,
    "SPLIT_PREFILL": Phase.PREFILL,
    "DLLM_EXTEND": Phase.PREFILL,
}
"""By the name of SGLang's ForwardMode. An idle rank is in the phase of the others: it computes with the tokens that they send."""


def balancer_class(theirs: type[Any]) -> type[Any]:
    """A subclass of SGLang's EPLBManager."""

    class AsyncEPLBManager(theirs):  # type: ignore[misc]
        """See the module.

        Attributes:
            eplb_async: of an instance that has joined.
            eplb_async_complete: all of our hooks are in place; without them no instance joins.
        """

        eplb_async_complete = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.eplb_async: SglangBalancer | None = None
            self._eplb_async_tried = False

        def eplb_async_join(self) -> None:
            """Attach, once, if SGLang's own balancing need not stay."""
            if self._eplb_async_tried or not self.eplb_async_complete:
                return
            self._eplb_async_tried = True
            try:
                self.eplb_async = SglangBalancer.join(self._get_model(), self._model_config, engine_settings())
            except EplbError as error:
                SGLANG.stays(error)

        def eplb_async_leave(self, why: str) -> None:
            """Leave the group; from now on this is SGLang's own."""
            balancer, self.eplb_async = self.eplb_async, None
            if balancer is None:
                return
            SGLANG.logger.warning("eplb_async leaves, and SGLang's own EPLB takes over: %s", why)
            balancer.leave()
            super().reset_generator()
            if balancer.has_empty:
                super().disable_rebalance("slots without an expert were left, which SGLang's own EPLB cannot read")

        def on_forward_pass_end(self) -> None:
            if self.eplb_async is not None:
                try:
                    self.eplb_async.step(self._get_model())
                    return
                except EngineDeclined as error:
                    self.eplb_async_leave(str(error))
            super().on_forward_pass_end()

        def disable_rebalance(self, reason: str) -> None:
            self.eplb_async_leave(reason)
            super().disable_rebalance(reason)

        def rebalance(self) -> Iterator[None]:
            if self.eplb_async is not None:
                self.eplb_async.ask_for_plan()
                return
            yield from super().rebalance()

    AsyncEPLBManager.__name__ = AsyncEPLBManager.__qualname__ = theirs.__name__
    return AsyncEPLBManager


class SglangBalancer:
    """Our side of one EPLBManager that has joined. Its methods belong to the thread that runs the forwards."""

    def __init__(self, group: EngineGroup, model: SglangModel, ranks: TorchRanks) -> None:
        """Use `join`."""
        self._group, self._model, self._ranks = group, model, ranks
        self._mirror = MetadataMirror(model.metadata, group.hook, model.layer_ids)
        self._phase, self._num_tokens = Phase.MIXED, 0
        self._looked = False

    @classmethod
    def join(cls, model: Any, model_config: Any, settings: Settings) -> "SglangBalancer":
        """Attach on all ranks, or on none; all call this together.

        Args:
            model: loaded, with its expert weights where they will stay.
            model_config: SGLang's.
            settings: see `engine_settings`.

        Raises:
            EngineDeclined: on all ranks, if one cannot.
        """
        if reasons := refusals():
            raise EngineDeclined(reasons)
        ranks, found = engine_ranks(), list[SglangModel]()

        def offer() -> Any:
            found.append(SglangModel.read(model, model_config))
            return found[0].offer

        group = EngineGroup.join(ranks, offer, settings)
        SGLANG.logger.info(
            "eplb_async balances %s: group %s, policy %s, see `eplb-async status`",
            found[0].offer.model,
            group.hook.group,
            settings.daemon.policy,
        )
        return cls(group, found[0], ranks)

    @property
    def has_empty(self) -> bool:
        """A live slot holds no expert."""
        return self._mirror.has_empty

    def note(self, forward_batch: Any) -> None:
        """A forward begins with this batch."""
        busy = Phase.PREFILL if forward_batch.is_extend_in_batch else Phase.DECODE
        self._phase = PHASES.get(forward_batch.forward_mode.name, busy)
        self._num_tokens = 0 if forward_batch.input_ids is None else len(forward_batch.input_ids)

    def step(self, model: Any) -> None:
        """A forward has ended.

        Raises:
            EngineDeclined: at the first step, on all ranks: weights are not where they were at `join`.
            PeerLost, StepDrift: see EngineGroup.step.
        """
        if not self._looked:
            self._look(model)
        self._model.counts.gather()
        self._group.step(self._phase, self._num_tokens)
        self._mirror.follow()

    def ask_for_plan(self) -> None:
        """Have the daemon decide now."""
        self._group.ask_for_plan()

    def leave(self) -> None:
        """Detach. Maps and weights stay as the last commit left them."""
        self._mirror.follow()
        self._group.close()

    def _look(self, model: Any) -> None:
        """Warm-up and the first forward may still have changed the layout of weights; later ones do not."""
        self._looked = True
        agree(self._ranks, self._model.moved(model), None)

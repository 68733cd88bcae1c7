"""The hook: all that an engine calls. Attach once, wrap every forward in a step, detach.

    one step        publish own word -> read all words of step s - lag -> commit or drop what they say
                    -> look at the board, adopt a plan -> issue copies -> [the forward] -> record its load

In most steps nothing happens: no plan is held, and all words are what they were. On one node such a step
is one call into compiled code.

Nothing in it waits for the daemon. It waits for another rank only if that rank's word of `lag` steps ago is not there.
"""

import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

import torch
from torch._C._distributed_c10d import Store

from eplb_async.core.config import Settings, load_settings
from eplb_async.core.errors import HookClosed, LifecycleError
from eplb_async.core.load import LoadKind, Phase
from eplb_async.core.placement import IntArray
from eplb_async.core.plan import generation_of, position_of
from eplb_async.core.spec import MoESpec
from eplb_async.rank.agreement import Agreement, Decision, Verdict
from eplb_async.rank.assembly import AttachRequest, Parts, assemble
from eplb_async.rank.phases import phase_of
from eplb_async.rank.plan_deadline import PlanDeadline
from eplb_async.rank.plan_reader import BadPlan, PreparedPlan, Snapshot
from eplb_async.rank.statistics import HookPhase, HookStatistics, PhaseTimes
from eplb_async.rank.step_context import StepContext
from eplb_async.rank.weights import LayerTensors
from eplb_async.shm.words import Reduced

__all__ = ["DaemonChoice", "RankHook"]

log = logging.getLogger(__name__)

DaemonChoice = Literal["optional", "auto", "required"]


class RankHook:
    """One rank of one group. All methods belong to the thread that runs the forwards.

    Attributes:
        group, rank, spec: as attached.
        slot_to_expert_LP: int64 [L, P], the expert in every slot, -1 for an empty one.
        dispatch_table_LEK: int64 [L, E, K], slots per expert; send token i of expert e to
            `table[l, e, hash(i) % count[l, e]]`, slot p lies on rank p // S.
        dispatch_count_LE: int64 [L, E].

    The tensors are rewritten in place between two forwards; their addresses never change.
    """

    agreement_class = Agreement
    may_repeat = True
    """Take the short way through steps in which nothing happens; tests that watch every word do not."""

    def __init__(self, parts: Parts) -> None:
        """Use `attach`."""
        self._parts = parts
        self.group, self.rank, self.spec = parts.group, parts.rank, parts.info.spec
        self.slot_to_expert_LP = parts.maps.slot_to_expert_LP
        self.dispatch_table_LEK = parts.maps.dispatch_table_LEK
        self.dispatch_count_LE = parts.maps.dispatch_count_LE
        self._agreement = self.agreement_class()
        self._plan: PreparedPlan | None = None
        self._deadline = PlanDeadline(parts.settings.hook)
        self._step, self._running = 0, False
        self._quiet, self._last_word = False, (0, 0, 0, 0)
        self._phase, self._tokens, self._version = Phase.MIXED, 0, self._agreement.decided
        self._previous_us = self._told = 0
        self._closed = ""
        self._context = StepContext(self.before_forward, self.after_forward, self._discard_step)
        self._num_plans, self._num_drops, self._failure = 0, 0, (0, "")
        self._times = {phase: PhaseTimes() for phase in HookPhase}

    # size: the keyword arguments that design section 8 names, and four that are rarely used
    @classmethod
    def attach(
        cls,
        *,
        group: str,
        rank: int,
        spec: MoESpec,
        weights: Sequence[LayerTensors],
        load: torch.Tensor,
        daemon: DaemonChoice = "optional",
        placement: IntArray | None = None,
        load_kind: LoadKind | None = None,
        settings: Settings | None = None,
        rendezvous: Store | None = None,
    ) -> "RankHook":
        """Join a group; returns when all its ranks have.

        Args:
            group: name of the model served together; letters, digits, '.', '_', '-'. All ranks give the same.
            rank: 0..R-1.
            spec: the model's shape; the same on all ranks.
            weights: per MoE layer, every tensor [S, ...] that belongs to an expert; on the CPU from `share_weights`.
            load: int32 counts that the engine adds to during a forward; logical [L, E], slots of all ranks [L, P], or
                own slots [L, S]. The hook reads and zeroes it after each forward.
            daemon: "auto" starts this node's daemon if none runs, "required" raises if none does, "optional" serves
                on without one until it comes.
            placement: int [L, P], the placement in which the weights are loaded, if not the initial one.
            load_kind: what `load` counts, where its shape fits two readings.
            settings: instead of those of EPLB_ASYNC_CONFIG and the environment.
            rendezvous: a store of torch.distributed that all ranks reach, for attach: the group lives on `spec.num_nodes`
                hosts, rank r on node r // (R / num_nodes); without it on this host, whatever the spec says of nodes.

        Raises:
            SpecError, PlacementError, ConfigError, UnknownName: an argument does not fit.
            SpecMismatch, RankTaken, AttachTimeout: it does not fit the other ranks, or they do not come.
            PeerLost: another rank left, as it failed to attach.
            SegmentError: shared memory cannot be made, or what is there is not ours.
            DaemonUnavailable: see `daemon`.
        """
        settings = settings or load_settings()
        parts = assemble(
            AttachRequest(
                group=group,
                rank=rank,
                spec=spec,
                weights=weights,
                load=load,
                daemon=daemon,
                placement=placement,
                load_kind=load_kind,
                settings=settings,
                rendezvous=rendezvous,
            )
        )
        return cls(parts)

    def step(
        self, phase: str | Phase = Phase.MIXED, num_tokens: int = 0, last_step_us: float | None = None
    ) -> StepContext:
        """A context around one forward: before_forward on entering, after_forward on leaving.

        If the forward raises, the step still counts (other ranks made it), but its load is not recorded.
        """
        context = self._context
        context.phase, context.num_tokens, context.last_step_us = phase, num_tokens, last_step_us
        return context

    def before_forward(
        self, phase: str | Phase = Phase.MIXED, num_tokens: int = 0, last_step_us: float | None = None
    ) -> None:
        """Everything that must happen between two forwards. During a CUDA graph capture it does nothing.

        Args:
            phase: "prefill", "decode", "mixed", "dummy" (an idle rank), or "profile" (warm-up).
            num_tokens: tokens of this rank's batch.
            last_step_us: how long the step before took, if the engine measures that; 0: not to be counted. None: the time from its beginning
                to now, in which an engine may have waited for requests.

        Raises:
            PeerLost, StepDrift: do not run this forward; detach, and attach all ranks again.
            HookClosed: the hook is detached, or a step before this one failed.
            UnknownName: no such phase.
            LifecycleError: the step before is not finished.
        """
        if self._parts.capturing():
            return
        if self._closed:
            raise HookClosed(self.group, self.rank, self._closed)
        if self._running:
            raise LifecycleError(
                f"group {self.group!r} rank {self.rank}: after_forward of step {self._step} was not called"
            )
        entered, now_ns = phase_of(phase), time.perf_counter_ns()
        self._previous_us = self._parts.pace.begin(now_ns, self._phase, self._tokens, last_step_us)
        self._phase, self._tokens = entered, num_tokens
        try:
            if not self._quiet:
                self._advance(published=False)
            elif not self._repeat():
                self._advance(published=True)
            self._version, self._running = self._agreement.decided, True
        except BaseException as error:
            # the word of this step may be out and half of it done: a second try could decide it twice
            self._closed = str(error) or type(error).__name__
            raise

    def after_forward(self, phase: str | Phase | None = None, num_tokens: int | None = None) -> None:
        """Record the load of the forward that has just run. During a CUDA graph capture it does nothing.

        Args:
            phase, num_tokens: what the forward turned out to be, if before_forward could not know.
        """
        if not self._running or self._parts.capturing():
            return
        start = time.perf_counter_ns()
        if phase is not None:
            self._phase = phase_of(phase)
        if num_tokens is not None:
            self._tokens = num_tokens
        told, self._told = self._told, self._parts.stager.bytes_pulled
        since = self._previous_us, self._told - told
        self._parts.recorder.record(self._step, self._phase, self._version, self._tokens, *since)
        self._finish_step()
        self._times[HookPhase.RECORD].add(time.perf_counter_ns() - start)

    def statistics(self) -> HookStatistics:
        """Counters and the host time of each phase of the hook."""
        agreement, stager, pace = self._agreement, self._parts.stager, self._parts.pace
        return HookStatistics(
            step=self._step,
            generation=generation_of(agreement.decided),
            position=position_of(agreement.decided),
            num_commits=self._parts.committer.num_commits,
            num_plans=self._num_plans,
            num_drops=self._num_drops,
            rows_pulled=stager.rows_pulled,
            bytes_pulled=stager.bytes_pulled,
            staging_bytes=self._parts.transfer.staging.num_bytes,
            pull_budget_bytes=pace.budget_bytes,
            pull_pauses=pace.num_pauses,
            pull_slowdowns=pace.num_slowdowns,
            draining=stager.orphaned,
            pulls_abandoned=stager.pulls_abandoned,
            last_error="plan {}: {}".format(*self._failure) if self._failure[0] else "",
            times={phase.value: times.timing() for phase, times in self._times.items()},
        )

    @property
    def num_commits(self) -> int:
        """Entries of plans committed since attach: the maps have changed if this has. Costs nothing, to be asked at every step."""
        return self._parts.committer.num_commits

    @property
    def live(self) -> Snapshot:
        """The placement in the map tensors and the version of each layer, on the host, without a wait; not to be written to."""
        return self._parts.maps.snapshot

    def detach(self) -> None:
        """Leave the group. The map tensors and the weights stay as they are. Idempotent."""
        if self._closed != "it was detached":
            self._closed = "it was detached"
            self._running = False  # there is no ring any more to record a step in
            self._parts.close()
            log.info("group %s rank %d detached at step %d", self.group, self.rank, self._step)

    def __enter__(self) -> "RankHook":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _repeat(self) -> bool:
        """A step with the same word as before; false if there is more to do, which `_advance` does.

        With no plan, and `staged` and `committed` of all ranks equal to `decided`, words decide nothing.
        """
        parts, start = self._parts, time.perf_counter_ns()
        if not parts.exchange.repeat(self._step, self._step - parts.info.lag):
            return False
        if not parts.reader.idle or parts.membership.board.abort == self._agreement.generation:
            return False
        self._times[HookPhase.AGREE].add(time.perf_counter_ns() - start)
        return True

    def _advance(self, published: bool) -> None:
        """One step of the protocol; tests/model/agreement_model.py says the same in `publish_word` and `act`.

        `published`: the word of this step is out already, and was the one before.
        """
        parts, agreement, clock = self._parts, self._agreement, time.perf_counter_ns
        start = clock()
        self._poll()
        polled = clock()
        word = self._last_word if published else agreement.word()
        if not published:
            parts.exchange.publish(self._step, word)
        words = parts.exchange.collect(self._step - parts.info.lag)
        decision = agreement.decide(words)
        agreed = applied = clock()
        if decision.verdict is not Verdict.NOTHING:
            self._apply(decision)
            applied = clock()
            self._times[HookPhase.COMMIT].add(applied - agreed)
        num_plans, spent = self._num_plans, 0
        self._adopt(words)
        if self._plan is not None:
            parts.stager.agree(words)
            if not agreement.failed:
                spent = parts.stager.issue(words.committed, parts.pace.grant(self._phase))
                self._poll_staged()
            parts.recorder.ring.show_pace(parts.pace.budget_bytes, parts.pace.num_pauses, parts.pace.num_slowdowns)
        odd = decision.verdict is not Verdict.NOTHING or self._num_plans > num_plans or bool(parts.committer.running)
        parts.pace.ran(spent, parts.stager.bytes_in_flight, odd=odd)
        self._times[HookPhase.ISSUE].add(clock() - applied)
        self._times[HookPhase.POLL].add(polled - start)
        self._times[HookPhase.AGREE].add(agreed - polled)
        self._last_word, self._quiet = word, self.may_repeat and self._is_quiet(word)

    def _is_quiet(self, word: tuple[int, int, int, int]) -> bool:
        """Nothing is going on here, and the others have been told so."""
        agreement = self._agreement
        counters = agreement.staged == agreement.committed == agreement.decided
        return (
            self._plan is None
            and counters
            and not agreement.failed
            and self._parts.stager.idle
            and agreement.word() == word
        )

    def _poll(self) -> None:
        """Find out what the device has finished, and whether the active plan must be given up."""
        parts, agreement = self._parts, self._agreement
        if agreement.committed != agreement.decided:
            self._poll_committed()
        if not parts.stager.idle:
            self._poll_staged()
        if parts.membership.board.abort == agreement.generation:  # of a later one: damaged, no daemon wrote it
            self._fail(agreement.generation, "a daemon aborted it")
        if self._plan is not None and (why := self._deadline.passed(self._step)):
            self._fail(self._plan.generation, why)

    def _poll_committed(self) -> None:
        ended = self._parts.committer.poll()
        if ended is not None:
            self._agreement.finish_commit(*ended)
        self._agreement.settle(bool(self._parts.committer.running) or self._parts.stager.orphaned)

    def _poll_staged(self) -> None:
        position, error = self._parts.stager.poll()
        if position and self._plan is not None:
            self._agreement.stage(position)
        if error is not None and self._plan is not None:
            self._fail(self._plan.generation, str(error))
        elif error is not None:
            raise error

    def _apply(self, decision: Decision) -> None:
        parts = self._parts
        if decision.verdict is Verdict.DROP:
            self._num_drops += 1
            generation, own = self._failure
            why = own if generation == decision.generation else decision.why
            log.warning("group %s rank %d: plan %d dropped: %s", self.group, self.rank, decision.generation, why)
            parts.stager.drop(parts.committer.running)
            self._plan = None
        elif self._plan is not None:
            parts.committer.commit(self._plan, decision.position)
            if decision.position == self._plan.length:
                log.info("group %s rank %d: plan %d committed", self.group, self.rank, self._plan.generation)
                parts.stager.finish()
                self._plan = None
        self._poll_committed()

    def _adopt(self, words: Reduced) -> None:
        """Look at the board (I4): take the plan that is next, refuse one that does not fit, ignore all others."""
        parts, agreement = self._parts, self._agreement
        found = parts.reader.poll(parts.maps.snapshot)
        if found is None or self._plan is not None:
            return
        generation = found.generation or agreement.generation
        if generation < agreement.generation:
            parts.reader.forget()
        elif agreement.may_adopt(generation, words):
            if found.against is not parts.maps.snapshot:
                parts.reader.check_again()
                return
            parts.reader.forget()
            if isinstance(found, BadPlan):
                self._fail(generation, found.why)
                return
            agreement.adopt(found)
            parts.stager.start(found)
            self._deadline.start(self._step)
            self._plan = found
            self._num_plans += 1
            log.info(
                "group %s rank %d: plan %d with %d entries begins", self.group, self.rank, generation, found.length
            )

    def _fail(self, generation: int, why: str) -> None:
        if self._agreement.fail(generation, why):
            self._failure = generation, why
            log.warning("group %s rank %d gives plan %d up: %s", self.group, self.rank, generation, why)

    def _discard_step(self) -> None:
        if self._running:
            self._parts.recorder.discard(self._step, self._version)
            self._parts.pace.ran(0, 0, odd=True)
            self._finish_step()

    def _finish_step(self) -> None:
        self._step += 1
        self._running = False

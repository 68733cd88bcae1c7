"""Settings of the daemon; read by config.py."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from eplb_async.core.setting_checks import at_least, plain, positive

__all__ = ["EAGER", "DaemonSettings"]

EAGER: Mapping[str, Any] = {
    "policy": "default",
    "num_windows": 8,
    "par_drift": 1e9,
    "memory": "all",
    "least_change": 0.0,
    "confidence": 0.0,
    "move_cost": 0.0,
    "weigh_time": False,
}
"""Settings that plan at every interval, on all windows kept, and move for any gain, whatever it costs, as the schedules of engines do. For comparisons
with those, and for tests and demonstrations, whose few hundred steps stand for hours: there no gain lives long enough to pay for its bytes."""


class DaemonSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the daemon. The defaults are what we recommend, chosen by replay of recorded traffic (docs/planning.md).

    Fields:
        policy: name of the placement policy; `eplb-async serve --help` lists them.
        policy_options: its options, checked by the policy. What a move costs is no option of it: `move_cost` is told to each policy that can use it.
        shadow: make plans, judge them and write them down, but move nothing: `eplb-async status` says what would have been gained.
        serve: which steps' load placement serves: all, or prefill or decode ones, mixed ones with either; dummy and profile steps never count.
        prefill_weight, decode_weight: with `serve` all, what a token of a prefill step and of a decode step counts, 0 to 1, and one of them 1; a token of
            a mixed step counts as the greater. 0.1 and 1: ten tokens of prefill are as much as one of decode.
        window_steps: steps summed into one window of load.
        num_windows: windows kept and given to the policy, newest last.
        interval_steps: steps between two decisions while nothing happens.
        par_drift: decide sooner once the PAR of the newest window is by this share above the least since the last decision;
            a great number: never.
        min_gap_steps: but not before so many steps.
        par_threshold: decide only while the live PAR (mean over layers) is above this; 1 decides at every interval.
        min_gain: a layer moves only if its predicted PAR falls by at least this share of its PAR.
        move_cost: what filling all slots of a layer anew has to bring over the expected life of the gain, in PAR x steps; part of
            them, so much less. 1000: a gain of 0.5 that lives for 2000 steps pays for the whole layer, or one of 0.05 for a tenth of it. 0: any
            gain pays. Policies that fill most slots anew, such as `default`, seldom pay 1000.
        confidence: a gain counts for as much as it is sure to be, these many standard deviations of the counts' sampling noise
            below what the windows say; 0 takes it as it is.
        memory: fitted: plan on as many of the newest windows as would have forecast the kept ones best, so that stale ones are left
            out as soon as traffic changes. all: on all that are kept.
        least_change: decide again only once load has changed since the last decision: the squared difference of shares, over what chance
            makes of it (about 1 where traffic stays). 2 is well beyond chance; 0 decides anyway.
        regret_windows: windows after a commit by which a plan is judged: what brought less than was predicted lowers the trust in later gains, and
            layers that were better off before go back, once. 0: plans are not judged.
        weigh_time: once step times have told what tokens, bytes and commits cost, do not make a plan that saves less time than its moves take.
        bytes_per_step: most bytes that plans may move per step, on average over all ranks together; 0: no limit.
        budget_steps: for how many steps bytes that were not needed are kept; a plan can spend them at once.
        poll_interval_s: how often rings and words are read.
        discovery_interval_s: how often new groups are looked for.
        plan_deadline_s: a plan that is not done after this is aborted.
        policy_deadline_s: a policy that has not answered after this is killed with its worker.
        pool_workers: worker processes for policies.
        history_length: decisions kept for `eplb-async status` and `history`.
        exit_when_idle_s: stop after this long without a group; 0 never stops.
        log_level: of the daemon's own log, on standard error.
    """

    policy: str = "frontier"
    policy_options: dict[str, Any] = {}
    shadow: bool = False
    serve: Literal["all", "prefill", "decode"] = "all"
    prefill_weight: float = 1.0
    decode_weight: float = 1.0
    window_steps: int = 50
    num_windows: int = 16
    interval_steps: int = 100
    par_drift: float = 0.05
    min_gap_steps: int = 50
    par_threshold: float = 1.05
    min_gain: float = 0.02
    move_cost: float = 1000.0
    confidence: float = 1.0
    memory: Literal["fitted", "all"] = "fitted"
    least_change: float = 2.0
    regret_windows: int = 4
    weigh_time: bool = True
    bytes_per_step: int = 0
    budget_steps: int = 2000
    poll_interval_s: float = 0.1
    discovery_interval_s: float = 0.5
    plan_deadline_s: float = 60.0
    policy_deadline_s: float = 30.0
    pool_workers: int = 1
    history_length: int = 256
    exit_when_idle_s: float = 0.0
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        at_least(
            self, 1, "window_steps", "num_windows", "interval_steps", "par_threshold", "pool_workers", "history_length"
        )
        at_least(
            self,
            0,
            "min_gain",
            "par_drift",
            "min_gap_steps",
            "move_cost",
            "confidence",
            "least_change",
            "regret_windows",
            "bytes_per_step",
            "exit_when_idle_s",
        )
        at_least(self, 1, "budget_steps")
        positive(self, "poll_interval_s", "discovery_interval_s", "plan_deadline_s", "policy_deadline_s")
        self._check_weights()
        plain(self.policy_options)
        levels = ("DEBUG", "INFO", "WARNING", "ERROR")
        if self.log_level not in levels:
            raise ValueError(f"`log_level` is {self.log_level!r}; it must be one of {', '.join(levels)}")

    def _check_weights(self) -> None:
        weights = (self.prefill_weight, self.decode_weight)
        at_least(self, 0, "prefill_weight", "decode_weight")
        if max(weights) != 1:
            # less for both would make noise look larger than it is, more than 1 smaller
            raise ValueError(f"`prefill_weight` and `decode_weight` are {weights}; the greater of them must be 1")
        if self.serve != "all" and weights != (1, 1):
            raise ValueError(f'`serve` is {self.serve!r}; `prefill_weight` and `decode_weight` are for `serve` "all"')

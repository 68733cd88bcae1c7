"""What a real daemon makes of a group: with nothing set, and of phases that want different placements."""

import os

import pytest

from eplb_async.core.config import Settings
from eplb_async.observability.history import Decision, Outcome
from eplb_async.policies.registry import load_policy
from eplb_async.runtime.client import ControlClient
from tests.runtime.watching import Start, until, with_windows

__all__: list[str] = []


@pytest.mark.timeout(300)
def test_a_daemon_with_nothing_set_balances_and_then_leaves_alone(
    start_daemon: Start, start_ranks: Start, daemon_settings: Settings, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the environment says nothing of the daemon it plans by itself with `frontier`, once traffic has stayed for long enough to be worth it; then no more."""
    for name in [name for name in os.environ if name.startswith("EPLB_ASYNC_DAEMON_")]:
        monkeypatch.delenv(name)
    load_policy("frontier").warm_up()  # else a fresh clone compiles it for a minute while the test waits
    start_daemon()
    start_ranks()
    with ControlClient(daemon_settings) as client:

        def paid() -> Decision | None:
            return next((decision for decision in client.history().get(group, []) if decision.verdict), None)

        decision = until(paid, "a plan that was judged")
        assert (decision.policy, decision.outcome) == ("frontier", Outcome.FINISHED)
        assert decision.verdict.startswith("paid")
        assert decision.par_realised is not None
        assert decision.par_live is not None
        assert decision.par_realised < decision.par_live - 0.1
        start = client.status().groups[0].ranks[0].step
        until(lambda: client.status().groups[0].ranks[0].step > start + 500, "500 more steps")
        assert client.history()[group][-1].number == decision.number


@pytest.mark.parametrize("weight_and_better", [("1", "prefill"), ("0.02", "decode")], ids=["all", "mix"])
def test_placement_serves_the_mix_that_was_asked_for(
    start_daemon: Start,
    start_ranks: Start,
    daemon_settings: Settings,
    group: str,
    monkeypatch: pytest.MonkeyPatch,
    weight_and_better: tuple[str, str],
) -> None:
    """Prompts want other experts than decoding and have eight times its tokens: they are served, unless theirs count a fiftieth. Both are told."""
    prefill_weight, better = weight_and_better
    monkeypatch.setenv("EPLB_ASYNC_DAEMON_PREFILL_WEIGHT", prefill_weight)
    start_daemon()
    start_ranks(prefill_times=8.0, phases=["prefill", "decode"])
    with ControlClient(daemon_settings) as client:
        until(lambda: with_windows(client, group), "windows")
        before = {load.phase: load for load in client.status().groups[0].phase_loads}
        assert client.rebalance(group).outcome is Outcome.FINISHED
        after = {load.phase: load for load in client.status().groups[0].phase_loads}
    assert after.keys() == {"prefill", "decode"}
    par = {phase: load.par_live or 0.0 for phase, load in after.items()}
    assert min(par, key=lambda phase: par[phase]) == better
    assert par[better] < (before[better].par_live or 0.0) - 0.1
    assert par[better] < max(par.values()) - 0.1
    prefill, decode = after["prefill"], after["decode"]
    assert (prefill.weight, decode.weight) == (float(prefill_weight), 1.0)
    assert prefill.tokens == 8000 * prefill.steps
    assert decode.tokens == 1000 * decode.steps
    assert 0 <= prefill.steps - decode.steps <= 4
    assert prefill.windows == decode.windows > 0

"""Weighted tables from the planner to the router, and through a daemon's life and death: real processes throughout."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_async.core.config import Settings
from eplb_async.core.plan import Plan
from eplb_async.core.score import rank_load, table_share, windows_par
from eplb_async.core.spec import MoESpec
from eplb_async.observability.history import Decision, Outcome
from eplb_async.runtime.client import ControlClient
from eplb_async.runtime.planner import PackedArray, PlanProposal, PlanRequest, make_plan
from tests.rank.harness import Actor, RankGroup, hook_settings
from tests.rank.publisher import Publisher
from tests.runtime.watching import until, with_windows

__all__: list[str] = []

Start = Callable[..., subprocess.Popen[Any]]
SPEC = MoESpec(num_layers=2, num_experts=12, num_ranks=4, num_redundant=4)


def tables(actor: Actor) -> tuple[list[list[list[int]]], list[list[int]]]:
    """The router's dispatch table and its lengths."""
    return actor.hook.dispatch_table_LEK.tolist(), actor.hook.dispatch_count_LE.tolist()


def router_shares(ranks: RankGroup) -> Any:
    """The shares that the tables of all ranks give the slots, [L, P]; they must be the same on all."""
    found = ranks.all("call", tables)
    assert all(one == found[0] for one in found)
    layers = zip(*found[0], strict=True)
    return np.stack([table_share(np.array(rows), np.array(lengths), SPEC.num_slots) for rows, lengths in layers])


def proposal_for(
    daemon: Publisher, windows_TLE: Any, policy: str, options: dict[str, Any], share_LP: Any
) -> PlanProposal:
    """What the planner proposes for the live placement of the ranks."""
    info = daemon.words.info
    request = PlanRequest(
        policy=policy,
        options=options,
        state=b"",
        spec=SPEC,
        staging_rows=info.staging_rows,
        slot_bytes=info.slot_bytes,
        generation=daemon.generation,
        windows=PackedArray.pack(windows_TLE),
        placement=PackedArray.pack(daemon.rows_LP),
        versions=daemon.versions,
        min_gain=0.0,
        capacity=daemon.board.capacity,
        share=None if share_LP is None else PackedArray.pack(share_LP),
    )
    return make_plan(request)


def test_ranks_route_by_the_planners_tables(group: str, runtime_dir: Path, tmp_path: Path) -> None:
    """Moves with tables, several entries a layer; then tables without a move; then an even split again: committed by all
    ranks at the same steps (RankGroup.step), and the routers' shares have the PAR that was predicted.
    """
    random, share_LP, windows_TLE = np.random.default_rng(3), None, np.empty((0, 2, 12))
    with RankGroup(group, SPEC, hook_settings(runtime_dir, staging_rows=2)) as ranks:
        ranks.attach()
        daemon = Publisher(group, SPEC)
        stay = tmp_path / "live.npy"
        for policy, options in (
            ("default", {"dispatch": "weighted"}),
            ("static", {"dispatch": "weighted", "path": str(stay)}),
            ("static", {"path": str(stay)}),
        ):
            windows_TLE = random.pareto(1.0, (2, 2, 12)) * 100 + 1
            np.save(stay, daemon.rows_LP)
            proposal = proposal_for(daemon, windows_TLE, policy, options, share_LP)
            assert proposal.entries
            assert (proposal.num_moves > 0) == (policy == "default")
            assert any(entry.table for entry in proposal.entries) == ("dispatch" in options)
            before_L = windows_par(windows_TLE, daemon.rows_LP, SPEC.topology, share_LP)
            np.testing.assert_allclose(proposal.par_before_L, before_L)
            plan = Plan(incarnation=daemon.words.incarnation, generation=proposal.generation, entries=proposal.entries)
            daemon.post(plan)
            ranks.step_until(daemon.done)
            daemon.applied(plan)
            assert ranks.all("statistics_of", "num_drops") == [0] * 4
            assert ranks.rows() == daemon.rows_LP.tolist()
            ranks.check()
            share_LP = router_shares(ranks)
            after_L = windows_par(windows_TLE, daemon.rows_LP, SPEC.topology, share_LP)
            np.testing.assert_allclose(proposal.par_after_L, after_L)
        np.testing.assert_allclose(
            rank_load(windows_TLE, daemon.rows_LP, SPEC.topology, share_LP),
            rank_load(windows_TLE, daemon.rows_LP, SPEC.topology),
        )
        daemon.close()


def test_daemon_refits_without_moving_and_the_next_one_knows_the_tables(
    start_daemon: Start, start_ranks: Start, daemon_settings: Settings, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy keeps the initial placement, and the plan brings tables alone: the live and the realised PAR count with
    them. After kill -9 the next daemon reads them off the board: the same live PAR, and nothing to refit.
    """
    live = daemon_settings.directory / "live.json"
    live.write_text(str([*range(16), *range(4)]))
    monkeypatch.setenv("EPLB_ASYNC_DAEMON_POLICY", "static")
    monkeypatch.setenv(
        "EPLB_ASYNC_DAEMON_POLICY_OPTIONS", f'{{"dispatch": "weighted", "dispatch_strength": 1, "path": "{live}"}}'
    )
    first = start_daemon()
    start_ranks()
    with ControlClient(daemon_settings) as client:
        before = until(lambda: with_windows(client, group), "windows")
        decision = client.rebalance(group)
        assert decision.outcome is Outcome.FINISHED, decision.why
        assert (decision.num_entries, decision.num_moves, decision.bytes_moved) == (3, 0, 0)
        assert "3 of them by dispatch tables alone" in decision.why
        assert before.par_live is not None
        assert decision.par_predicted is not None
        assert decision.par_predicted < before.par_live - 0.05

        def realised() -> Decision | None:
            kept = client.history(group)[group][-1]
            return kept if kept.par_realised is not None else None

        assert until(realised, "realised PAR").par_realised == pytest.approx(decision.par_predicted, abs=0.01)
        first.kill()
        first.wait()
    start_daemon()
    with ControlClient(daemon_settings) as client:
        after = until(lambda: with_windows(client, group), "windows")
        assert after.par_live == pytest.approx(decision.par_predicted, abs=0.01)
        assert client.rebalance(group).outcome is Outcome.NOTHING_PAYS

"""The hammer in its short form, and that it would notice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.hammer_kinds import KINDS, BoardHammer, Hammer, LiveHammer, RingHammer, Tally, WordsHammer
from scripts.hammer_run import HammerFailed, Outcome, hammer
from tests.scripts import planted

ROOT = Path(__file__).resolve().parent.parent.parent
PUBLICATIONS = 160_000


def run_hammer(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command, as a user types it."""
    command = [sys.executable, str(ROOT / "scripts" / "hammer"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_nothing_is_torn(group: str) -> None:
    """All four kinds, written and read at full speed, with writers killed: no torn record, plan, word or placement."""
    done = run_hammer("--publications", str(PUBLICATIONS), "--kills", "2", "--json", "--group", group)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["torn"] == 0
    assert result["publications"] >= PUBLICATIONS
    assert [kind["kind"] for kind in result["kinds"]] == list(KINDS)
    for kind in result["kinds"]:
        assert kind["passed"]
        assert kind["kills"] == 2
        tally = kind["tally"]
        # most reads of the ring ask for less than all, so one read may give several records or none
        assert tally["torn"] == 0
        assert tally["distinct"] > 10


FAULTY: list[tuple[str, type[Hammer], dict[str, object]]] = [
    ("ring read without `reserved`", RingHammer, {"ring": planted.BlindRing}),
    ("ring with `reserved` too late", RingHammer, {"ring": planted.LateRing}),
    ("board read without a second look", BoardHammer, {"board": planted.BlindBoard}),
    ("board without odd sequence", BoardHammer, {"board": planted.QuietBoard}),
    ("words read without a second look", WordsHammer, {"words": planted.BlindWords}),
    ("words with the step first", WordsHammer, {"words": planted.HastyWords}),
    ("live read without sequence", LiveHammer, {"live": planted.BlindLive}),
    ("live without odd sequence", LiveHammer, {"live": planted.QuietLive}),
]


@pytest.mark.parametrize(("kind", "planted_class"), [case[1:] for case in FAULTY], ids=[case[0] for case in FAULTY])
def test_a_step_left_out_is_caught(kind: type[Hammer], planted_class: dict[str, object], group: str) -> None:
    """A protocol with one step left out is torn, and the tally shows an example.

    How soon is a matter of luck, so there are several tries; a right protocol would pass them all.
    """
    for seed in range(10):
        outcome = hammer(kind(group, **planted_class), 50_000, 0, deadline_s=60, seed=seed)
        if outcome.tally.torn:
            assert not outcome.passed
            assert outcome.tally.example
            return
    pytest.fail("nothing was torn")


class _Failing(RingHammer):
    """Its writer raises."""

    def write(self, target: int) -> None:
        """Ends at once."""
        raise SystemExit(3)


@pytest.mark.parametrize("kills", [0, 1])
def test_a_writer_that_ends_by_itself_is_an_error(group: str, kills: int) -> None:
    """A run whose writer failed is no success, and leaves neither process nor segment."""
    with pytest.raises(HammerFailed, match="exit code 3"):
        hammer(_Failing(group), 1000, kills, deadline_s=30)


def test_a_run_that_takes_too_long_is_an_error(group: str) -> None:
    """The deadline ends it, and leaves neither process nor segment."""
    with pytest.raises(HammerFailed, match=r"did not end in time|silent until the deadline"):
        hammer(RingHammer(group), 1 << 40, 0, deadline_s=0.5)


def test_tally() -> None:
    """Right ones in order are whole, equal ones not distinct; wrong ones and steps back are torn, the first is shown."""
    tally = Tally()
    for number, right in ((3, True), (3, True), (5, True), (4, True), (6, False)):
        tally.see(number, right, f"number {number}")
    assert (tally.whole, tally.distinct, tally.torn) == (3, 2, 2)
    assert tally.example == "number 4 after number 5"
    assert not Outcome("ring", 5, 0, 1.0, tally).passed


def test_seeing_nothing_is_not_passing() -> None:
    """A reader that saw next to nothing proves nothing."""
    assert not Outcome("ring", 5, 0, 1.0, Tally(whole=9, distinct=9)).passed
    assert Outcome("ring", 5, 0, 1.0, Tally(whole=10, distinct=10)).passed


def test_command_line(group: str) -> None:
    """--help lists the options; an unknown kind is an error that lists the known ones."""
    assert "--publications" in run_hammer("--help").stdout
    done = run_hammer("--kinds", "ring,boards", "--group", group)
    assert done.returncode == 2
    assert "boards" in done.stderr

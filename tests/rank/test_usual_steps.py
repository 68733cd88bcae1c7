"""What is usual: of the same phase, of about as many tokens, and not what is odd."""

import pytest

from eplb_async.core.load import Phase
from eplb_async.rank.usual_steps import UsualSteps


def usual_of(*steps: tuple[Phase, int, int]) -> UsualSteps:
    """These steps were made."""
    usual = UsualSteps()
    for phase, tokens, took_us in steps:
        usual.add[phase]((tokens, took_us))
    return usual


def test_the_example_of_the_module() -> None:
    """Median and scatter of the four steps that are alike."""
    steps = [(Phase.DECODE, 100, took_us) for took_us in (10_000, 10_200, 31_000, 9_900)]
    usual = usual_of(*steps, (Phase.DECODE, 900, 14_000))
    assert usual.of(Phase.DECODE, 110) == (10_100, 150)


@pytest.mark.parametrize("alike", [(Phase.DECODE, 0), (Phase.PREFILL, 8000)])
def test_too_few_are_not_usual(alike: tuple[Phase, int]) -> None:
    """Three steps tell nothing, and neither do many of another phase or size."""
    usual = usual_of(*[(*alike, 100)] * 3, *[(Phase.MIXED, 8000, 7)] * 9, *[(Phase.PREFILL, 1, 7)] * 9)
    assert usual.of(*alike) is None
    usual.add[alike[0]]((alike[1], 100))
    assert usual.of(*alike) == (100, 0)


def test_what_lasts_becomes_usual() -> None:
    """After eight steps of another length, and not after seven."""
    usual = usual_of(*[(Phase.DECODE, 8, 100)] * 30, *[(Phase.DECODE, 8, 200)] * 7)
    assert usual.of(Phase.DECODE, 8) == (100, 0)
    usual.add[Phase.DECODE]((8, 200))
    assert usual.of(Phase.DECODE, 8) == (200, 0)

"""What the balancer makes of a forward, without an engine."""

from enum import IntEnum, auto
from types import SimpleNamespace

import pytest
import torch

from eplb_async.core.load import Phase
from eplb_async.integrations.sglang_balancer import SglangBalancer, balancer_class


class Mode(IntEnum):
    """SGLang's names."""

    EXTEND = auto()
    DECODE = auto()
    MIXED = auto()
    IDLE = auto()


@pytest.mark.parametrize(
    ("mode", "extends", "phase"),
    [
        (Mode.EXTEND, True, Phase.PREFILL),
        (Mode.DECODE, False, Phase.DECODE),
        (Mode.MIXED, True, Phase.MIXED),
        (Mode.IDLE, True, Phase.PREFILL),
        (Mode.IDLE, False, Phase.DECODE),
    ],
)
def test_phases(mode: Mode, extends: bool, phase: Phase) -> None:
    """An idle rank is in the phase of the others: what it counted of their tokens is traffic."""
    balancer = object.__new__(SglangBalancer)
    balancer.note(SimpleNamespace(forward_mode=mode, is_extend_in_batch=extends, input_ids=torch.zeros(7)))
    assert (balancer._phase, balancer._num_tokens) == (phase, 7)


def test_nothing_joins_unless_all_hooks_are_in_place() -> None:
    """A class whose other hooks failed stays SGLang's own: it does not even look at the model."""

    class Theirs:
        pass

    ours = balancer_class(Theirs)()
    ours.eplb_async_join()
    assert ours.eplb_async is None
    assert type(ours).__name__ == "Theirs"

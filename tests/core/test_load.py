"""Loads are recognised by their shape and folded to logical experts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_async.core.errors import SpecError
from eplb_async.core.load import LoadKind, Phase, fold_slots, load_kind
from eplb_async.core.spec import MoESpec

SPEC = MoESpec(num_layers=3, num_experts=8, num_redundant=4, num_ranks=4)


def test_dummy_and_profile_steps_do_not_count() -> None:
    """Traffic is prefill, decode and mixed."""
    assert [phase.value for phase in Phase if phase.counts] == ["prefill", "decode", "mixed"]


@pytest.mark.parametrize(
    ("shape", "kind"), [((3, 8), LoadKind.LOGICAL), ((3, 12), LoadKind.GLOBAL_SLOTS), ((3, 3), LoadKind.LOCAL_SLOTS)]
)
def test_kind_from_shape(shape: tuple[int, int], kind: LoadKind) -> None:
    """[L, E], [L, P] and [L, S] are told apart, said or not."""
    assert load_kind(shape, SPEC) is kind
    assert load_kind(shape, SPEC, kind) is kind


@pytest.mark.parametrize("shape", [(3, 7), (2, 8), (8,), (3, 8, 1), (8, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    """A shape with no reading is an error that lists the three that there are."""
    with pytest.raises(SpecError, match=r"logical \[3, 8\], global_slots \[3, 12\], local_slots \[3, 3\]"):
        load_kind(shape, SPEC)


def test_a_kind_that_does_not_fit_is_refused() -> None:
    """What the caller says must be true."""
    with pytest.raises(SpecError, match="as global_slots was given"):
        load_kind((3, 8), SPEC, LoadKind.GLOBAL_SLOTS)


def test_ambiguous_shape_takes_what_the_caller_says() -> None:
    """Without redundancy [L, E] and [L, P] look alike; unsaid means logical."""
    spec = MoESpec(num_layers=3, num_experts=8, num_ranks=4)
    assert load_kind((3, 8), spec) is LoadKind.LOGICAL
    assert load_kind((3, 8), spec, LoadKind.GLOBAL_SLOTS) is LoadKind.GLOBAL_SLOTS


def test_fold_example() -> None:
    """The docstring's example: what stands on the empty slot belongs to nobody."""
    counts_LP = np.array([[5, 1, 2, 9]], dtype=np.int64)
    assert fold_slots(counts_LP, np.array([[0, 1, 0, -1]], dtype=np.int32), 2).tolist() == [[7, 1]]


@given(st.data())
def test_fold_equals_a_plain_loop(data: st.DataObject) -> None:
    """Any counts on any slots of any layers, large counts included."""
    layers, experts, slots = (data.draw(st.integers(1, most)) for most in (3, 4, 7))
    cells = st.tuples(st.integers(-1, experts - 1), st.integers(0, 1 << 40))
    drawn = data.draw(st.lists(cells, min_size=layers * slots, max_size=layers * slots))
    slot_to_expert_LP = np.array([cell[0] for cell in drawn], dtype=np.int32).reshape(layers, slots)
    counts_LP = np.array([cell[1] for cell in drawn], dtype=np.int64).reshape(layers, slots)
    expected = [[0] * experts for _ in range(layers)]
    for layer in range(layers):
        for slot in range(slots):
            if slot_to_expert_LP[layer, slot] >= 0:
                expected[layer][slot_to_expert_LP[layer, slot]] += int(counts_LP[layer, slot])
    assert fold_slots(counts_LP, slot_to_expert_LP, experts).tolist() == expected

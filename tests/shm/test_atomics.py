"""Each compiled operation, and the word operations against Python twins."""

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from eplb_async.shm.atomics import WORD_RECORD, Atomics, atomics

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
INVALID = -(1 << 63)


def words(count: int) -> tuple[NDArray[np.int64], int]:
    """int64 [count] and its address."""
    array = np.zeros(count, dtype=np.int64)
    return array, int(array.ctypes.data)


@given(value=INT64, other=INT64)
def test_loads_and_stores(value: int, other: int) -> None:
    """Each store writes its own word, the whole of it and no other; each load reads it."""
    array, address = words(3)
    stores = atomics().store_release, atomics().store_then_fence
    loads = atomics().load_acquire, atomics().fence_then_load
    for store in stores:
        array[:] = other
        store(address + 8, value)
        assert array.tolist() == [other, value, other]
        for load in loads:
            assert load(address + 8) == value
            assert load(address) == other


def test_compiled_once() -> None:
    """All users of a process share the functions."""
    assert atomics() is atomics()
    assert isinstance(atomics(), Atomics)


@given(fields=st.tuples(*[INT64] * 5))
def test_publish_word_layout(fields: tuple[int, int, int, int, int]) -> None:
    """Step, staged, committed, error and digest at bytes 0, 8, 16, 24 and 32; the rest of the line stays."""
    array, address = words(10)
    array[:] = 77
    atomics().publish_word(address + 8, *fields)
    assert array.tolist() == [77, *fields, 77, 77, 77, 77]


def reduced(records: list[list[int]], step: int) -> tuple[int, list[int]]:
    """What reduce_words returns and writes."""
    for rank, record in enumerate(records):
        if record[0] != step:
            return rank, [record[0]]
    columns = list(zip(*records, strict=True))
    return -1, [min(columns[1]), min(columns[2]), max(columns[3]), min(columns[4]), max(columns[4])]


RECORDS = st.lists(
    st.tuples(st.sampled_from([3, 3, 3, 3, 4, INVALID]), INT64, INT64, INT64, INT64), min_size=1, max_size=5
)


@given(records=RECORDS, stride=st.integers(1, 3), step=st.sampled_from([3, 4]))
def test_reduce_words_equals_its_twin(records: list[tuple[int, ...]], stride: int, step: int) -> None:
    """min, min, max, min, max over all ranks if all are of the step, else the first that is not and its step."""
    lines = WORD_RECORD // 8
    array, address = words(len(records) * stride * lines)
    for rank, record in enumerate(records):
        array[rank * stride * lines :][:5] = record
    out, out_address = words(6)
    out[:] = 55
    code = atomics().reduce_words(address, len(records), stride * WORD_RECORD, step, out_address)
    expected, results = reduced([list(record) for record in records], step)
    assert code == expected
    assert out.tolist() == results + [55] * (6 - len(results))


@given(records=RECORDS, history=st.integers(1, 5), step=st.integers(-9, 9))
def test_reduce_step_equals_its_twin(records: list[tuple[int, ...]], history: int, step: int) -> None:
    """The same with its arguments in a block; steps before 0 have their places at the end of the ring."""
    lines = WORD_RECORD // 8
    records = [(step if record[0] == 3 else record[0], *record[1:]) for record in records]
    array, address = words(len(records) * history * lines)
    for rank, record in enumerate(records):
        array[(rank * history + step % history) * lines :][:5] = record
    block, block_address = words(18)
    block[:] = 55
    block[2], block[8:12] = history, (address, len(records), history * WORD_RECORD, step)
    before = block.tolist()
    expected, results = reduced([list(record) for record in records], step)
    assert atomics().reduce_step(block_address) == expected
    assert block.tolist() == before[:12] + results + before[12 + len(results) :]


@given(counters=st.tuples(INT64, INT64, INT64, INT64), history=st.integers(1, 5), step=st.integers(0, 20))
def test_publish_step_writes_word_and_newest(counters: tuple[int, int, int, int], history: int, step: int) -> None:
    """The word goes to record step mod history of the own records, the step to its own place, nothing elsewhere."""
    lines = WORD_RECORD // 8
    array, address = words(history * lines + 1)
    array[:] = 77
    block, block_address = words(17)
    block[:3] = (address, address + 8 * history * lines, history)
    block[3:8] = (step, *counters)
    atomics().publish_step(block_address)
    expected = [77] * (history * lines) + [step]
    expected[step % history * lines : step % history * lines + 5] = [step, *counters]
    assert array.tolist() == expected


@pytest.mark.parametrize("arguments", [(), (1.5,), ("x",), (None,)])
def test_wrong_arguments_do_not_reach_memory(arguments: tuple[object, ...]) -> None:
    """Anything but an integer address is a TypeError from Python."""
    with pytest.raises((TypeError, ctypes.ArgumentError), match="argument"):
        atomics().load_acquire(*arguments)  # type: ignore[arg-type]

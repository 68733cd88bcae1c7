"""What policies share about windows: the examples of the docstrings."""

import numpy as np
import pytest

from eplb_async.policies.windows import expected_peak, merged


def test_expected_peak() -> None:
    """Nothing for one rank, and the examples."""
    assert [expected_peak(ranks) for ranks in (1, 8, 32)] == pytest.approx([0.0, 1.43, 2.07], abs=0.005)


def test_merged() -> None:
    """Five windows in two are 2 + 3, all tokens stay, and few enough windows are not copied."""
    windows_TLE = np.arange(5.0).reshape(5, 1, 1)
    assert merged(windows_TLE, 2).ravel().tolist() == [1.0, 9.0]
    assert merged(windows_TLE, 5) is windows_TLE

"""The checks that come before a measurement find what they look for."""

import pytest
import torch

from benchmarks.engine import kernels, selfcheck
from benchmarks.engine.__main__ import TINY
from benchmarks.engine.config import EngineConfig

__all__: list[str] = []

CONFIG = EngineConfig(**TINY, num_ranks=1, tokens_per_rank=32)  # type: ignore[arg-type]


def test_all_checks_pass_on_the_cpu() -> None:
    """Those that a machine without a GPU can make."""
    names = []
    for name, check in selfcheck.checks(CONFIG, torch.device("cpu")):
        check()
        names.append(name)
    assert len(names) == 2


def test_products_that_depend_on_the_place_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product whose results depend on the rows around is what must not be."""
    product = kernels.grouped_product

    def drifting(*arguments: object) -> torch.Tensor:
        result = product(*arguments)  # type: ignore[arg-type]
        return result + torch.arange(len(result))[:, None]

    monkeypatch.setattr(kernels, "grouped_product", drifting)
    check = dict(selfcheck.checks(CONFIG, torch.device("cpu")))
    with pytest.raises(AssertionError, match="bits differ"):
        check["products (grouped): a row has the same bits in any place and company"]()

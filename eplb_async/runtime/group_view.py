"""What decisions know of a group: facts of an incarnation, the live placement, and what came of a plan."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.spec import MoESpec
from eplb_async.runtime.live_dispatch import LiveDispatch

__all__ = ["GroupFacts", "LiveView", "PlanOutcome"]


@dataclass(frozen=True, kw_only=True)
class GroupFacts:
    """What does not change in an incarnation: see GroupInfo; `capacity`: bytes of the board."""

    group: str
    incarnation: int
    spec: MoESpec
    staging_rows: int
    slot_bytes: list[int]
    capacity: int


class LiveView(Protocol):
    """The live placement. Another array is another placement."""

    @property
    def rows_LP(self) -> NDArray[np.int32]:
        """Rows, [L, P]."""

    @property
    def version_L(self) -> NDArray[np.int64]:
        """Packed versions."""

    @property
    def dispatch(self) -> LiveDispatch:
        """How slots share tokens."""


class PlanOutcome(Protocol):
    """What came of a plan; see publisher.PlanEnd."""

    @property
    def finished(self) -> bool:
        """All entries were committed."""

    @property
    def num_committed(self) -> int:
        """Entries that were."""

    @property
    def publish_to_first_stage_s(self) -> float | None:
        """Until some rank had staged an entry."""

    @property
    def publish_to_end_s(self) -> float:
        """Until the last rank was done."""

    @property
    def why(self) -> str:
        """Why it was dropped, "" if it was not."""

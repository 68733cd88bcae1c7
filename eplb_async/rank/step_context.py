"""The context around one forward, for engines that can wrap it."""

from collections.abc import Callable
from types import TracebackType

from eplb_async.core.load import Phase

__all__ = ["StepContext"]


class StepContext:
    """One step; reused for every step of a hook.

    Attributes:
        phase, num_tokens, last_step_us: of the forward that is entered next; see RankHook.before_forward.
    """

    def __init__(
        self,
        before_forward: Callable[[str | Phase, int, float | None], None],
        after_forward: Callable[[], None],
        discard: Callable[[], None],
    ) -> None:
        """`discard` ends a step whose forward has raised; all three are the hook's."""
        self._before_forward, self._after_forward, self._discard = before_forward, after_forward, discard
        self.phase: str | Phase = Phase.MIXED
        self.num_tokens = 0
        self.last_step_us: float | None = None

    def __enter__(self) -> None:
        self._before_forward(self.phase, self.num_tokens, self.last_step_us)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._after_forward()
        else:
            self._discard()

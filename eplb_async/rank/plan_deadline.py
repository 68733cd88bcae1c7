"""When a rank gives the plan that it holds up by itself: a plan that another node never saw would stay for ever (I6)."""

import time

from eplb_async.core.config import HookSettings

__all__ = ["PlanDeadline"]


class PlanDeadline:
    """The deadlines of the plan that is held. Ranks need not agree on them."""

    def __init__(self, settings: HookSettings) -> None:
        self._settings = settings
        self._step, self._since_s = 0, 0.0

    def start(self, step: int) -> None:
        """A plan was adopted at this step, now."""
        self._step, self._since_s = step, time.monotonic()

    def passed(self, step: int) -> str:
        """Why the plan is to be given up at this step; "" while it is not."""
        settings = self._settings
        if step - self._step > settings.plan_deadline_steps:
            return f"not done after {settings.plan_deadline_steps} steps"
        if time.monotonic() - self._since_s > settings.plan_deadline_s:
            return f"not done after {settings.plan_deadline_s:g} s"
        return ""

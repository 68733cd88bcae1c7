"""Load by phase: apart, for people who ask whether prefill and decode want the same placement, and mixed into the windows that placement serves.

    records of a window --> prefill, decode, mixed, each summed --(weights)--> one window
                                          `--> the newest windows of each

A token of each phase counts by its weight, 0 to 1. What a step is mixed of cannot be told, so its tokens count as those of the phase that counts more.
Weights of at most 1 keep the noise model honest: it takes counts for Poisson ones, whose variance is their mean. Of w x counts the
variance is w x w x mean, never more than the w x mean that the model sees; weights above 1 would make noise look smaller than it is.

Windows stay whole numbers. What is left of a part is carried to the next window, so that nothing is lost where counts are small:

    weight 0.3, 5 tokens in each window: 1.5, 3.0, 4.5 in all; windows of 1, 2 and 1
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from eplb_async.core.daemon_settings import DaemonSettings
from eplb_async.core.load import Phase
from eplb_async.core.spec import MoESpec
from eplb_async.runtime.group_view import LiveView
from eplb_async.runtime.live_par import LivePar, mean_with_load
from eplb_async.runtime.messages import PhaseStatus
from eplb_async.runtime.windows import LoadWindows
from eplb_async.shm.ring import PHASES, Batch

__all__ = ["PhaseLoads", "weights_of"]

MOST_TOKENS = 1 << 40
"""Of a step on a rank; what a damaged record says beyond that is not added up."""


def weights_of(settings: DaemonSettings) -> dict[Phase, float]:
    """What a token of each phase counts. Serving prefill alone: 1, 0, and 1 for a mixed step."""
    prefill = settings.prefill_weight if settings.serve != "decode" else 0.0
    decode = settings.decode_weight if settings.serve != "prefill" else 0.0
    return {Phase.PREFILL: prefill, Phase.DECODE: decode, Phase.MIXED: max(prefill, decode)}


class PhaseLoads:
    """The load of a group by phase. Used by one task only.

    Attributes:
        weights: of each phase with traffic, 0 to 1.
    """

    def __init__(self, spec: MoESpec, steps_and_windows: tuple[int, int], weights: Mapping[Phase, float]) -> None:
        """`steps_and_windows`: steps per window, and windows kept of each phase."""
        self._shape_LE = (spec.num_layers, spec.num_experts)
        self.weights = dict(weights)
        self._windows = {phase: LoadWindows(self._shape_LE, *steps_and_windows) for phase in weights}
        self._pars = {phase: LivePar(spec.topology, spec.num_layers) for phase in weights}
        self._open: dict[int, dict[Phase, NDArray[np.int64]]] = {}
        self._carried_LE = np.zeros(self._shape_LE)
        self._steps, self._tokens = (np.zeros(len(PHASES), dtype=np.int64) for _ in range(2))

    @property
    def open(self) -> list[int]:
        """Windows that have load and are not closed, oldest first."""
        return sorted(self._open)

    @property
    def steps(self) -> dict[str, int]:
        """Records of each phase that was seen, of all rings together, whether they count or not."""
        return {phase.value: int(n) for phase, n in zip(PHASES, self._steps, strict=True) if n}

    def seen(self, batch: Batch) -> None:
        """Count the records of a batch, and their tokens."""
        tokens = np.clip(batch.tokens, 0, MOST_TOKENS)
        self._steps += np.bincount(batch.phase, minlength=len(PHASES))
        # float64 sums of so few are exact
        self._tokens += np.bincount(batch.phase, weights=tokens, minlength=len(PHASES)).astype(np.int64)

    def add(self, window: int, phase: Phase, load_LE: NDArray[np.signedinteger]) -> None:
        """More load of a window."""
        loads = self._open.setdefault(window, {})
        if phase not in loads:
            loads[phase] = np.zeros(self._shape_LE, dtype=np.int64)
        loads[phase] += load_LE

    def drop(self, window: int) -> None:
        """A window that was not seen from its beginning."""
        del self._open[window]

    def close(self, window: int) -> NDArray[np.int64]:
        """A window is complete: its load as placement serves it."""
        loads = self._open.pop(window)
        for phase, load_LE in loads.items():
            self._windows[phase].add(window, load_LE)
        if len(loads) == 1 and self.weights[phase := next(iter(loads))] == 1:
            return loads[phase]
        whole_LE, parts_LE = np.zeros(self._shape_LE, dtype=np.int64), np.zeros(self._shape_LE)
        for phase, load_LE in loads.items():
            if (weight := self.weights[phase]) == 1:
                whole_LE += load_LE
            elif weight:
                parts_LE += weight * load_LE
        if parts_LE.any():
            parts_LE += self._carried_LE
            counted_LE = np.floor(parts_LE)
            self._carried_LE = parts_LE - counted_LE
            whole_LE += counted_LE.astype(np.int64)
        return whole_LE

    def begin_anew(self) -> None:
        """Windows begin with the next records; those that are complete stay what they were."""
        self._open.clear()
        self._carried_LE = np.zeros(self._shape_LE)

    def resize(self, window_steps: int, num_windows: int) -> None:
        """Other windows from now on."""
        for windows in self._windows.values():
            windows.resize(window_steps, num_windows)

    def status(self, live: LiveView, newest: int) -> tuple[PhaseStatus, ...]:
        """Each phase that was seen, with its PAR under the live placement in those of the windows kept, up to `newest`, that have such steps."""
        found = []
        for phase, windows in self._windows.items():
            number = PHASES.index(phase)
            if not self._steps[number]:
                continue
            kept = [window for window in windows.kept if window[0] > newest - (windows.kept.maxlen or 0)]
            par_L = self._pars[phase].of(kept, live.rows_LP, live.dispatch.share_LP)
            found.append(
                PhaseStatus(
                    phase=phase.value,
                    weight=self.weights[phase],
                    steps=int(self._steps[number]),
                    tokens=int(self._tokens[number]),
                    windows=len(kept),
                    par_live=mean_with_load(par_L) if kept else None,
                )
            )
        return tuple(found)

"""Launching a Triton kernel from a hot path: compiled when the hook attaches, then without triton's work of each call.

Triton looks at every argument of every call to find the right specialisation, some 15 us. Kernels here take addresses and sizes as
64-bit integers that are not specialised on, so one compiled kernel fits all calls, and a launch costs a third of that.
"""

from typing import Any

__all__ = ["Launcher"]


class Launcher:
    """One kernel on the current device."""

    def __init__(self, kernel: Any, num_arguments: int, constants: tuple[int, ...], num_warps: int = 8) -> None:
        """Compile it.

        Args:
            kernel: a function of triton.jit whose parameters are this many of type tl.int64, then constexpr ones.
            num_arguments: without the constants.
            constants: of its constexpr parameters.
            num_warps: of a program.
        """
        self._constants = constants
        self._compiled = kernel.warmup(*[0] * num_arguments, *constants, grid=(1, 1, 1), num_warps=num_warps)

    def __call__(self, grid: tuple[int, int], stream: int, *arguments: int) -> None:
        """Launch on a stream, by its handle."""
        self._compiled[(*grid, 1)](*arguments, *self._constants, stream=stream)

"""Launching a Triton kernel from a hot path: compiled when the hook attaches, then by one call of the driver.

Triton looks at every argument of every call to find the right specialisation, some 15 us. Kernels here take addresses and sizes as
64-bit integers that are not specialised on, so one compiled kernel fits all calls: a launch writes them into memory that the driver
reads them from.
"""

import ctypes
from typing import Any

from eplb_async.rank.cuda.driver import CudaDriver

__all__ = ["Launcher"]

SCRATCH_POINTERS = 2
"""Triton's kernels end with pointers to scratch memory, none to two by version; these kernels use none, so all are null."""
WARP = 32


class Launcher:
    """One kernel on the current device. Calls belong to one thread."""

    def __init__(
        self, driver: CudaDriver, kernel: Any, num_arguments: int, constants: tuple[int, ...], num_warps: int = 8
    ) -> None:
        """Compile and load it.

        Args:
            driver: of this process.
            kernel: a function of triton.jit whose parameters are this many of type tl.int64, then constexpr ones.
            num_arguments: without the constants.
            constants: of its constexpr parameters.
            num_warps: of a program.
        """
        self._compiled = kernel.warmup(*[0] * num_arguments, *constants, grid=(1, 1, 1), num_warps=num_warps)
        _ = self._compiled.run  # loads it
        self._driver = driver
        self._function = driver.function(self._compiled.function)
        self._threads, self._shared = WARP * num_warps, int(self._compiled.metadata.shared)
        total = num_arguments + SCRATCH_POINTERS
        self._values = (ctypes.c_int64 * total)()
        first = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * total)(*[first + 8 * index for index in range(total)])
        self._address = ctypes.addressof(self._pointers)

    def set(self, index: int, value: int) -> None:
        """An argument of all launches from now on."""
        self._values[index] = value

    def __call__(self, grid: tuple[int, int], stream: int) -> None:
        """Launch on a stream, by its handle; the driver has read the arguments when this returns."""
        self._driver.launch(self._function, grid, self._threads, self._shared, stream, self._address)

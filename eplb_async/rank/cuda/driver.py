"""The calls of the CUDA driver that torch does not offer, through cuda-bindings, with addresses and streams as integers.

All are made in the primary context of the calling thread's device, which torch has made current there.
"""

from collections.abc import Sequence
from typing import Any

from eplb_async.core.errors import ConfigError, DeviceCallFailed

__all__ = ["CudaDriver", "load_driver"]

LEGACY_STREAM = 0
"""The handle of torch's default stream; batched copies are not allowed on it."""
_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


def load_driver() -> "CudaDriver":
    """The driver of this process.

    Raises:
        ConfigError: cuda-bindings is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ConfigError(
            "tensors on CUDA", f"need the package cuda-bindings: pip install 'eplb-async[cuda]' ({error})"
        ) from error
    return CudaDriver(driver)


class CudaDriver:
    """See the module. A failed call raises DeviceCallFailed with the driver's own name of the error."""

    def __init__(self, driver: Any) -> None:
        """`driver` is cuda.bindings.driver. A driver older than CUDA 12.8 has no batched copies: one call each then."""
        self._driver = driver
        self._success = driver.CUresult.CUDA_SUCCESS
        self._batched = hasattr(driver, "cuMemcpyBatchAsync") and self._version() >= 12080
        if self._batched:
            attributes = driver.CUmemcpyAttributes()
            attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
            attributes.flags = int(driver.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE)
            self._beside = [attributes]

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Copy between any two of device, peer and registered host memory."""
        self._check("cuMemcpyAsync", self._driver.cuMemcpyAsync(target, source, num_bytes, stream))

    def copy_beside(self, copies: Sequence[tuple[int, int, int]], stream: int) -> None:
        """Copy (target, source, bytes) triples, in any order, with copy engines, so that kernels of other streams go on."""
        if not self._batched or len(copies) == 1 or stream == LEGACY_STREAM:
            for target, source, num_bytes in copies:
                self.copy(target, source, num_bytes, stream)
            return
        pointer = self._driver.CUdeviceptr
        targets, sources = [pointer(copy[0]) for copy in copies], [pointer(copy[1]) for copy in copies]
        sizes, number = [copy[2] for copy in copies], len(copies)
        result = self._driver.cuMemcpyBatchAsync(targets, sources, sizes, number, self._beside, [0], 1, stream)
        self._check("cuMemcpyBatchAsync", result)

    def zero(self, address: int, num_words: int, stream: int) -> None:
        """Set 32-bit words of device memory to zero."""
        self._check("cuMemsetD32Async", self._driver.cuMemsetD32Async(address, 0, num_words, stream))

    def write_value(self, address: int, value: int, stream: int) -> None:
        """Write a 64-bit word once all earlier work of the stream is done and its writes are visible to everybody.

        Args:
            address: in device or registered host memory, a multiple of 8.
            value: not negative.
            stream: handle.
        """
        # without CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER: a system-wide fence comes before the write
        self._check("cuStreamWriteValue64", self._driver.cuStreamWriteValue64(stream, address, value, 0))

    def function(self, handle: int) -> Any:
        """A loaded kernel, for `launch`."""
        return self._driver.CUfunction(handle)

    def launch(  # size: the least that a launch needs
        self, function: Any, grid: tuple[int, int], threads: int, shared: int, stream: int, parameters: int
    ) -> None:
        """Launch a kernel; `parameters` is the address of an array of addresses of its arguments."""
        result = self._driver.cuLaunchKernel(function, *grid, 1, threads, 1, 1, shared, stream, parameters, 0)
        if result[0] != self._success:
            self._check("cuLaunchKernel", result)

    def register(self, address: int, num_bytes: int) -> None:
        """Make host memory, whole pages, reachable for the device under its own address."""
        self._check("cuMemHostRegister", self._driver.cuMemHostRegister(address, num_bytes, 0))
        (seen,) = self._check("cuMemHostGetDevicePointer", self._driver.cuMemHostGetDevicePointer(address, 0))
        if int(seen) != address:
            self.unregister(address)
            raise DeviceCallFailed(
                "cuMemHostRegister", "the device sees the memory under another address; unified addressing is needed"
            )

    def unregister(self, address: int) -> None:
        """Undo `register`; nothing on the device may still use the memory."""
        self._check("cuMemHostUnregister", self._driver.cuMemHostUnregister(address))

    def allocation(self, address: int) -> tuple[int, int]:
        """(first address, bytes) of the device allocation that an address is in."""
        base, size = self._check("cuMemGetAddressRange", self._driver.cuMemGetAddressRange(address))
        return int(base), int(size)

    def ipc_handle(self, base: int) -> bytes:
        """What another process opens to reach an allocation."""
        (handle,) = self._check("cuIpcGetMemHandle", self._driver.cuIpcGetMemHandle(base))
        return bytes(handle.reserved)

    def open_ipc(self, handle: bytes) -> int:
        """The address at which this process sees another one's allocation, on this or a peer device."""
        opened = self._driver.CUipcMemHandle()
        opened.reserved = handle
        (base,) = self._check("cuIpcOpenMemHandle", self._driver.cuIpcOpenMemHandle(opened, _PEER_ACCESS))
        return int(base)

    def close_ipc(self, base: int) -> None:
        """Undo `open_ipc`."""
        self._check("cuIpcCloseMemHandle", self._driver.cuIpcCloseMemHandle(base))

    def _version(self) -> int:
        (version,) = self._check("cuDriverGetVersion", self._driver.cuDriverGetVersion())
        return int(version)

    def _check(self, call: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
        if result[0] != self._success:
            name = self._driver.cuGetErrorName(result[0])[1]
            raise DeviceCallFailed(call, name.decode() if isinstance(name, bytes) else str(result[0]))
        return result[1:]

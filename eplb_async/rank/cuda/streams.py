"""Streams and events of a device, as the hook uses them."""

from collections.abc import Callable

import torch

from eplb_async.rank.streams import Completion

__all__ = ["ComputeStream", "EventCompletion"]


class EventCompletion(Completion[None]):
    """Ends when the device has passed an event that was recorded on a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()
        self._event.record(stream)
        super().__init__()

    @property
    def done(self) -> bool:
        """Asks the device; never waits."""
        return bool(self._event.query())

    @done.setter
    def done(self, value: bool) -> None:
        pass


class ComputeStream:
    """The stream on which the engine runs its forwards: whichever is current when the hook is called.

    An engine may change it between two steps; what the hook issued on the old one then comes first on the new one too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last = torch.cuda.current_stream(device)
        self._handle = self._last.cuda_stream
        # torch's own function makes an object at each call; compilers that generate code for torch use this one
        self._current_handle: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    def handle(self) -> int:
        """Handle of the stream to issue on now."""
        current = self._current_handle
        if current is None or current(self._last.device_index) != self._handle:
            self._change()
        return self._handle

    def current(self) -> torch.cuda.Stream:
        """The same as an object."""
        self.handle()
        return self._last

    def _change(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        if stream != self._last:
            stream.wait_stream(self._last)
            self._last, self._handle = stream, stream.cuda_stream

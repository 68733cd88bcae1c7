"""Work beside the forward: a stream runs jobs one after the other and says when each is done.

On the CPU a stream is a thread: copies and checksums release the interpreter's lock while they run. A job's exception is
kept in its completion, where whoever waits for the job finds it; the thread goes on with the next job.
"""

import queue
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

__all__ = ["Completion", "HostStream", "Stream"]

Result = TypeVar("Result")
CLOSE_DEADLINE_S = 30.0


class Completion(Generic[Result]):
    """The end of one job. `done` turns true last, so `result` and `error` are set when it is."""

    def __init__(self) -> None:
        self.done = False
        self.result: Result | None = None
        self.error: Exception | None = None


class Stream(Protocol):
    """Runs jobs in order, beside the caller."""

    def submit(self, job: Callable[[], Result]) -> Completion[Result]:
        """Queue a job; returns at once."""
        ...

    def close(self) -> None:
        """Wait for the queued jobs and end the stream."""
        ...


class HostStream:
    """A stream on a thread of its own. `submit` may be called from one thread only; `close` is idempotent."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], object], Completion[object]] | None] = queue.SimpleQueue()
        # daemonic: a rank that exits without detach must not hang
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Result]) -> Completion[Result]:
        """See Stream."""
        completion: Completion[Result] = Completion()
        self._jobs.put((job, completion))  # type: ignore[arg-type]
        return completion

    def close(self) -> None:
        """See Stream.

        Raises:
            TimeoutError: a job does not end.
        """
        self._jobs.put(None)
        self._thread.join(CLOSE_DEADLINE_S)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._thread.name}: a job runs for more than {CLOSE_DEADLINE_S:g} s")

    def leave(self) -> None:
        """End once the queued jobs have; nobody waits for that."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, completion = item
            try:
                completion.result = job()
            except Exception as error:  # noqa: BLE001 (handed to whoever polls the completion)
                completion.error = error
            completion.done = True

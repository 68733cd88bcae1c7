"""Streams run jobs in order beside the caller, and keep their errors for whoever asks."""

import functools
import threading

import pytest

from eplb_async.rank import streams
from eplb_async.rank.streams import HostStream


def test_jobs_run_in_order_on_another_thread() -> None:
    """A job begins when the one before has ended."""
    stream = HostStream("jobs")
    seen: list[tuple[int, str]] = []

    def job(number: int) -> int:
        seen.append((number, threading.current_thread().name))
        return number

    jobs = [stream.submit(functools.partial(job, number)) for number in range(50)]
    stream.close()
    assert seen == [(number, "jobs") for number in range(50)]
    assert [job.result for job in jobs] == list(range(50))


def test_a_job_is_not_done_before_it_ended() -> None:
    """`submit` returns at once; `done` turns true when the result is there."""
    stream, gate = HostStream("jobs"), threading.Event()
    job = stream.submit(lambda: gate.wait(20.0))
    done = [job.done]
    gate.set()
    stream.close()
    assert [*done, job.done] == [False, True]
    assert job.result is True


def test_an_error_is_kept_and_the_next_job_runs() -> None:
    """The thread outlives a job that raises."""
    stream = HostStream("jobs")
    bad, good = stream.submit(lambda: 1 / 0), stream.submit(lambda: 5)
    stream.close()
    assert bad.done
    assert isinstance(bad.error, ZeroDivisionError)
    assert (good.result, good.error) == (5, None)


def test_close_may_be_called_twice_and_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that hangs is reported after the deadline."""
    stream, gate = HostStream("hangs"), threading.Event()
    stream.submit(lambda: gate.wait(20.0))
    with monkeypatch.context() as patch:
        patch.setattr(streams, "CLOSE_DEADLINE_S", 0.05)
        with pytest.raises(TimeoutError, match="hangs: a job runs"):
            stream.close()
    gate.set()
    stream.close()
    stream.close()

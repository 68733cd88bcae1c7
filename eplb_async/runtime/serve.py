"""`eplb-async serve`: logging, the event loop, and the exit status around the daemon."""

import logging
from collections.abc import Callable

import uvloop

from eplb_async.core.config import Settings
from eplb_async.core.errors import EplbError
from eplb_async.runtime.daemon import serve

__all__ = ["run_daemon"]


def run_daemon(read_settings: Callable[[], Settings], ready_fd: int | None) -> None:
    """Serve until told to stop.

    Args:
        read_settings: reads the settings, now and whenever they are to be read again.
        ready_fd: see `serve`.

    Raises:
        EplbError: it cannot start, or a part of it failed for a reason that the user can change.
        ExceptionGroup: our bug; everything else goes on without the daemon.
    """
    settings = read_settings()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("eplb_async").setLevel(settings.daemon.log_level)
    try:
        uvloop.run(serve(settings, ready_fd=ready_fd, reload=read_settings))
    except* EplbError as group:
        # what went wrong, not which task it was in
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None

"""Tell systemd (or whoever set NOTIFY_SOCKET) how the daemon stands: the sd_notify protocol, without its library."""

import logging
import socket

from eplb_async.core.config import notify_socket

__all__ = ["notify"]

logger = logging.getLogger(__name__)


def notify(state: str) -> bool:
    """Send a state such as "READY=1"; true if somebody asked to be told and the datagram was sent.

    An address that begins with '@' is in the abstract namespace. Never blocks and never raises: a service that cannot
    tell systemd is still a service.
    """
    address = notify_socket()
    if address is None:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
            sender.connect("\0" + address[1:] if address.startswith("@") else address)
            sender.sendall(state.encode())
    except OSError as error:
        logger.warning("cannot tell %s %r: %s", address, state, error)
        return False
    return True

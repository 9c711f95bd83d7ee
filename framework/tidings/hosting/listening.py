"""A listening socket, and why there is none where there is none."""

from __future__ import annotations

import errno
import os
import socket

from tidings.errors import ConfigurationError

__all__ = ["listening_at"]


def listening_at(host: str, port: int, what: str) -> socket.socket:
    """A listening socket for `what`, so that an address that cannot be had is known before anything starts.

    Raises `ConfigurationError`; its cause says whether the address is in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Not socket.create_server: it does not say TCP, and then asyncio delays small answers by 40 ms (TCP_NODELAY).
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(2048)
        except BaseException:
            listening.close()
            raise
        return listening
    except (OSError, UnicodeError) as error:
        remedy = (
            f"give another port, or find who has it (ss -ltnp 'sport = :{port}')"
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            else "is it an address of this machine, and may this user listen there?"
        )
        raise ConfigurationError(f"{what} cannot listen at {host}:{port}: {_said(error)}; {remedy}") from error


def _said(error: OSError | UnicodeError) -> str:
    if isinstance(error, OSError) and error.errno and error.errno > 0:  # below 0: of getaddrinfo
        return os.strerror(error.errno)
    return str(error)

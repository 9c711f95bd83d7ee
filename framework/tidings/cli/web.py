"""An ASGI application served by uvicorn, with the signals, exit codes and errors of `tidings run`."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from tidings.cli.exits import UNAVAILABLE, USAGE, Refused
from tidings.signals import StopSignals

__all__ = ["bound", "serve_application"]

GRACE_SECONDS: Final = 1
"""For requests under way; after them the application's lifespan drains its services."""


def bound(host: str, port: int) -> socket.socket:
    """A listening address of our own, so that one in use is known before anything starts. Raises `Refused`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise Refused(USAGE, f"--host {host!r} is no address of this machine: {error}") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            text = f"port {port} of {host} is in use: end what uses it (ss -ltnp 'sport = :{port}'), or say --port"
            raise Refused(UNAVAILABLE, text) from error
        raise Refused(UNAVAILABLE, f"cannot listen on port {port} of {host}: {error.strerror}; say --port") from error
    return listening


async def serve_application(application: Any, listening: socket.socket) -> None:
    """Until SIGINT or SIGTERM, then drain, as `tidings.runtime.serve` does.

    Raises what the application's lifespan raised, at its start or later.
    """
    try:
        import uvicorn
    except ImportError as error:
        text = f"a web application needs the package {error.name!r}: install it with  pip install 'tidings[fastapi]'"
        raise Refused(USAGE, text) from error

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # they are ours: uvicorn would end the process by the signal once more, after draining

    failures: list[Exception] = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await application(scope, receive, send)
            return
        state = {"answered": False}

        async def tell(message: Any) -> None:
            state["answered"] = True
            # The traceback in it is for nobody: the error itself is said at the end.
            await send({key: value for key, value in message.items() if key != "message"})

        try:
            await application(scope, receive, tell)
        except Exception as error:
            if state["answered"]:  # else the application knows no lifespan, as many do not
                failures.append(error)
            raise

    config = uvicorn.Config(watched, log_config=None, timeout_graceful_shutdown=GRACE_SECONDS)
    server = Server(config)
    try:
        with StopSignals() as signals:
            signals.on_request = lambda: setattr(server, "should_exit", True)
            await server.serve(sockets=[listening])
    except SystemExit:  # how uvicorn says that the lifespan failed at its start
        if not failures:
            raise Refused(UNAVAILABLE, "the application did not start; its log above says why") from None
    finally:
        listening.close()
    if failures:
        raise failures[0]

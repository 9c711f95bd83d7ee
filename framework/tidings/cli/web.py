"""An ASGI application served by uvicorn, with the signals, exit codes and errors of `tidings run`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import structlog

from tidings.cli.exits import UNAVAILABLE, USAGE, Refused
from tidings.probes import listening_at
from tidings.signals import StopSignals

__all__ = ["serve_application"]

log = structlog.get_logger("tidings.cli.web")

GRACE_SECONDS: Final = 1
"""For requests under way; after them the application's lifespan drains its services."""


async def serve_application(application: Any, host: str, port: int) -> None:
    """Until SIGINT or SIGTERM, then drain, as `tidings.runtime.serve` does.

    Raises `ConfigurationError` for an address that cannot be had, before anything starts, and what the application's
    lifespan raised, at its start or later.
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
    listening = listening_at(host, port, "the application")
    host, port = listening.getsockname()[:2]
    log.info(
        "process.starting", url=f"http://{f'[{host}]' if ':' in host else host}:{port}", next="Ctrl-C or SIGTERM drains"
    )
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

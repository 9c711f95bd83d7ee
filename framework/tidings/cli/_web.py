"""Serves ASGI applications with uvicorn, with the signals, exit codes and errors of `tidings run` and `tidings dev`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from socket import socket
from typing import Any, Final

import structlog

from tidings._support.tasks import together
from tidings.cli._exits import UNAVAILABLE, USAGE, Refused
from tidings.hosting.listening import listening_at
from tidings.hosting.signals import StopSignals

__all__ = ["application_beside", "serve_application"]

log = structlog.get_logger("tidings.cli.web")

GRACE_SECONDS: Final = 1
"""Seconds to finish requests under way; then the application's lifespan drains its services."""


async def serve_application(application: Any, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM, then drain, as `tidings.hosting.serve.serve` does.

    Raises `ConfigurationError` before anything starts if the address cannot be used, and whatever the application's
    lifespan raises, at its start or later.
    """
    served = _Served(application, host, port)
    log.info("process.starting", url=served.url, next="Ctrl-C or SIGTERM drains")
    with served.listening, StopSignals() as signals:
        signals.on_request = served.end
        await served.run()


def application_beside(application: Any, host: str, port: int) -> AbstractAsyncContextManager[None]:
    """Serve an application while the block runs; the block begins when the application has started.

    Raises what `serve_application` raises. An error during the block cancels the block.
    """
    return _beside(_Served(application, host, port))


@asynccontextmanager
async def _beside(served: _Served) -> AsyncIterator[None]:
    with served.listening:
        async with together(asyncio.Event()) as tasks:
            tasks.create_task(served.run())
            try:
                await served.started.wait()
                log.info("application.started", url=served.url)
                yield
            finally:
                served.end()


class _Served:
    """One application and its server.

    It listens at once, so that an address that cannot be used is noticed before anything starts.
    """

    def __init__(self, application: Any, host: str, port: int) -> None:
        try:
            import uvicorn
        except ImportError as error:
            text = (
                f"a web application needs the package {error.name!r}: install it with  pip install 'tidings[fastapi]'"
            )
            raise Refused(USAGE, text) from error

        self.started = started = asyncio.Event()

        class Server(uvicorn.Server):
            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # uvicorn would send the signal to the process once more after draining

            async def startup(self, sockets: list[socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    started.set()

        self._application = application
        self._failures: list[Exception] = []
        self._server = Server(
            uvicorn.Config(self._watched, interface="asgi3", log_config=None, timeout_graceful_shutdown=GRACE_SECONDS)
        )
        self.listening = listening_at(host, port, "the application")
        host, port = self.listening.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def end(self) -> None:
        """Make `run` drain and return."""
        self._server.should_exit = True

    async def run(self) -> None:
        try:
            await self._server.serve(sockets=[self.listening])
        except asyncio.CancelledError:
            if self._server.started:
                await self._server.shutdown(sockets=[self.listening])
            raise
        except SystemExit:  # uvicorn's way to tell that the lifespan failed at its start
            if not self._failures:
                raise Refused(UNAVAILABLE, "the application did not start; its log above says why") from None
        if self._failures:
            raise self._failures[0]

    async def _watched(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._application(scope, receive, send)
            return
        answered = False

        async def tell(message: Any) -> None:
            nonlocal answered
            answered = True
            # Leave out the traceback in it: the error itself is reported at the end.
            await send({key: value for key, value in message.items() if key != "message"})

        try:
            await self._application(scope, receive, tell)
        except Exception as error:
            if answered:  # else the application does not support lifespan, as many do not
                self._failures.append(error)
            raise

"""ASGI applications served by uvicorn, with the signals, exit codes and errors of `tidings run` and `tidings dev`."""

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
"""Seconds for requests under way; after them the application's lifespan drains its services."""


async def serve_application(application: Any, host: str, port: int) -> None:
    """Until SIGINT or SIGTERM, then drain, as `tidings.hosting.serve.serve` does.

    Raises `ConfigurationError` for an address that cannot be had, before anything starts, and what the application's
    lifespan raised, at its start or later.
    """
    served = _Served(application, host, port)
    log.info("process.starting", url=served.url, next="Ctrl-C or SIGTERM drains")
    with served.listening, StopSignals() as signals:
        signals.on_request = served.end
        await served.run()


def application_beside(application: Any, host: str, port: int) -> AbstractAsyncContextManager[None]:
    """Serve an application while the block runs, which begins when it has started. Raises as `serve_application`; what
    it raises later cancels the block."""
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
    """One application and its server, which listens at once: whether the address can be had is known before anything
    starts."""

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
                yield  # they are ours: uvicorn would end the process by the signal once more, after draining

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
        """`run` drains, and returns."""
        self._server.should_exit = True

    async def run(self) -> None:
        try:
            await self._server.serve(sockets=[self.listening])
        except asyncio.CancelledError:
            if self._server.started:
                await self._server.shutdown(sockets=[self.listening])
            raise
        except SystemExit:  # how uvicorn says that the lifespan failed at its start
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
            # The traceback in it is for nobody: the error itself is said at the end.
            await send({key: value for key, value in message.items() if key != "message"})

        try:
            await self._application(scope, receive, tell)
        except Exception as error:
            if answered:  # else the application knows no lifespan, as many do not
                self._failures.append(error)
            raise

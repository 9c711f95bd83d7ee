"""`/live` and `/ready` over HTTP, for applications of their own and for processes that have none.

Who asks often gets the answer of a moment ago, and no answer shows a secret: see `gathering`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from tidings._support.tasks import together
from tidings.errors import ConfigurationError
from tidings.hosting.answers import Health
from tidings.hosting.gathering import Probe
from tidings.hosting.listening import listening_at

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from tidings.hosting.hosted import Hosted

__all__ = ["answering", "health_routes"]


def health_routes(*services: Hosted) -> list[BaseRoute]:
    """`/live` and `/ready` for a Starlette or FastAPI application that runs these services in its own process:

    `app.router.routes.extend(health_routes(orders))`

    They are for operators, not for clients, so they are not in the OpenAPI document. 200 when ok or degraded, else 503;
    both with what was looked at and what to do. Raises `ConfigurationError` without starlette.
    """
    return _routes(Probe(services))


def _routes(probe: Probe) -> list[BaseRoute]:
    with _extra():
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route

    def answers(judge: Callable[[], Awaitable[Health]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            health = await judge()
            return JSONResponse(
                health.document(),
                status_code=200 if health.ok else 503,
                headers={"cache-control": "no-store"},
                media_type="application/health+json",
            )

        return answer

    return [
        Route("/live", answers(probe.live), methods=["GET"], include_in_schema=False),
        Route("/ready", answers(probe.ready), methods=["GET"], include_in_schema=False),
    ]


@asynccontextmanager
async def answering(probe: Probe, address: int | str) -> AsyncIterator[str]:
    """Answer at `address` (a port of 127.0.0.1, or `host:port`) while the block runs; yields `host:port`.

    Raises `ConfigurationError` at once for an address that cannot be had, and where uvicorn is not installed.
    """
    with _extra():
        import uvicorn
        from starlette.applications import Starlette

        from tidings.hosting.slow_clients import limited

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Signals are the process's: who runs the probes must not catch them."""
            yield

    listening = listening_at(*_host_and_port(address), "the health probes")
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        Starlette(routes=_routes(probe)),
        http=limited(),
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=1,
    )
    server = Server(config)

    async def run() -> None:
        try:
            await server.serve(sockets=[listening])
        except asyncio.CancelledError:
            if server.started:
                await server.shutdown(sockets=[listening])
            raise
        finally:
            listening.close()

    async with together(asyncio.Event()) as tasks:
        tasks.create_task(run(), name="health")
        try:
            yield f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        finally:
            server.should_exit = True


def _host_and_port(address: int | str) -> tuple[str, int]:
    host, _, port = str(address).rpartition(":")
    if not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ConfigurationError(f"health={address!r} is no address: write a port, as 8080, or host:port")
    return host.strip("[]") or "127.0.0.1", int(port)


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise ConfigurationError(
            f"health probes need the package {error.name!r}: install it with  pip install 'tidings[fastapi]'"
        ) from error

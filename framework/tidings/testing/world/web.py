"""A web application in a world: an HTTP client without a network, around the application's lifespan."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from tidings.errors import ConfigurationError
from tidings.hosting.hosted import HOST, Host

if TYPE_CHECKING:
    from httpx import AsyncClient

__all__ = ["Application", "client_of"]

LIFESPAN: float = 65.0
"""Seconds that an application's lifespan may take to begin, and to end: more than that of a service in it."""

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]
"""What ASGI calls an application."""


@asynccontextmanager
async def client_of(api: Application, host: Host, base_url: str) -> AsyncIterator[AsyncClient]:
    """Enter the application's lifespan, in which services run at `host`, and yield a client."""
    try:
        from httpx import ASGITransport, AsyncClient
    except ImportError as error:
        raise ConfigurationError("world.client() needs httpx: pip install 'tidings[testing]'") from error
    lifespan = _Lifespan(api)
    await lifespan.enter(host)
    try:
        async with AsyncClient(transport=ASGITransport(lifespan.answer), base_url=base_url) as client:
            yield client
    finally:
        await lifespan.leave()


class _Lifespan:
    """ASGI's lifespan protocol, in a task of its own."""

    def __init__(self, api: Application) -> None:
        self._api = api
        self._state: dict[str, Any] = {}
        self._told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._begun = asyncio.Event()
        self._failed = ""
        self._task: asyncio.Task[None] | None = None

    async def answer(self, scope: Scope, receive: Any, send: Any) -> None:
        """Handle a request, with the lifespan's state."""
        scope["state"] = dict(self._state)
        await self._api(scope, receive, send)

    async def enter(self, host: Host) -> None:
        """Begin. Raises what the lifespan raises."""
        self._told.put_nowait({"type": "lifespan.startup"})
        self._task = asyncio.create_task(self._run(host), name="lifespan")
        begun = asyncio.create_task(self._begun.wait())
        try:
            ended, _ = await asyncio.wait((self._task, begun), timeout=LIFESPAN, return_when=asyncio.FIRST_COMPLETED)
        finally:
            begun.cancel()
        if not ended:
            raise await self._hangs("begin")
        if self._failed or not self._begun.is_set():
            await self._task
            raise ConfigurationError(f"the application's lifespan did not begin: {self._failed or 'it ended at once'}")

    async def leave(self) -> None:
        """End. Raises what the lifespan raises."""
        task = self._task
        assert task is not None
        self._told.put_nowait({"type": "lifespan.shutdown"})
        ended, _ = await asyncio.wait((task,), timeout=LIFESPAN)
        if not ended:
            raise await self._hangs("end")
        await task

    async def _hangs(self, what: str) -> ConfigurationError:
        """Cancel it, and return what to raise."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait((self._task,))
        return ConfigurationError(
            f"the application's lifespan does not {what}: for {LIFESPAN:g} s it has waited for something that has not "
            "come. Give that wait a limit of its own"
        )

    async def _run(self, host: Host) -> None:
        HOST.set(host)
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self._state}
        await self._api(scope, self._told.get, self._hear)

    async def _hear(self, message: Any) -> None:
        if message["type"] == "lifespan.startup.failed":
            self._failed = message.get("message") or "it failed"
        self._begun.set()

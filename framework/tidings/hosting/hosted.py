"""What hosting asks of a service that is declared above it: start, and say how it runs. It implements nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tidings.buses import EventBus
    from tidings.hosting.running import RunningService
    from tidings.modelling.handlers import Handler
    from tidings.settings import Settings
    from tidings.stores import EventStore

__all__ = ["HOST", "Host", "Hosted"]


class Hosted(Protocol):
    """A `tidings.Service`."""

    @property
    def name(self) -> str: ...

    @property
    def named(self) -> Mapping[str, Handler]: ...

    @property
    def running_now(self) -> RunningService: ...

    @property
    def stands_by(self) -> bool: ...

    @property
    def engine(self) -> AsyncEngine: ...

    def running(
        self, settings: Settings | None = None, *, store: EventStore | None = None, bus: EventBus | None = None
    ) -> AbstractAsyncContextManager[RunningService]: ...


class Host(Protocol):
    """Who runs services for code that would start them itself: a test, for a web application's lifespan."""

    def host(self, service: Hosted) -> AbstractAsyncContextManager[RunningService]:
        """Enter the running service. One that ran before goes on after the block."""
        ...


HOST: Final[ContextVar[Host | None]] = ContextVar("host", default=None)
"""None: a service that is started runs by itself."""

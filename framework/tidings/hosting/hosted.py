"""What hosting asks of a service that is declared above it: start, and say how it runs. It implements nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tidings.buses import EventBus
    from tidings.hosting.running import RunningService
    from tidings.modelling.handlers import Handler
    from tidings.settings import Settings
    from tidings.stores import EventStore

__all__ = ["Hosted"]


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

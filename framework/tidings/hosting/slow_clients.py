"""Limits for who connects to the health probes: how many connections, and for how long. It answers nothing itself.

Connections that never finish a request would otherwise take all files that the process may open, and with them the
service's way to its broker.
"""

from __future__ import annotations

import asyncio
from typing import Final, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["CONNECTIONS", "Limited", "limited"]

CONNECTIONS: Final = 64
"""Connections at once. Beyond that, the oldest one without a whole request is closed."""
LIFETIME: Final = 20.0
"""Seconds that a connection may last, whatever comes on it."""


class Limited(H11Protocol):
    """uvicorn's connection, which ends when its time is over or when another one needs its place."""

    _all: dict[Limited, None]
    _lifetime: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._end = self.loop.call_later(self._lifetime, self._close)
        if len(self._all) >= CONNECTIONS:
            waiting = next((other for other in self._all if not other.at_work), None)
            if waiting is None:
                self._close()
                return
            waiting._close()
        self._all[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        self._all.pop(self, None)
        super().connection_lost(exc)

    @property
    def at_work(self) -> bool:
        """A request has come whole, and is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _close(self) -> None:
        self._all.pop(self, None)
        self.transport.abort()  # not politely: a client that does not read would keep the file open


def limited(lifetime: float = LIFETIME) -> type[asyncio.Protocol]:
    """Return a class of connections with limits of their own, for uvicorn's `http`."""
    return cast("type[asyncio.Protocol]", type("Limited", (Limited,), {"_all": {}, "_lifetime": lifetime}))

"""Where connections come in: they are accepted, counted while they shake hands, and handed over. It reads nothing.

asyncio's own servers do not say which connections are still shaking hands, so nobody could count them.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import structlog

from tidings.server.budgets import Treasury

__all__ = ["Door"]

log = structlog.get_logger(__name__)

PAUSE: Final = 0.2
"""Seconds until a connection is accepted again after one could not be, as when no more files may be open."""
SHARE: Final = 4
"""One in so many connections may be shaking hands."""


class Door:
    """Accepts connections at one listening socket, until `run` is cancelled."""

    def __init__(
        self,
        listening: socket.socket,
        context: ssl.SSLContext | None,
        protocol: Callable[[], asyncio.Protocol],
        treasury: Treasury,
    ) -> None:
        listening.setblocking(False)
        self._listening = listening
        self._context = context
        self._protocol = protocol
        self._treasury = treasury
        self._seconds = treasury.limits.handshake_seconds
        self._most = max(treasury.limits.connections // SHARE, 1)
        self._shaking: dict[asyncio.Task[None], None] = {}
        """Connections that are shaking hands, the oldest first."""

    async def run(self) -> None:
        """Accept connections."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    accepted, _ = await loop.sock_accept(self._listening)
                except OSError as error:
                    log.warning("connection.not_accepted", reason=str(error), advice="are too many files open?")
                    await asyncio.sleep(PAUSE)
                    continue
                if len(self._shaking) >= self._most:
                    self._treasury.refused["handshakes"] += 1
                    oldest = next(iter(self._shaking))
                    del self._shaking[oldest]
                    oldest.cancel()
                task = loop.create_task(self._greet(accepted), name="tidings-server-handshake")
                self._shaking[task] = None
                task.add_done_callback(lambda done: self._shaking.pop(done, None))
                await asyncio.sleep(0)  # it begins: only then does somebody close its socket when it is cancelled
        finally:
            left = list(self._shaking)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _greet(self, accepted: socket.socket) -> None:
        """Shake hands. From then on the connection counts among the others."""
        timeout = self._seconds if self._context is not None else None
        with suppress(OSError):  # also what TLS says of a client that does not speak it, or takes too long
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol, accepted, ssl=self._context, ssl_handshake_timeout=timeout
            )

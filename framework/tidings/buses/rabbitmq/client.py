"""What bus and topology need of an AMQP client: connections that open channels, channels that call, publish, consume.

Two clients have it: `connection` on pamqp, and `aiopika` on aio-pika. Neither knows of events, and neither reconnects.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Protocol, TypeVar

from pamqp.base import Frame

from tidings.buses.rabbitmq.content import Properties

__all__ = [
    "AmqpChannel",
    "AmqpConnection",
    "AmqpError",
    "Blame",
    "ChannelClosed",
    "ConnectionLost",
    "OnClosed",
    "OnDelivery",
    "Outcome",
    "conclude",
    "version_of",
]

F = TypeVar("F", bound=Frame)


class AmqpError(Exception):
    """What the broker said, or why it can say no more; `code` is AMQP's reply code, 0 where there is none."""

    def __init__(self, text: str, code: int = 0) -> None:
        self.text, self.code = text, code
        super().__init__(f"{code} {text}" if code else text)


class ConnectionLost(AmqpError):
    """The connection could not be made, or is gone."""


class ChannelClosed(AmqpError):
    """The broker closed one channel, or cancelled its consumer; the connection lives on."""


class Outcome(Enum):
    """What became of a publish: confirmed in every queue, refused, or no queue to go to."""

    CONFIRMED = "confirmed"
    REFUSED = "refused"
    RETURNED = "returned"


OnDelivery = Callable[[int, Properties | None, bytes], None]
"""Called with delivery tag, properties (None if they cannot be decoded) and body."""

OnClosed = Callable[[AmqpError], None]
"""Called once, with why no more can come."""

Blame = Callable[[Outcome | AmqpError], Exception]
"""Given why a message was not confirmed, what its future raises."""


def conclude(future: asyncio.Future[Outcome], outcome: Outcome | AmqpError, blame: Blame | None) -> None:
    """Tell whoever waits for a publish what became of it."""
    if future.done():  # it was given up, or its channel ended before
        return
    if outcome is not Outcome.CONFIRMED and blame is not None:
        future.set_exception(blame(outcome))
    elif isinstance(outcome, AmqpError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def version_of(properties: Mapping[str, object] | None) -> tuple[int, ...]:
    """Return the version of RabbitMQ, such as (4, 0), as its first method says it; empty for another broker."""
    said = properties or {}
    found = re.match(r"(\d+)\.(\d+)", str(said.get("version"))) if said.get("product") == "RabbitMQ" else None
    return () if found is None else (int(found[1]), int(found[2]))


class AmqpChannel(Protocol):
    """One channel. After `closed` is set it is of no more use."""

    closed: AmqpError | None
    """Why the channel ended; None while it lives."""
    abandoned: int
    """Messages that were unconfirmed when it closed: with one, the broker's complaint is about that one."""

    async def call(self, request: Frame, reply: type[F]) -> F:
        """Send a method and return its reply. Raises `AmqpError`."""
        ...

    def tell(self, request: Frame) -> None:
        """Send a method that asks for no reply: what the broker has against it, the next call raises."""
        ...

    @property
    def crowded(self) -> bool:
        """Whether the broker reads slower than it is sent to: `room` before the next publish."""
        ...

    async def room(self) -> None:
        """Wait until more can be written; those who wait go in the order in which they came."""
        ...

    def publish(
        self, exchange: str, properties: Properties, body: bytes, blame: Blame | None = None, *, routing_key: str = ""
    ) -> asyncio.Future[Outcome]:
        """Send a mandatory message; the future is done when the broker has said what became of it. With `blame`, it
        raises what that makes of anything but a confirm.

        Raises `AmqpError` on a dead channel, `ValueError` or `TypeError` for properties that no frame can hold.
        """
        ...

    async def consume(
        self, queue: str, prefetch: int, on_delivery: OnDelivery, on_closed: OnClosed, *, body_limit: int
    ) -> None:
        """Begin to consume: `on_delivery` for each message, `on_closed` once when no more can come. Raises `AmqpError`.

        A body over `body_limit` bytes is delivered cut to one byte more, so that it can be told.
        """
        ...

    def ack_through(self, tag: int) -> None:
        """Settle all deliveries up to `tag`, without waiting; nothing happens on a dead channel."""
        ...


class AmqpConnection(Protocol):
    """One connection, or a part in one that others use too. After `lost` is set it is of no more use."""

    @property
    def lost(self) -> ConnectionLost | None:
        """Why it ended; None while it lives."""
        ...

    @property
    def version(self) -> tuple[int, ...]:
        """RabbitMQ's version, such as (4, 0); empty for another broker."""
        ...

    async def channel(self, *, confirms: bool = False) -> AmqpChannel:
        """Open a channel, on request with publisher confirms. Raises `AmqpError`."""
        ...

    async def reserve(self, queue: str) -> None:
        """Wait until no other user of this very connection holds `queue` as exclusive; `close` gives it back."""
        ...

    async def close(self) -> None:
        """End it, after what was written before; returns within seconds, also from a broker that does not answer."""
        ...

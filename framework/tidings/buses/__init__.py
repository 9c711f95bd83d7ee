"""The event bus's port: messages from a relay to one durable queue per service and partition.

The bus may lose, repeat and reorder: the log is the truth, and duplicates and gaps are found out by position. So an
adapter stays thin. Rules that every adapter keeps, each proved by a test of `tidings.testing.bus_conformance`:

* A message is confirmed only after every bound queue has it; a message that reaches no queue raises `Unroutable`.
* A marker (no bucket) reaches every queue; an event each service's queue of its bucket.
* Deliveries come in the queue's order; those not settled come again to the next consumer.
* At most `prefetch` deliveries are unsettled at a time.
* `settle_through` settles everything up to its tag, and is harmless on a consumer that is gone.
* A lost connection, channel or queue ends the iteration with `BusUnavailable`, never silently.
* Of several consumers of a queue one is active; when it closes, another takes over.
* A lock has one holder; losing the connection loses it.
* Provisioning twice changes nothing; what exists with other properties raises `TopologyMismatch` that names them.
* Inspecting makes nothing and changes nothing, and finds out what provisioning would make or refuse.
* Deleting takes away the queues that it is given, and leaves every other one alone; none is no error.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

from tidings.errors import ConfigurationError
from tidings.protocol.message import Message
from tidings.protocol.position import BUCKETS

__all__ = [
    "Consumer",
    "Delivery",
    "EventBus",
    "ExportsUsers",
    "Found",
    "ListsQueues",
    "Message",
    "Publisher",
    "Subscription",
    "check_partitions",
    "check_service_name",
]

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")


def check_service_name(name: str) -> str:
    """A service's name becomes part of queue names and permissions: lower case, digits, `-` and `_`, 100 at most."""
    if not _NAME.fullmatch(name) or name in ("events", "partitions", "relay"):
        raise ConfigurationError(
            f"{name!r} cannot name a service: use 1 to 100 of a-z, 0-9, '-' and '_', beginning with a letter or digit, "
            "and not 'events', 'partitions' or 'relay'"
        )
    return name


def check_partitions(count: int) -> int:
    """Raises `ConfigurationError` for a number of partitions that no service can have: a bucket cannot be divided."""
    if type(count) is not int or not 1 <= count <= BUCKETS:
        raise ConfigurationError(f"a service has 1 to {BUCKETS} partitions, not {count!r}")
    return count


@dataclass(frozen=True, slots=True)
class Subscription:
    """What one partition of a service needs from the bus: a queue, bound to the events of its buckets, and to markers.

    A service that is not divided is one partition with all buckets.
    """

    service: str
    index: int = 0
    count: int = 1
    """Of partitions, 1 to `BUCKETS`."""

    @property
    def queue(self) -> str:
        return f"tidings.{self.service}" if self.count == 1 else f"tidings.{self.service}.{self.index}"

    @property
    def buckets(self) -> range:
        """The ranges of a service's partitions cover all buckets, each once."""
        return range(BUCKETS * self.index // self.count, BUCKETS * (self.index + 1) // self.count)


@dataclass(frozen=True, slots=True)
class Found:
    """One thing that Tidings needs on the bus, and what is there in its place."""

    kind: Literal["exchange", "queue"]
    name: str
    state: Literal["missing", "fits", "differs"]
    detail: str = ""
    """Of what differs: in what, and the remedy. Of what fits: what is worth knowing, if anything."""
    messages: int | None = None
    """Of a queue that is there: how many wait in it, without those delivered and unsettled."""
    consumers: int | None = None


class Delivery(NamedTuple):
    """A message with the tag that settles it; tags rise by one per consumer."""

    tag: int
    message: Message


class Publisher(Protocol):
    """Sends within the lifetime of one connection; after an error it is of no more use: close it, open another."""

    async def send(self, message: Message) -> None:
        """Return when the broker has confirmed. Run several at once: they go out in the order in which they began.

        Raises `Unroutable` (no queue took it), `PublishRejected` (this message is refused for what it is, and would be
        again), `BusUnavailable` (the outcome is unknown, or a queue could not take it now: send again).
        """
        ...

    async def begin(self, message: Message) -> asyncio.Future[Any]:
        """As `send`, without a task for each message in flight: return when the message went out, which waits only for
        a broker that reads too slowly. The future is done when the broker has confirmed; its result means nothing.

        Both this and the future raise what `send` does. Whoever begins looks at the future's exception.
        """
        ...


class Consumer(Protocol):
    """Deliveries of one queue within the lifetime of one connection."""

    def __aiter__(self) -> AsyncIterator[Delivery]: ...

    def settle_through(self, tag: int) -> None:
        """Settle every delivery up to and including `tag`; does not wait. Harmless when repeated, or after a loss."""
        ...


@runtime_checkable
class EventBus(Protocol):
    """Obtain one with `async with tidings.open_bus(url) as bus`. What a bus may do beyond this is `ExportsUsers` and
    `ListsQueues`, which operators' commands ask for, and no delivery needs."""

    async def provision(self, subscription: Subscription | None = None) -> None:
        """Make the exchange and, if given, the partition's queue and its bindings; change nothing that exists."""
        ...

    async def delete(self, subscriptions: Sequence[Subscription]) -> None:
        """Delete the queues of these, with what waits in them. Raises `BusUnavailable`."""
        ...

    async def inspect(self, subscriptions: Sequence[Subscription]) -> list[Found]:
        """What is there of what these need: exchanges, then the queues in their order. Raises `BusUnavailable`."""
        ...

    def publisher(self, *, lock: str | None = None) -> AbstractAsyncContextManager[Publisher]:
        """A connection for publishing. With `lock`, entering waits until this process alone holds that name."""
        ...

    def consume(self, subscription: Subscription, *, prefetch: int = 1000) -> AbstractAsyncContextManager[Consumer]:
        """A connection for consuming; entering waits for nothing but the connection. Raises `BusUnavailable`."""
        ...

    async def close(self) -> None:
        """Close every connection; harmless when repeated."""
        ...


@runtime_checkable
class ExportsUsers(Protocol):
    """A bus whose broker has users and permissions, and takes them as a document. Optional; it connects to nothing."""

    def users(self, services: Sequence[str], relays: Sequence[str]) -> list[str]:
        """Return the names of the users that these relays and services log in as, each with one of its own."""
        ...

    def definitions(
        self, services: Sequence[str], relays: Sequence[str], passwords: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return the document, as JSON values, that makes these users with the permissions they need and no others.

        `passwords` are by user; a user that it lacks cannot log in before the broker is told a password.
        """
        ...


@runtime_checkable
class ListsQueues(Protocol):
    """A bus whose broker can list all queues, at an address beside that of its messages. Optional."""

    async def listed_queues(self, management: str) -> list[Found]:
        """Return the queues of Tidings that exist, whoever they were made for; `management` is the URL to ask.

        Raises `ConfigurationError` for a URL that cannot be asked, and `BusUnavailable`.
        """
        ...

"""The event bus's port: messages from a relay to one durable queue per service and partition.

The bus may lose, repeat and reorder: the log is the truth, and services detect duplicates and gaps by position. So an
adapter stays thin. Rules that every adapter keeps, each proved by a test of `tidings.testing.bus_conformance`:

* A message is confirmed only after every bound queue has it; a message that reaches no queue raises `Unroutable`.
* A message that one queue refuses raises `QueueRefused`, and reaches every other queue.
* A marker (without a bucket) reaches every queue; an event reaches each service's queue of its bucket.
* Deliveries come in the queue's order; those that are not settled come again to the next consumer.
* At most `prefetch` deliveries are unsettled at a time.
* `settle_through` settles everything up to its tag, and is harmless on a consumer that was lost.
* A lost connection, channel or queue ends the iteration with `BusUnavailable`, never silently.
* Of several consumers of a queue, one is active; when it closes, another takes over.
* A lock has one holder; losing the connection loses it.
* Provisioning twice changes nothing; a queue or exchange with other properties raises `TopologyMismatch`, which names
  them.
* Inspecting creates and changes nothing, and shows what provisioning would create or refuse.
* Deleting removes the given queues and no other; a queue that does not exist is no error.
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
    "CountsConsumers",
    "Delivery",
    "EventBus",
    "ExportsUsers",
    "TopologyItem",
    "ListsBindings",
    "ListsLimits",
    "ListsQueues",
    "Message",
    "Publisher",
    "Subscription",
    "WithinProcess",
    "check_partitions",
    "check_service_name",
]

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")


def check_service_name(name: str) -> str:
    """Return the name of a service if it is valid. Raises `ConfigurationError`.

    The name becomes part of queue names and permissions: 1 to 100 of a-z, 0-9, `-` and `_`.
    """
    if not _NAME.fullmatch(name) or name in ("events", "partitions", "relay"):
        raise ConfigurationError(
            f"{name!r} cannot name a service: use 1 to 100 of a-z, 0-9, '-' and '_', beginning with a letter or digit, "
            "and not 'events', 'partitions' or 'relay'"
        )
    return name


def check_partitions(count: int) -> int:
    """Return the number of partitions if it is possible: 1 to 256, as a bucket cannot be divided. Raises
    `ConfigurationError`."""
    if type(count) is not int or not 1 <= count <= BUCKETS:
        raise ConfigurationError(f"a service has 1 to {BUCKETS} partitions, not {count!r}")
    return count


@dataclass(frozen=True, slots=True)
class Subscription:
    """What one partition of a service needs from the bus: a queue bound to the events of its buckets and to markers.

    An undivided service is one partition with all buckets.
    """

    service: str
    index: int = 0
    count: int = 1
    """Number of the service's partitions, 1 to `BUCKETS`."""

    @property
    def queue(self) -> str:
        return f"tidings.{self.service}" if self.count == 1 else f"tidings.{self.service}.{self.index}"

    @property
    def buckets(self) -> range:
        """The partition's range. The ranges of a service's partitions cover each bucket once."""
        return range(BUCKETS * self.index // self.count, BUCKETS * (self.index + 1) // self.count)


@dataclass(frozen=True, slots=True)
class TopologyItem:
    """A queue or exchange that Tidings needs on the bus, and what exists in its place; or a binding or policy that it
    does not need."""

    kind: Literal["exchange", "queue", "binding", "policy"]
    name: str
    state: Literal["missing", "fits", "differs"]
    detail: str = ""
    """If it differs: in what, and the remedy. If it fits: anything worth knowing."""
    messages: int | None = None
    """Messages that wait in an existing queue, without those that are delivered and unsettled."""
    consumers: int | None = None


class Delivery(NamedTuple):
    """A message with the tag that settles it. Tags rise by one per consumer."""

    tag: int
    message: Message


class Publisher(Protocol):
    """Sends messages over one connection. After an error, close it and open another one."""

    async def send(self, message: Message) -> None:
        """Send a message, and return when the broker has confirmed it. Concurrent sends go out in the order of their
        calls.

        Raises `Unroutable` (no queue took it), `PublishRejected` (the broker refuses this message, and would again),
        `QueueRefused` (a queue cannot take it now, every other one was given it: go on) and `BusUnavailable` (the
        outcome is unknown: send again).
        """
        ...

    async def begin(self, message: Message) -> asyncio.Future[Any]:
        """Send a message without waiting for the confirm, so that no task per message is needed.

        Returns when the message has gone out, which waits only for a broker that reads too slowly. The future is done
        when the broker has confirmed; its result means nothing. Both this method and the future raise what `send`
        raises. The caller must look at the future's exception.
        """
        ...


class Consumer(Protocol):
    """Deliveries of one queue over one connection."""

    def __aiter__(self) -> AsyncIterator[Delivery]: ...

    def settle_through(self, tag: int) -> None:
        """Settle every delivery up to and including `tag`, without waiting. Harmless when repeated, or after a loss."""
        ...


@runtime_checkable
class EventBus(Protocol):
    """A message bus. Open one with `async with tidings.open_bus(url) as bus`.

    A bus may also be `WithinProcess`, and `ExportsUsers` and `ListsQueues`, which only operators' commands need.
    """

    async def provision(self, subscription: Subscription | None = None) -> None:
        """Create the exchange and, if given, the partition's queue and its bindings. Changes nothing that exists."""
        ...

    async def delete(self, subscriptions: Sequence[Subscription]) -> None:
        """Delete the queues of these partitions with their messages. Raises `BusUnavailable`."""
        ...

    async def inspect(self, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        """Return what exists of what these partitions need: exchanges, then queues in order. Raises
        `BusUnavailable`."""
        ...

    def publisher(self, *, lock: str | None = None) -> AbstractAsyncContextManager[Publisher]:
        """Open a connection for publishing. With `lock`, entering waits until this process alone holds that lock."""
        ...

    def consume(self, subscription: Subscription, *, prefetch: int = 1000) -> AbstractAsyncContextManager[Consumer]:
        """Open a connection for consuming. Entering waits only for the connection. Raises `BusUnavailable`."""
        ...

    async def close(self) -> None:
        """Close every connection. Harmless when repeated."""
        ...


@runtime_checkable
class ExportsUsers(Protocol):
    """A bus whose broker accepts users and permissions as a document. Optional; it does not connect."""

    def users(self, services: Sequence[str], relays: Sequence[str]) -> list[str]:
        """Return the names of the users that these relays and services log in as, each with one of its own."""
        ...

    def definitions(
        self, queues: Sequence[Subscription], relays: Sequence[str], passwords: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return the document, as JSON values, that makes these users with the permissions they need and no others.

        A service's user may make `queues` of its service and no others.
        `passwords` are by user; a user that it lacks cannot log in before the broker is told a password.
        """
        ...


@runtime_checkable
class CountsConsumers(Protocol):
    """A bus whose `TopologyItem.consumers` is every consumer of the queue, also one that waits for its turn. Optional.

    RabbitMQ counts only the one at work.
    """

    @property
    def counts_all_consumers(self) -> bool:
        """True: a process that finds one consumer, its own, is alone."""
        ...


@runtime_checkable
class WithinProcess(Protocol):
    """A bus whose messages never leave the process, such as `memory://`. Optional.

    Of several processes that run one service on it, one works and the others stand by.
    """

    @property
    def within_process(self) -> bool:
        """True: no other process gets these messages."""
        ...


@runtime_checkable
class ListsBindings(Protocol):
    """A bus whose broker can list what is bound to what, at an address beside that of its messages. Optional."""

    async def foreign_bindings(self, management: str, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        """Return the bindings from Tidings' exchanges to queues that are none of these partitions, and from other
        exchanges to the queues of these; `management` is the URL to ask. Raises as `ListsQueues` does."""
        ...

    @property
    def bindings_unseen(self) -> str:
        """What a bus cannot see of bindings without asking there, and how to see it."""
        ...


@runtime_checkable
class ListsLimits(Protocol):
    """A bus whose broker may drop messages that no service has settled, and can say for which queues. Optional."""

    async def limiting_policies(self, management: str, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        """Return the policies by which queues of these partitions drop messages that no service has settled, with the
        queue; `management` is the URL to ask. Raises as `ListsQueues` does."""
        ...


@runtime_checkable
class ListsQueues(Protocol):
    """A bus whose broker can list all queues, at an address beside that of its messages. Optional."""

    async def listed_queues(self, management: str) -> list[TopologyItem]:
        """Return the queues of Tidings that exist, whoever they were made for; `management` is the URL to ask.

        Raises `ConfigurationError` for a URL that cannot be asked, and `BusUnavailable`.
        """
        ...

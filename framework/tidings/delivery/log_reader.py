"""Reads the log and hands over its events; the pass and the catching up are two ends of this one way.

It accepts nothing and runs nothing: its end does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Final, Protocol, cast

from tidings.delivery.owned import inner, marking
from tidings.protocol.metadata import own_metadata
from tidings.protocol.position import CARRIED, carried
from tidings.stores import EventStore, RecordedEvent

__all__ = ["LAGGING_SECONDS", "PROGRESS_SECONDS", "End", "read_log"]

PROGRESS_SECONDS: Final = 1.0
"""Seconds between two notes of how far a reading came, where a restart goes on."""
LAGGING_SECONDS: Final = 0.1
"""Seconds before a store, or the bus, is looked at again for what it has not brought yet."""


class End(Protocol):
    """Where the events go."""

    def wants(self, bucket: int) -> bool:
        """Whether it takes anything of the bucket, as far as it is known now."""

    @property
    def waits(self) -> bool:
        """It takes nothing before `ready` returns."""

    async def ready(self) -> None: ...

    def take(self, event: RecordedEvent, bucket: int, metadata: dict[str, Any] | None) -> bool:
        """Take an event. False when the reading is to end before it."""

    def progressed(self, reached: int, head: int) -> None:
        """Everything up to `reached` was handed over; told once a second."""


async def read_log(store: EventStore, after: int, head: int, end: End, clock: Callable[[], float]) -> int:
    """Hand over the carried events above `after`, up to `head`. Return the position up to which that was done.

    Raises `StoreUnavailable`.
    """
    told, source = clock(), cast("Any", inner(store))
    # Of a store that marks its errors, each event would pass through one generator more.
    with marking(source):
        async with aclosing(source.read_all(after=after, filter=CARRIED)) as events:
            async for event in events:
                position: int = event.position
                if position > head:
                    break
                metadata = own_metadata(event.metadata)
                bucket = carried(event, metadata)
                if bucket is not None and end.wants(bucket):
                    while end.waits:
                        await end.ready()
                    if not end.take(event, bucket, metadata):
                        return position - 1
                now = clock()
                if now - told >= PROGRESS_SECONDS:
                    told = now
                    end.progressed(position, head)
    return head

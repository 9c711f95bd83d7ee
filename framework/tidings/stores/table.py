"""What stores share whose log is a table of a database: the ways to write, and reads in pages.

Such a store says how a write is begun and where a page comes from. What may be written and read is in `rules`.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple

from tidings.errors import StoreUnavailable, StreamDeleted
from tidings.stores import (
    ANY,
    EVERYTHING,
    NO_STREAM,
    OCTETS,
    Appended,
    EventData,
    Expected,
    Filter,
    RecordedEvent,
    check_stream_name,
    check_text,
)
from tidings.stores.metadata import check_closing, check_metadata_write
from tidings.stores.rules import MAX_VERSION, METADATA, STREAM_DELETED, check_event

__all__ = ["PAGE_EVENTS", "Kind", "Page", "TableStore", "View", "as_expected", "check_stream", "checked_size"]

PAGE_EVENTS: Final = 512
"""Events of one page, at most."""


class Kind(Enum):
    """What a write does to its stream."""

    APPEND = "append"
    DELETE = "delete"
    TOMBSTONE = "tombstone"


class View(NamedTuple):
    """What may be read of a stream: versions `first` to `last` that were recorded at `since` (ticks) or later."""

    first: int
    last: int
    since: int


class Page(NamedTuple):
    """A piece of a read: its events, how far it looked, and whether that was the end."""

    events: list[RecordedEvent]
    reached: int
    """Position or version: the next page begins behind it."""
    end: bool


def check_stream(stream: str) -> None:
    """Raise `InvalidStreamName` for what cannot name a stream."""
    check_stream_name(stream)
    check_text(stream)


def checked_size(stream: str, events: Sequence[EventData]) -> int:
    """Return the bytes of the events. Raises `InvalidStreamName` and `TypeError` for what no log can take."""
    size = 0
    for event in events:
        size += event.size
        check_event(stream, event)
    check_stream(stream)
    return size


def as_expected(expected: Expected) -> Expected:
    """Return `NO_STREAM` for -1, which `Appended.version` says of a stream without events; else what it is. Raises
    `TypeError` for what is no expected version."""
    if not isinstance(expected, Expected):
        raise TypeError(f"expected={expected!r}: an expected version is an int, ANY, NO_STREAM or STREAM_EXISTS")
    return NO_STREAM if expected == -1 else expected


class TableStore(ABC):
    """The part of an `EventStore` that does not depend on the database. It belongs to the event loop in which it was
    opened."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = False

    @abstractmethod
    def begin(
        self, kind: Kind, stream: str, events: Sequence[EventData], expected: Expected
    ) -> asyncio.Future[Appended]:
        """Hand a write over without waiting for it; writes are applied in the order in which they are begun.

        For whoever has many in flight. What can be refused without a look at the log is raised here and now.
        """

    @abstractmethod
    async def _view_of(self, stream: str) -> View:
        """Raises `StreamNotFound`, also for a softly deleted stream, and `StreamDeleted`."""

    @abstractmethod
    async def _page_of_stream(
        self, stream: str, view: View, backwards: bool, count: int
    ) -> tuple[list[RecordedEvent], bool]:
        """Return events in a view from one of its two ends, and whether there may be more."""

    @abstractmethod
    async def _page_of_all(self, after: int, before: int, backwards: bool, filter: Filter, count: int) -> Page: ...

    # ---- writing

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        events = tuple(events)
        check_metadata_write(stream, events)
        return await self.begin(Kind.APPEND, stream, events, expected)

    async def set_metadata(self, stream: str, values: Mapping[str, Any], *, expected: Expected = ANY) -> Appended:
        check_stream(stream)
        document = json.dumps(dict(values), ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()
        try:
            return await self.append(f"$${stream}", [EventData(METADATA, document)], expected=expected)
        except StreamDeleted as error:
            raise StreamDeleted(stream, tombstoned=error.tombstoned) from None

    async def delete(self, stream: str, *, expected: Expected = ANY) -> None:
        check_closing(stream)
        await self.begin(Kind.DELETE, stream, [EventData(METADATA, b"")], expected)

    async def tombstone(self, stream: str, *, expected: Expected = ANY) -> None:
        check_closing(stream)
        await self.begin(Kind.TOMBSTONE, stream, [EventData(STREAM_DELETED, b"", content_type=OCTETS)], expected)

    # ---- reading

    async def read_stream(
        self, stream: str, *, start: int | None = None, backwards: bool = False, limit: int | None = None
    ) -> AsyncIterator[RecordedEvent]:
        check_stream(stream)
        view = await self._view_of(stream)
        if start is not None:
            view = (
                view._replace(last=min(view.last, start)) if backwards else view._replace(first=max(view.first, start))
            )
        left = MAX_VERSION if limit is None else limit
        more = True
        while more and left > 0 and view.first <= view.last:
            events, more = await self._page_of_stream(stream, view, backwards, min(PAGE_EVENTS, left))
            for event in events:
                yield event
            left -= len(events)
            if events:
                at = events[-1].version
                view = view._replace(last=at - 1) if backwards else view._replace(first=at + 1)

    async def read_all(
        self, *, after: int = -1, backwards: bool = False, limit: int | None = None, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent]:
        left = MAX_VERSION if limit is None else limit
        before, end = MAX_VERSION, False
        while not end and left > 0:
            page = await self._page_of_all(after, before, backwards, filter, min(PAGE_EVENTS, left))
            for event in page.events:
                yield event
            left -= len(page.events)
            end = page.end
            if backwards:
                before = page.reached
            else:
                after = page.reached

    # ---- closing

    def _check_usable(self) -> None:
        if self._closing:
            raise StoreUnavailable("the event store is closed: open it again")
        if asyncio.get_running_loop() is not self._loop:
            raise StoreUnavailable(
                "the event store was opened in another event loop: open one in this loop", waiting_helps=False
            )

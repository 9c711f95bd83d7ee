"""What a test may state as an event, and what is found: an event, perhaps with its stream. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias
from uuid import uuid4

from tidings.errors import ConfigurationError
from tidings.modelling.codec import encode
from tidings.modelling.events import Event, partition_key, wire_name
from tidings.stores import EventData, RecordedEvent
from tidings.testing.scenario.finding import aggregates

__all__ = ["Emitted", "Expected", "Raw", "Stated", "data_of", "home_of", "raw", "stated"]

Raw: TypeAlias = EventData | RecordedEvent
"""An event as a log holds it, for one whose class the test does not have."""
Stated: TypeAlias = Event | Raw | tuple[str, Event | Raw]
"""An event that the log holds, perhaps with its stream."""
Expected: TypeAlias = Event | tuple[str, Event]
"""An event that should come, perhaps with its stream. Without one, the stream is not compared."""


class Emitted(NamedTuple):
    """An event that a handler emitted, or that an aggregate which it changed has recorded."""

    stream: str
    event: Event | EventData
    """An `EventData` if neither the test nor the service has a class for it."""
    metadata: Mapping[str, Any]
    """The keys that `context.emit(..., metadata=)` was given, without those of Tidings."""


def stated(given: Stated) -> tuple[str, Event | Raw]:
    """Return what was stated as stream and event. Raises `ConfigurationError` for anything else."""
    stream, event = given if type(given) is tuple and len(given) == 2 else (None, given)
    if isinstance(event, Event | EventData | RecordedEvent) and (stream is None or isinstance(stream, str)):
        return home_of(event) if stream is None else stream, event
    what = f"{event.__qualname__} is a class: give an event" if isinstance(event, type) else f"{given!r} is no event"
    raise ConfigurationError(f"{what}. State an event as OrderCreated(...), or with its stream ('order-1', event)")


def home_of(event: Event | Raw) -> str:
    """Return the stream of an event that was stated without one.

    That is the stream of the one aggregate that evolves the event, with the event's partition key as id. If there is no
    such aggregate, or there are several, the stream is named after the event.
    """
    if isinstance(event, RecordedEvent):
        return event.stream
    if isinstance(event, EventData):
        return f"{event.type.lower()}-1"
    key = partition_key(event) or "1"
    categories = {kind.__tidings__.category for kind in aggregates() if type(event) in kind.__tidings__.evolutions}
    return f"{categories.pop() if len(categories) == 1 else wire_name(event).lower()}-{key}"


def data_of(event: Event | Raw, metadata: Mapping[str, Any] | None = None) -> EventData:
    """Return the event as a store takes it. Raises `SchemaError` for one that could not be read back."""
    if isinstance(event, Event):
        return encode(event, id=uuid4(), metadata=metadata)
    if isinstance(event, RecordedEvent):
        return raw(event)
    return event


def raw(row: RecordedEvent) -> EventData:
    """Return a recorded event as it was appended."""
    return EventData(type=row.type, data=row.data, metadata=row.metadata, id=row.id, content_type=row.content_type)

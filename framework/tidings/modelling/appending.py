"""Events on their way into the log from outside any handler: checked, made into what a store keeps, appended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID, uuid4

from tidings.errors import ConfigurationError
from tidings.modelling.codec import encode
from tidings.modelling.events import Event
from tidings.protocol.position import RESERVED
from tidings.stores import ANY, Appended, EventData, EventStore, Expected

__all__ = ["append", "check_target", "encoded"]


def check_target(stream: str) -> None:
    """Raises `ConfigurationError` for a stream that is not for applications."""
    if stream.startswith(RESERVED):
        raise ConfigurationError(f"stream {stream!r}: names that begin with '$', 'tidings_' or 'tidings.' are reserved")


def encoded(events: Sequence[Event], metadata: Mapping[str, Any] | None, correlation_id: str | None) -> list[EventData]:
    """Give each an id; without a correlation id the first one's begins the correlation of all."""
    ids: list[UUID] = [uuid4() for _ in events]
    return [
        encode(event, id=identity, metadata=metadata, correlation_id=correlation_id or str(ids[0]))
        for event, identity in zip(events, ids, strict=True)
    ]


async def append(
    store: EventStore,
    stream: str,
    events: Sequence[Event],
    *,
    expected: Expected = ANY,
    metadata: Mapping[str, Any] | None = None,
    correlation_id: str | None = None,
) -> Appended:
    """Append events together. Errors are the store's, `ConfigurationError` and `SchemaError`."""
    check_target(stream)
    return await store.append(stream, encoded(events, metadata, correlation_id), expected=expected)

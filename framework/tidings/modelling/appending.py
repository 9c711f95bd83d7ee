"""Events on their way into the log from outside any handler: checked, made into what a store keeps, appended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID, uuid4

from tidings.errors import ConfigurationError
from tidings.modelling.codec import encode
from tidings.modelling.events import Event
from tidings.protocol.position import RESERVED
from tidings.stores import ANY, Appended, AppendedSeveral, EventData, EventStore, Expected, StreamAppend

__all__ = ["Appends", "check_target", "encoded"]


def check_target(stream: str) -> None:
    """Raises `ConfigurationError` for a stream that is not for applications, and for what is no stream's name."""
    if not isinstance(stream, str):
        shown = stream.__qualname__ if isinstance(stream, type) else repr(stream)
        raise ConfigurationError(
            f"append({shown}, ...): the stream's name comes first, then the events: append('order-1', OrderPlaced(...))"
        )
    if stream.startswith(RESERVED):
        raise ConfigurationError(f"stream {stream!r}: names that begin with '$', 'tidings_' or 'tidings.' are reserved")


def encoded(events: Sequence[Event], metadata: Mapping[str, Any] | None, correlation_id: str | None) -> list[EventData]:
    """Give each an id; without a correlation id the first one's begins the correlation of all."""
    ids: list[UUID] = [uuid4() for _ in events]
    return [
        encode(event, id=identity, metadata=metadata, correlation_id=correlation_id or str(ids[0]))
        for event, identity in zip(events, ids, strict=True)
    ]


class Appends:
    """What appends events from outside any handler."""

    def _appends_to(self) -> EventStore:
        """Return the log. Raises where it cannot be appended to now."""
        raise NotImplementedError

    async def append(
        self,
        stream: str,
        *events: Event,
        expected: Expected = ANY,
        metadata: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
    ) -> Appended:
        """Append events together, outside any handler (inside one, use `Context.emit`); they are in the log when this
        returns.

        Raises what `EventStore.append` raises, `ConfigurationError` and `SchemaError`. When it raises
        `StoreUnavailable` the outcome is unknown: with an expected version it may be repeated.
        """
        store = self._appends_to()
        check_target(stream)
        return await store.append(stream, encoded(events, metadata, correlation_id), expected=expected)

    async def append_several(
        self,
        *appends: StreamAppend[Event],
        metadata: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
    ) -> AppendedSeveral:
        """Append events to several streams, all or nothing, outside any handler; they are in the log when this returns.

            await log.append_several(
                StreamAppend("account-ada", [Withdrawn(amount=5)], expected=3),
                StreamAppend("account-bob", [Deposited(amount=5)]),
                StreamAppend("limits", expected=12),
            )

        A stream without events must be as expected, and nothing is written to it. At most 1,000 streams, each once; the
        log gets the events in this order, and all of them carry the same correlation id.

        Raises what `EventStore.append_several` raises (`WrongExpectedVersion`, `StreamDeleted`, `EventTooLarge` and
        `InvalidAppend` name a stream; `AbilityMissing` comes from a server that cannot do this), `ConfigurationError`
        and `SchemaError`. When it raises `StoreUnavailable` the outcome is unknown: if one of the streams with events
        has an expected version, it may be repeated, and is refused if the first attempt succeeded.
        """
        store = self._appends_to()
        for part in appends:
            if not isinstance(part, StreamAppend):
                raise ConfigurationError(
                    f"append_several({part!r}): give a StreamAppend for each stream, one by one: "
                    "append_several(StreamAppend('order-1', [OrderPlaced(...)]), StreamAppend('stock-1', [...]))"
                )
            check_target(part.stream)
            if isinstance(part.events, Event):  # which can be iterated over, field by field
                raise ConfigurationError(
                    f"append_several: the events of stream {part.stream!r} are a single event. Put it into a list: "
                    f"StreamAppend({part.stream!r}, [{type(part.events).__qualname__}(...)])"
                )
        parts = [part._replace(events=[*part.events]) for part in appends]  # whatever can be read only once
        ready = iter(encoded([event for part in parts for event in part.events], metadata, correlation_id))
        return await store.append_several(
            [StreamAppend(stream, [next(ready) for _ in events], expected) for stream, events, expected in parts]
        )

"""Where an append of unknown outcome is in the log. It reads, and writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from tidings.errors import PartlyRepeated, StoreUnavailable, StreamDeleted, StreamNotFound, WrongExpectedVersion
from tidings.stores import (
    NO_STREAM,
    STREAM_EXISTS,
    Appended,
    AppendedSeveral,
    EventData,
    EventStore,
    Expected,
    Filter,
    StreamAppend,
)
from tidings.stores.eventstoredb.appends import Write

__all__ = ["find", "is_repeatable", "repeated"]


async def find(store: EventStore, write: Write) -> Appended | Expected:
    """Where an append of unknown outcome is in the log; if it is not, the version to append at. Raises
    `StreamDeleted`, `StoreUnavailable`."""
    if not write.events:
        return write.expected
    wanted = write.events[-1].id.bytes
    deleted: StreamDeleted | None = None
    newest, whole = write.refused_at, False  # not all that a stream has need be readable
    try:
        async for event in store.read_stream(write.stream, backwards=True):
            newest = max(newest, event.version)
            if event.id_bytes == wanted:
                return Appended(event.version, event.position)
            whole = event.version == 0 or event.position <= write.floor
            if whole:
                break
    except StreamNotFound:
        pass
    except StreamDeleted as error:
        deleted = error
    if not whole:  # what the stream does not show any more, the log still does
        async for event in store.read_all(after=write.floor, filter=Filter(stream_prefixes=(write.stream,))):
            if event.id_bytes == wanted and event.stream == write.stream:
                return Appended(event.version, event.position)
    if deleted is not None:
        raise deleted
    if newest >= 0:
        return newest
    return STREAM_EXISTS if write.expected is STREAM_EXISTS else NO_STREAM


async def repeated(
    store: EventStore, parts: Mapping[str, StreamAppend[EventData]], refusal: PartlyRepeated | WrongExpectedVersion
) -> AppendedSeveral:
    """Return the outcome of a refused append over several streams that is in the log whole: the server has forgotten
    the ids of some. Raises the refusal, as `PartlyRepeated` where the log shows that it is that."""
    told: PartlyRepeated | WrongExpectedVersion = refusal
    if isinstance(refusal, WrongExpectedVersion):
        part = parts.get(refusal.stream)
        there = None if part is None or not is_repeatable(part.expected) else await _written(store, part)
        if there is None:
            raise refusal
        told = PartlyRepeated(refusal.stream, there.version)
    versions: dict[str, int] = {}
    position = -1
    # First those that are looked for in one place.
    for part in sorted(parts.values(), key=lambda part: not is_repeatable(part.expected)):
        if part.events:
            if (there := await _written(store, part)) is None:
                raise told from None
            versions[part.stream], position = there.version, max(position, there.position)
    return AppendedSeveral(versions, position)


async def _written(store: EventStore, part: StreamAppend[EventData]) -> Appended | None:
    """Return the place of the last of a part's events if its stream shows them: at the version that is expected, or
    anywhere."""
    if not part.events:
        return None
    with suppress(StreamNotFound, StreamDeleted, StoreUnavailable):
        if is_repeatable(part.expected):
            start = (part.expected if isinstance(part.expected, int) else -1) + 1
            found = [event async for event in store.read_stream(part.stream, start=start, limit=len(part.events))]
            if [event.id for event in found] == [event.id for event in part.events]:
                return Appended(found[-1].version, found[-1].position)
            return None
        async for event in store.read_stream(part.stream, backwards=True):
            if event.id == part.events[-1].id:
                return Appended(event.version, event.position)
    return None


def is_repeatable(expected: Expected) -> bool:
    """Return whether a repetition with this expectation is known however late it comes: not so for `ANY`."""
    return isinstance(expected, int) or expected is NO_STREAM

"""Where an append of unknown outcome is in the log. It reads, and writes nothing."""

from __future__ import annotations

from contextlib import suppress

from tidings.errors import StoreUnavailable, StreamDeleted, StreamNotFound
from tidings.stores import (
    NO_STREAM,
    STREAM_EXISTS,
    Appended,
    EventData,
    EventStore,
    Expected,
    Filter,
    StreamAppend,
)
from tidings.stores.eventstoredb.appends import Write

__all__ = ["find", "written_up_to"]


async def find(store: EventStore, write: Write) -> Appended | Expected:
    """Where an append of unknown outcome is in the log; if it is not, the version to append at. Raises
    `StreamDeleted`, `StoreUnavailable`."""
    if not write.events:
        return write.expected
    wanted = write.events[-1].id.bytes
    deleted: StreamDeleted | None = None
    newest, whole = -1, False
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


async def written_up_to(store: EventStore, part: StreamAppend[EventData]) -> int | None:
    """Return the version of the last of these events if the stream has them just where they are expected to begin."""
    if not part.events or not (isinstance(part.expected, int) or part.expected is NO_STREAM):
        return None
    start = (part.expected if isinstance(part.expected, int) else -1) + 1
    with suppress(StreamNotFound, StreamDeleted, StoreUnavailable):
        found = [event.id async for event in store.read_stream(part.stream, start=start, limit=len(part.events))]
        if found == [event.id for event in part.events]:
            return start + len(found) - 1
    return None

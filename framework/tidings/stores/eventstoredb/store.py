"""The store on EventStoreDB and KurrentDB, by gRPC. It knows events and no frames, and reads and writes at the leader.

Addresses, discovery, TLS, credentials and what is rare (delete, tombstone) are esdbclient's own; the two hot calls,
Read and BatchAppend, run on `grpc_h2`. A lost connection is made again behind the scenes, for `seconds`; then it is
`StoreUnavailable`. Everything that can be repaired at the server is that, too, a refused password included: who tries
again will succeed then.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Final
from uuid import UUID, uuid4

import structlog

import tidings.stores.eventstoredb.wire as wire
from tidings.errors import PartlyRepeated, StoreUnavailable, StreamDeleted, StreamNotFound, WrongExpectedVersion
from tidings.stores import (
    ANY,
    EVERYTHING,
    NO_STREAM,
    STREAM_EXISTS,
    Ability,
    Appended,
    AppendedSeveral,
    CaughtUp,
    Checkpoint,
    EventData,
    EventStore,
    Expected,
    Filter,
    RecordedEvent,
    StreamAppend,
    StreamMetadata,
)
from tidings.stores.eventstoredb.access import close_identity, document_with_access
from tidings.stores.eventstoredb.appends import Appends
from tidings.stores.eventstoredb.finding import find, repeated
from tidings.stores.eventstoredb.grpc import Connection
from tidings.stores.eventstoredb.grpc_call import CallFailed, ConnectionLost
from tidings.stores.eventstoredb.leader import LOG_STREAM, Leader, Trying, raise_refused
from tidings.stores.eventstoredb.revived import AGAIN_SECONDS, Revived
from tidings.stores.eventstoredb.several import Several
from tidings.stores.metadata import check_closing, check_metadata_write, is_metadata_stream
from tidings.stores.rules import METADATA, document_of
from tidings.stores.several import checked_several, too_large
from tidings.stores.table import as_expected

__all__ = ["EventStoreDB", "open_eventstoredb"]

log = structlog.get_logger("tidings.stores.eventstoredb")

QUIET_SECONDS: Final = 1.0
"""A subscription on which nothing has come for so long is probed."""


async def open_eventstoredb(url: str) -> EventStore:
    """The store that `url` names, in EventStoreDB's own scheme: `esdb://user:password@host:2113?tlsCaFile=...`,
    `esdb://host:2113?tls=false`, `esdb+discover://...`; `kurrentdb://` and `kdb://` mean the same. It connects on use.

    Of its options `DefaultDeadline` (seconds) is how long a call and the search for a server may take, and
    `KeepAliveInterval` and `KeepAliveTimeout` (milliseconds) when a silent server is given up. Raises
    `ConfigurationError`.
    """
    return EventStoreDB(url)


class EventStoreDB:
    """`EventStore` on one node or a cluster. It belongs to the event loop in which it was opened; close it there."""

    def __init__(self, url: str) -> None:
        self._leader = Leader(url)
        self._appends = Appends(self._leader, partial(find, self))
        self._several = Several(self._leader, partial(find, self))
        self._metadata_writes = asyncio.Lock()
        self._revived = Revived()
        self._task = asyncio.create_task(self._appends.run(), name="tidings-eventstoredb-appends")

    def __repr__(self) -> str:
        return f"EventStoreDB({self._leader.place})"

    @property
    def connections(self) -> set[Connection]:
        """Those open now, for tests that look at them."""
        return self._leader.connections

    # ---- writing -------------------------------------------------------------------------

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        events = tuple(events)
        size = wire.check_events(stream, events)
        self._leader.check_usable()
        wire.check_expected(expected)
        if isinstance(expected, int) and expected < 0:  # what `Appended.version` says of a stream without events
            expected = NO_STREAM
        try:
            if not is_metadata_stream(stream):
                appended = await self._appends.submit(stream, events, expected, size)
                if events:
                    self._revived.appended(stream)
                return appended
            check_metadata_write(stream, events)
            async with self._metadata_writes:  # keeps the order in which they began
                await self._check_not_tombstoned(stream)
                answer = self._appends.submit(stream, events, expected, size)
            return await answer
        except StreamDeleted:
            if expected is STREAM_EXISTS:
                raise await self._how_deleted(stream) from None
            raise

    async def append_several(self, appends: Sequence[StreamAppend[EventData]]) -> AppendedSeveral:
        asked, size = checked_several(appends, wire.check_events)
        if size > wire.EVENT_LIMIT:
            raise too_large(asked, size, wire.EVENT_LIMIT, "Tidings' own")
        self._leader.check_usable()
        for part in asked:
            wire.check_expected(part.expected)
        parts = {part.stream: part._replace(expected=as_expected(part.expected)) for part in asked}
        try:
            appended = await self._several.append([*parts.values()])
        except (PartlyRepeated, WrongExpectedVersion) as error:
            appended = await repeated(self, parts, error)
        for stream in appended.versions:
            self._revived.appended(stream)
        return appended

    async def abilities(self) -> frozenset[Ability]:
        return frozenset({Ability.APPEND_SEVERAL}) if await self._several.offered() else frozenset()

    async def _check_not_tombstoned(self, metadata_stream: str) -> None:
        """Metadata of a tombstoned stream is refused here: the server refuses it too, and can end over what follows."""
        try:
            async for _ in self.read_stream(metadata_stream.removeprefix("$$"), limit=1):
                break
        except StreamDeleted as error:
            raise StreamDeleted(metadata_stream, tombstoned=error.tombstoned) from None
        except (StreamNotFound, StoreUnavailable):  # who may write metadata need not be allowed to read the stream
            pass

    async def _how_deleted(self, stream: str) -> StreamDeleted:
        """EventStoreDB answers `STREAM_EXISTS` alike for both; reading tells them apart."""
        try:
            async for _ in self.read_stream(stream, limit=1):
                break
        except StreamDeleted as error:
            return error
        except StreamNotFound:
            pass
        return StreamDeleted(stream, tombstoned=False)

    async def set_metadata(self, stream: str, values: Mapping[str, Any], *, expected: Expected = ANY) -> Appended:
        wire.check(stream)
        document = document_with_access(stream, values, self._leader.user)
        try:
            return await self.append(f"$${stream}", [EventData(METADATA, document)], expected=expected)
        except StreamDeleted as error:
            raise StreamDeleted(stream, tombstoned=error.tombstoned) from None

    async def delete(self, stream: str, *, expected: Expected = ANY) -> None:
        await self._rare(stream, expected, self._leader.client.delete_stream)
        self._revived.deleted(stream)

    async def tombstone(self, stream: str, *, expected: Expected = ANY) -> None:
        await self._rare(stream, expected, self._leader.client.tombstone_stream)

    async def _rare(self, stream: str, expected: Expected, operation: Callable[..., Awaitable[object]]) -> None:
        """By the client, which repeats what failed once: both operations may be repeated."""
        wire.check(stream)
        check_closing(stream)
        leader = self._leader
        await leader.persistently(_nothing)
        version = wire.client_version(NO_STREAM if expected == -1 else expected)
        try:
            async with asyncio.timeout(2 * leader.seconds):
                await operation(stream, current_version=version, timeout=leader.seconds / 2)
        except Exception as error:
            raise wire.refused_deletion(error, stream, expected) or StoreUnavailable(
                f"EventStoreDB at {self._leader.place} did not delete stream {stream!r}: {error!r}"
            ) from error

    # ---- reading -------------------------------------------------------------------------

    async def read_stream(
        self, stream: str, *, start: int | None = None, backwards: bool = False, limit: int | None = None
    ) -> AsyncIterator[RecordedEvent]:
        wire.check(stream)
        if start is not None and start < 0:
            if backwards:
                limit, start = 0, None
            else:
                start = 0
        left = None if limit is None else max(limit, 1)  # a count of 0 is an error there, a missing stream is one here
        trying = Trying(self._leader)
        while True:
            try:
                request = wire.read_stream_request(stream, start, backwards=backwards, count=left)
                async with aclosing(self._responses(request, trying)) as source:
                    async for responses in source:
                        for response in responses:
                            if response.HasField("event"):
                                event = wire.recorded(response.event.event)
                                if limit == 0:
                                    return
                                yield event
                                start = event.version + (-1 if backwards else 1)
                                if left is not None:
                                    left -= 1
                            elif response.HasField("stream_not_found"):
                                raise StreamNotFound(stream)
                return
            except StreamNotFound:
                if not self._revived.doubts(stream):
                    raise
                await asyncio.sleep(AGAIN_SECONDS)
            except (CallFailed, ConnectionLost) as error:
                raise_refused(error, stream)
                await trying.again(error)
                if left == 0 or (start is not None and start < 0):
                    return

    async def read_all(
        self, *, after: int = -1, backwards: bool = False, limit: int | None = None, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent]:
        served, left, before, place = wire.served(filter), limit, -1, after
        trying = Trying(self._leader)
        while left is None or left > 0:
            # Forwards the place itself is sent once more; backwards, after a loss, the whole end is.
            count = left + 1 if left is not None and served and before < 0 else None
            try:
                request = wire.read_all_request(place, filter, backwards=backwards, count=count)
                async with aclosing(self._responses(request, trying)) as source:
                    async for responses in source:
                        for response in responses:
                            if not response.HasField("event"):
                                continue
                            event = wire.recorded(response.event.event)
                            position = event.position
                            if position <= after:
                                if backwards:
                                    return
                                continue
                            if (before >= 0 and position >= before) or not (served or filter.matches(event)):
                                continue
                            yield event
                            if backwards:
                                before = position
                            else:
                                after = place = position
                            if left is not None:
                                left -= 1
                                if not left:
                                    return
                return
            except (CallFailed, ConnectionLost) as error:
                if backwards or not wire.is_no_record(str(error)):
                    await trying.again(error)
                else:
                    place = await self._record_below(place)

    async def _record_below(self, position: int) -> int:
        """Return the last event's position below one at which nothing begins. It reads back from the end of the log."""
        async for event in self.read_all(backwards=True):
            if event.position < position:
                return event.position
        return -1

    async def subscribe_all(
        self, *, after: int = -1, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent | Checkpoint | CaughtUp]:
        served, at, told = wire.served(filter), after, False
        suspected: int | None = None
        trying = Trying(self._leader)
        while True:
            try:
                request = wire.read_all_request(at, filter, subscribe=True)
                async with aclosing(self._responses(request, trying, quiet=QUIET_SECONDS)) as source:
                    async for responses in source:
                        if not responses:  # nothing came: did nothing happen?
                            head = await self.head()
                            waiting = [event async for event in self.read_all(after=at, filter=filter, limit=1)]
                            if waiting:
                                if suspected == at:
                                    raise ConnectionLost(
                                        f"the subscription does not bring what is behind position {at}"
                                    )
                                suspected = at
                            elif head > at:
                                at = head
                                yield Checkpoint(at)
                            if not (waiting or told):
                                told = True
                                yield CaughtUp(at)
                        for response in responses:
                            if response.HasField("event"):
                                event = wire.recorded(response.event.event)
                                if event.position > at:
                                    at = event.position
                                    if served or filter.matches(event):
                                        yield event
                            elif response.HasField("checkpoint"):
                                position = response.checkpoint.commit_position
                                if position > at and await self._leader.reaches(position):
                                    at = position
                                    yield Checkpoint(at)
                            elif response.HasField("caught_up"):
                                position = wire.caught_up_at(response.caught_up) or 0
                                if position > at and await self._leader.reaches(position):
                                    at = position
                                    yield Checkpoint(at)
                                told = True
                                yield CaughtUp(at)
                raise ConnectionLost("the server ended the subscription")
            except (CallFailed, ConnectionLost) as error:
                await trying.again(error)

    async def subscribe_stream(
        self, stream: str, *, after_version: int = -1
    ) -> AsyncIterator[RecordedEvent | CaughtUp]:
        wire.check(stream)
        version, position, told = after_version, -1, False
        suspected: int | None = None
        trying = Trying(self._leader)
        while True:
            try:
                start = None if version < 0 else version
                request = wire.read_stream_request(stream, start, subscribe=True)
                async with aclosing(self._responses(request, trying, quiet=QUIET_SECONDS)) as source:
                    async for responses in source:
                        if not responses:  # is anybody there, and is there something that should have come?
                            waiting = await self._is_behind(stream, version)
                            if waiting and suspected == version:
                                raise ConnectionLost(
                                    f"the subscription does not bring what is behind version {version}"
                                )
                            suspected = version if waiting else None
                            if not (waiting or told):
                                told = True
                                yield CaughtUp(position)
                        for response in responses:
                            if response.HasField("event"):
                                event = wire.recorded(response.event.event)
                                if event.version > version:
                                    version, position = event.version, event.position
                                    yield event
                            elif response.HasField("caught_up"):
                                told = True
                                yield CaughtUp(position)
                raise ConnectionLost("the server ended the subscription")
            except (CallFailed, ConnectionLost) as error:
                raise_refused(error, stream)
                await trying.again(error)

    async def _is_behind(self, stream: str, version: int) -> bool:
        """There is an event of the stream behind that version."""
        with suppress(StreamNotFound, StreamDeleted):
            async for _ in self.read_stream(stream, start=version + 1, limit=1):
                return True
        return False

    async def head(self) -> int:
        return await self._leader.persistently(self._leader.head)

    async def log_id(self) -> UUID:
        leader = self._leader
        await leader.persistently(_nothing)
        if leader.log is None:
            identity = uuid4()
            event = EventData("tidings_LogCreated", json.dumps({"log": str(identity)}).encode(), id=identity)
            with suppress(WrongExpectedVersion, StreamDeleted):  # somebody else was first, or did harm
                await self.append(LOG_STREAM, [event], expected=NO_STREAM)
                await close_identity(self)
            leader.log = await leader.persistently(leader.identity)
            if leader.log is None:
                raise StoreUnavailable(
                    f"the first event of stream {LOG_STREAM!r}, the log's identity, cannot be read: it was deleted, or "
                    "the user may not read it. Positions of a log without identity mean nothing: restore a backup"
                )
        return leader.log

    async def get_metadata(self, stream: str) -> StreamMetadata:
        wire.check(stream)
        try:
            async for event in self.read_stream(f"$${stream}", backwards=True, limit=1):
                return StreamMetadata(document_of(event.data), event.version)
        except StreamNotFound:
            pass
        except StreamDeleted as error:
            raise StreamDeleted(stream, tombstoned=error.tombstoned) from None
        return StreamMetadata({}, -1)

    # ---- calls ---------------------------------------------------------------------------

    async def _responses(
        self, request: bytes, trying: Trying, *, quiet: float | None = None
    ) -> AsyncGenerator[list[wire.Response], None]:
        """What a Read brings, many at a time. With `quiet`, an empty list when nothing came for so many seconds.

        A call that brings nothing for long is checked on by another one: a stopped server leaves it hanging for ever.
        """
        leader, parse = self._leader, wire.Response.FromString
        leader.check_usable()
        connection = await leader.connected()
        with await leader.call(wire.READ, connection) as call:
            call.send(request, end=True)
            while True:
                trying.check()
                try:
                    async with asyncio.timeout(quiet or leader.seconds / 2):
                        messages = await call.receive()
                except TimeoutError:
                    if quiet is None:
                        await leader.identity(connection)  # is anybody there?
                    else:
                        yield []
                    continue
                trying.progressed()
                if not messages:
                    return
                yield [parse(message) for message in messages]

    async def close(self) -> None:
        """End: appends that began are finished, reads and subscriptions raise `StoreUnavailable` at their next step.

        May be called again, also when the first time was cancelled: that gives up the appends at once.
        """
        leader, appends = self._leader, self._appends
        leader.closed = True
        try:
            await appends.finish(leader.seconds)
        finally:
            self._task.cancel()
            appends.fail(
                StoreUnavailable(
                    "the event store was closed before the append was answered: it may or may not have happened"
                )
            )
        await asyncio.wait([self._task])
        await leader.close()


async def _nothing(connection: object) -> None:
    """What needs the connection only, or that there was one."""

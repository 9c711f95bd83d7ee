"""EventStoreDB's service `Streams`: append, delete, tombstone; reads and subscriptions are next door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from tidings.errors import WrongExpectedVersion
from tidings.server.batches import UnderWay, batch_append
from tidings.server.calls import Call, Method, Send
from tidings.server.group_settings import ALL
from tidings.server.log import ServedLog
from tidings.server.pages import Pages
from tidings.server.protocol import shared, streams
from tidings.server.reads import read_all, read_stream
from tidings.server.refusals import invalid_argument, let_go, thrown, too_large, wrong_version
from tidings.server.releases import EVENTSTOREDB, Release
from tidings.server.security import Access
from tidings.server.subscriptions import follow_all, follow_stream
from tidings.server.wire import cost_of, encoder, event_data, expected_code, expected_version, stream_name, written_name
from tidings.stores import ANY, NO_STREAM, OCTETS, STREAM_EXISTS, Appended, EventData, Expected
from tidings.stores.rules import METADATA, STREAM_DELETED
from tidings.stores.sqlite.store import SqliteStore
from tidings.stores.table import Kind

__all__ = ["Streams", "Wanted"]

Wanted = Callable[[str, bool], Awaitable[None]]
"""Told which stream is about to be read, and whether its links are to be resolved."""

SERVICE: Final = "/event_store.client.streams.Streams"
_NOTHING: Final = shared.Empty()


class Streams:
    """The service on one log."""

    def __init__(
        self,
        store: SqliteStore,
        log: ServedLog,
        access: Access,
        wanted: Wanted,
        *,
        strict: bool = False,
        release: Release = EVENTSTOREDB,
    ) -> None:
        self._store = store
        self._log = log
        self._access = access
        self._wanted = wanted
        self._under_way = UnderWay() if strict else None
        self._release = release

    def methods(self) -> list[Method]:
        return [
            Method(f"{SERVICE}/Read", streams.ReadReq, streaming=self.read, endless=True),
            Method(f"{SERVICE}/Append", streams.AppendReq, unary=self.append, requests_stream=True),
            Method(f"{SERVICE}/BatchAppend", streams.BatchAppendReq, streaming=self.batch_append, requests_stream=True),
            Method(f"{SERVICE}/Delete", streams.DeleteReq, unary=self.delete),
            Method(f"{SERVICE}/Tombstone", streams.TombstoneReq, unary=self.tombstone),
        ]

    # ---- reading

    async def read(self, request: Any, call: Call, send: Send) -> None:
        options = request.options
        uuids = options.uuid_option.WhichOneof("content") if options.HasField("uuid_option") else None
        if not request.HasField("options") or not options.HasField("uuid_option"):
            raise invalid_argument("'None' is not a valid uuid_option")
        encode = encoder(uuids != "string")
        kind = options.WhichOneof("stream_option"), options.WhichOneof("count_option")
        filtered = options.WhichOneof("filter_option")
        backwards = options.read_direction == streams.ReadReq.Options.Backwards
        if filtered is None or None in kind or (kind[0] == "stream" and filtered == "filter"):
            raise invalid_argument(f"The combination of {(*kind, options.read_direction, filtered)} is invalid.")
        stream = stream_name(options.stream.stream_identifier) if kind[0] == "stream" else ALL
        await self._access.check(call.user, "$r", stream)
        reader = self._access.reader(call.user)
        await self._wanted(stream, options.resolve_links)
        pages = Pages(call.charge)
        if kind == ("stream", "count"):
            await read_stream(self._log, options, encode, send, reader, pages)
        elif kind == ("all", "count"):
            await read_all(self._log, options, encode, send, reader, pages)
        elif backwards:
            raise invalid_argument(f"The combination of {(*kind, options.read_direction, filtered)} is invalid.")
        else:
            follow = follow_stream if kind[0] == "stream" else follow_all
            await follow(self._log, options, encode, send, reader, pages)

    # ---- writing

    async def append(self, requests: AsyncIterator[Any], call: Call) -> Any:
        options = None
        events: list[EventData] = []
        release = self._release
        size = data = 0
        async for request in requests:
            content = request.WhichOneof("content")
            if options is None:
                if content != "options":
                    raise thrown()
                options = request.options
                await self._access.check(call.user, "$w", written_name(options.stream_identifier))
            elif content != "proposed_message":
                raise thrown()
            else:
                event = event_data(request.proposed_message)
                size += cost_of(event)
                data += len(event.data)
                if data > release.data:
                    raise too_large(release.data)
                if size > release.whole:
                    raise too_large(release.whole, whole=True)
                if call.charge is not None:
                    await call.charge.wait_for(cost_of(event))  # until the call ends
                events.append(event)
        if options is None:
            raise thrown()
        stream, expected = stream_name(options.stream_identifier), expected_version(options)
        before = self._store.heard
        try:
            outcome = self._store.begin(Kind.APPEND, stream, events, expected)
            if call.charge is not None:
                call.charge.until(outcome, size)
            appended = await asyncio.shield(outcome)  # it is written, whether or not its client waits for that
        except WrongExpectedVersion as error:
            let_go(error)
            return _refused(expected, error.actual)
        # EventStoreDB does not say where a repeated event is when nobody can read it any more.
        hidden = bool(events) and appended.position <= before
        hidden = hidden and not await self._log.is_readable(stream, appended.version)
        return _accepted(appended, hidden)

    async def batch_append(self, requests: AsyncIterator[Any], call: Call, send: Send) -> None:
        await batch_append(self._log, self._access, call, requests, send, self._release, self._under_way)

    async def delete(self, request: Any, call: Call) -> Any:
        appended = await self._close(call, request.options, Kind.DELETE, EventData(METADATA, b""))
        position = streams.DeleteResp.Position(commit_position=appended.position, prepare_position=appended.position)
        return streams.DeleteResp(position=position)

    async def tombstone(self, request: Any, call: Call) -> Any:
        event = EventData(STREAM_DELETED, b"", content_type=OCTETS)
        appended = await self._close(call, request.options, Kind.TOMBSTONE, event)
        position = streams.TombstoneResp.Position(commit_position=appended.position, prepare_position=appended.position)
        return streams.TombstoneResp(position=position)

    async def _close(self, call: Call, options: Any, kind: Kind, event: EventData) -> Appended:
        stream, expected = written_name(options.stream_identifier), expected_version(options)
        await self._access.check(call.user, "$d", stream)
        try:
            return await self._store.begin(kind, stream, [event], expected)
        except WrongExpectedVersion as error:
            raise wrong_version("Delete", stream, expected_code(expected), error.actual) from None


def _accepted(appended: Appended, hidden: bool) -> Any:
    success = streams.AppendResp.Success()
    if hidden:
        success.no_position.CopyFrom(_NOTHING)
    else:
        success.position.commit_position = success.position.prepare_position = appended.position
    if appended.version < 0:
        success.no_stream.CopyFrom(_NOTHING)
    else:
        success.current_revision = appended.version
    return streams.AppendResp(success=success)


def _refused(expected: Expected, actual: int) -> Any:
    """An append that expected another version is answered, not failed. Old clients look at the old fields."""
    wrong = streams.AppendResp.WrongExpectedVersion()
    if actual < 0:
        wrong.current_no_stream.CopyFrom(_NOTHING)
        wrong.no_stream_20_6_0.CopyFrom(_NOTHING)
    else:
        wrong.current_revision = wrong.current_revision_20_6_0 = actual
    if isinstance(expected, int):
        wrong.expected_revision = wrong.expected_revision_20_6_0 = expected
    elif expected is ANY:
        wrong.expected_any.CopyFrom(_NOTHING)
        wrong.any_20_6_0.CopyFrom(_NOTHING)
    elif expected is STREAM_EXISTS:
        wrong.expected_stream_exists.CopyFrom(_NOTHING)
        wrong.stream_exists_20_6_0.CopyFrom(_NOTHING)
    elif expected is NO_STREAM:
        wrong.expected_no_stream.CopyFrom(_NOTHING)
    return streams.AppendResp(wrong_expected_version=wrong)

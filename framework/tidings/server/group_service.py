"""EventStoreDB's service `PersistentSubscriptions`: the register of groups, and their consumers' calls.

The register lies in the log: every change of it is an event with all groups.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Final

import structlog

from tidings.errors import StreamDeleted, StreamNotFound
from tidings.server.calls import Call, Method, Send
from tidings.server.group_delivery import Consumer, Item
from tidings.server.group_settings import ALL, GroupSettings, source_of
from tidings.server.groups import Group
from tidings.server.log import ServedLog
from tidings.server.permissions import Reader
from tidings.server.protocol import packed, persistent, shared
from tidings.server.refusals import group_exists, group_failed, group_missing, invalid_argument, shown, thrown
from tidings.server.security import Access
from tidings.server.stored import entries_of
from tidings.server.streams import Wanted
from tidings.server.wire import Malformed, Resolved, group_encoder, stream_name, uuid_of
from tidings.stores import EventData
from tidings.stores.rules import document_of
from tidings.stores.sqlite.store import SqliteStore

__all__ = ["PersistentSubscriptions"]

log = structlog.get_logger(__name__)

SERVICE: Final = "/event_store.client.persistent_subscriptions.PersistentSubscriptions"
CONFIG_STREAM: Final = "$persistentSubscriptionConfig"
CONFIG_TYPE: Final = "$PersistentConfig"


class PersistentSubscriptions:
    """The service on one log. Groups run in `tasks`, from `load` on."""

    def __init__(
        self, store: SqliteStore, served: ServedLog, access: Access, wanted: Wanted, tasks: asyncio.TaskGroup
    ) -> None:
        self._store = store
        self._access = access
        self._wanted = wanted
        self._log = served
        self._tasks = tasks
        self._groups: dict[str, Group] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._changing = asyncio.Lock()

    def methods(self) -> list[Method]:
        return [
            Method(f"{SERVICE}/Create", persistent.CreateReq, unary=self.create),
            Method(f"{SERVICE}/Update", persistent.UpdateReq, unary=self.update),
            Method(f"{SERVICE}/Delete", persistent.DeleteReq, unary=self.delete),
            Method(f"{SERVICE}/Read", persistent.ReadReq, streaming=self.read, requests_stream=True, endless=True),
            Method(f"{SERVICE}/GetInfo", persistent.GetInfoReq, unary=self.get_info),
            Method(f"{SERVICE}/ReplayParked", persistent.ReplayParkedReq, unary=self.replay_parked),
            Method(f"{SERVICE}/List", persistent.ListReq, unary=self.list),
            Method(f"{SERVICE}/RestartSubsystem", shared.Empty, unary=self.restart),
        ]

    # ---- the register

    async def load(self) -> None:
        """Start the groups that the log knows."""
        with suppress(StreamNotFound, StreamDeleted):
            async for event in self._store.read_stream(CONFIG_STREAM, backwards=True, limit=1):
                for entry in entries_of(document_of(event.data), "entries"):
                    try:
                        settings = GroupSettings.of_entry(entry)
                    except Malformed as error:  # it is data, which never stops a start
                        advice = "create the persistent subscription again"
                        log.error("group.unreadable", entry=shown(repr(entry)), reason=str(error), advice=advice)
                    else:
                        self._start(settings)

    def _start(self, settings: GroupSettings) -> Group:
        group = self._groups[settings.key] = Group(settings, self._store, self._log)
        self._running[settings.key] = self._tasks.create_task(group.run())
        return group

    async def _stop(self, key: str) -> None:
        task = self._running.pop(key)
        task.cancel()
        await asyncio.wait([task])

    async def stop(self) -> None:
        """Stop all of them; they are as they were when they are loaded again."""
        for key in list(self._running):
            await self._stop(key)
        self._groups.clear()

    async def _save(self, entries: dict[str, GroupSettings], user: str) -> None:
        document = {
            "version": "2",
            "updated": datetime.now(UTC).isoformat(),
            "updatedBy": user or "anonymous",
            "entries": [settings.entry() for settings in entries.values()],
        }
        await self._store.append(CONFIG_STREAM, [EventData(CONFIG_TYPE, json.dumps(document).encode())])

    def _entries(self) -> dict[str, GroupSettings]:
        return {key: group.settings for key, group in self._groups.items()}

    def _group(self, stream: str, name: str) -> Group:
        try:
            return self._groups[f"{stream}::{name}"]
        except KeyError:
            raise group_missing(stream, name) from None

    async def _end(self, stream: str) -> int:
        return await (self._log.head() if stream == ALL else self._log.last_version(stream))

    async def create(self, request: Any, call: Call) -> Any:
        self._access.check_operator(call.user)
        options = request.options
        stream, name = source_of(options), options.group_name
        async with self._changing:
            if f"{stream}::{name}" in self._groups:
                raise group_exists(stream, name)
            end = await self._end(stream)
            settings = GroupSettings.of_request(options, end)
            if stream == ALL and settings.start > end:
                raise group_failed(
                    stream, name, f"'C:{settings.start}/P:{settings.start}' is beyond the last position of $all."
                )
            await self._wanted(stream, settings.resolve_links)
            await self._save(self._entries() | {settings.key: settings}, call.user)
            group = self._start(settings)
        await group.ready.wait()
        return persistent.CreateResp()

    async def update(self, request: Any, call: Call) -> Any:
        self._access.check_operator(call.user)
        options = request.options
        stream = source_of(options)
        async with self._changing:
            former = self._group(stream, options.group_name)
            settings = GroupSettings.of_request(options, await self._end(stream), former.settings)
            await self._save(self._entries() | {settings.key: settings}, call.user)
            await self._stop(settings.key)
            group = self._start(settings)
        await group.ready.wait()
        return persistent.UpdateResp()

    async def delete(self, request: Any, call: Call) -> Any:
        self._access.check_operator(call.user)
        options = request.options
        async with self._changing:
            group = self._group(source_of(options), options.group_name)
            key = group.settings.key
            entries = self._entries()
            del entries[key]
            await self._save(entries, call.user)
            await self._stop(key)
            del self._groups[key]
            await group.forget()
        return persistent.DeleteResp()

    async def restart(self, request: Any, call: Call) -> Any:
        self._access.check_operator(call.user)
        async with self._changing:
            await self.stop()
            await self.load()
        return shared.Empty()

    # ---- description

    async def get_info(self, request: Any, call: Call) -> Any:
        self._access.check_operator(call.user)
        group = self._group(source_of(request.options), request.options.group_name)
        return persistent.GetInfoResp(subscription_info=await group.info())

    async def list(self, request: Any, call: Call) -> Any:
        self._access.check_operator(call.user)
        options = request.options
        kind = options.WhichOneof("list_option")
        if kind is None:
            raise thrown()
        groups = [*self._groups.values()]
        if kind == "list_for_stream":
            wanted = options.list_for_stream
            stream = ALL if wanted.WhichOneof("stream_option") == "all" else stream_name(wanted.stream)
            groups = [group for group in groups if group.settings.stream == stream]
            if not groups:
                raise group_missing(stream, "")
        return persistent.ListResp(subscriptions=[await group.info() for group in groups])

    async def replay_parked(self, request: Any, call: Call) -> Any:
        self._access.check_operator(call.user)
        options = request.options
        group = self._group(source_of(options), options.group_name)
        stop_at = options.stop_at if options.WhichOneof("stop_at_option") == "stop_at" else None
        if stop_at is not None and stop_at < 0:
            reason = "Cannot stop replaying parked message at a negative version."
            raise group_failed(group.settings.stream, group.settings.group, reason)
        group.replay(stop_at)
        return persistent.ReplayParkedResp()

    # ---- consumers

    async def read(self, requests: AsyncIterator[Any], call: Call, send: Send) -> None:
        async for request in requests:
            options = request.options
            break
        else:
            return
        if request.WhichOneof("content") != "options":
            raise thrown()
        if not options.HasField("uuid_option"):
            raise invalid_argument("'None' is not a valid uuid_option")
        encode = group_encoder(options.uuid_option.WhichOneof("content") != "string")
        await self._access.check(call.user, "$r", source_of(options))
        reader = self._access.reader(call.user)
        group = self._group(source_of(options), options.group_name)
        user, name = call.user, call.connection_name or "<unknown>"
        consumer = Consumer(options.buffer_size, name, call.peer, user)
        confirmation = persistent.ReadResp.SubscriptionConfirmation(subscription_id=group.settings.key)
        async with _joined(group, consumer) as signal, asyncio.TaskGroup() as tasks:
            await send([packed(persistent.ReadResp(subscription_confirmation=confirmation))])
            tasks.create_task(_answers(group, consumer, requests))
            while True:
                await signal.wait()
                signal.clear()
                group.check_dropped()
                outbox = consumer.outbox
                while outbox:
                    # A client that reads slowly keeps the rest here, where it is counted against its slots.
                    item = outbox.popleft()
                    await send([encode(await self._visible(reader, item), item.retries)])

    async def _visible(self, reader: Reader | None, item: Item) -> Resolved:
        """What the consumer's user may see of the item: without the right to read its target, the link alone."""
        event, link = item.resolved
        if reader is None or event is None or link is None or await self._log.may_read(reader, event.stream):
            return event, link
        return None, link


@asynccontextmanager
async def _joined(group: Group, consumer: Consumer) -> AsyncIterator[asyncio.Event]:
    signal = group.join(consumer)
    try:
        yield signal
    finally:
        group.leave(consumer)


async def _answers(group: Group, consumer: Consumer, requests: AsyncIterator[Any]) -> None:
    """What the consumer says of the events that it got. That it says no more is not the end of the call."""
    async for request in requests:
        kind = request.WhichOneof("content")
        if kind == "ack":
            group.ack(consumer, [uuid_of(id_).bytes for id_ in request.ack.ids])
        elif kind == "nack":
            ids = [uuid_of(id_).bytes for id_ in request.nack.ids]
            group.nack(consumer, ids, request.nack.action, request.nack.reason)
        else:
            raise thrown()

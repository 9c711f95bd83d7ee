"""A persistent subscription at work: reads its source, writes checkpoints and parked events. It talks to no client.

All that must survive lies in the log, in the streams that EventStoreDB uses for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Final

import structlog

from tidings.errors import StoreError, StoreUnavailable, StreamDeleted, StreamNotFound, WrongExpectedVersion
from tidings.server.group_delivery import Consumer, Delivery, Item, Mark
from tidings.server.group_settings import GroupSettings, position_of, position_text
from tidings.server.log import LINK, ServedLog
from tidings.server.protocol import persistent
from tidings.server.refusals import Refusal, group_dropped, group_full
from tidings.stores import ANY, OCTETS, EventData
from tidings.stores.rules import MAX_VERSION, document_of
from tidings.stores.sqlite.store import SqliteStore
from tidings.stores.table import View

__all__ = ["Group"]

log = structlog.get_logger(__name__)

TICK: Final = 1.0
"""Seconds between looks at what is late: EventStoreDB's own."""
_LIVE: Final = View(0, MAX_VERSION - 1, 0)
"""Every event of a stream but its tombstone."""
BUFFERED_BYTES: Final = 8 * 1024 * 1024
"""Bytes of events that no consumer has yet, at which the source is not read further."""


class Group:
    """One group. `run` is its life; consumers join and leave meanwhile."""

    def __init__(self, settings: GroupSettings, store: SqliteStore, served: ServedLog) -> None:
        self.settings = settings
        self._store = store
        self._log = served
        prefix = f"$persistentsubscription-{settings.key}"
        self.checkpoint_stream = f"{prefix}-checkpoint"
        self.parked_stream = f"{prefix}-parked"
        self._delivery = self._fresh(Mark(settings.after, 0))
        self._live = False
        self.ready = asyncio.Event()
        """It has begun to read its source."""
        self._loaded_once = asyncio.Event()
        """It knows its checkpoint, or never will."""
        self._room = asyncio.Event()
        self._work: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._signals: dict[Consumer, asyncio.Event] = {}
        self._saved = Mark(-1, 0)
        self._saved_at = monotonic()
        self._stored = -1
        """What the log holds as checkpoint; `_saved` may still be on its way."""
        self._dropped: Refusal | None = None

    def _fresh(self, start: Mark) -> Delivery:
        settings = self.settings
        return Delivery(settings.strategy, settings.max_retry_count, settings.message_timeout / 1000, start)

    # ---- its life

    async def run(self) -> None:
        """Until it is cancelled; consumers that are still there then are dropped."""
        try:
            after = await self._loaded()
            self._delivery.reached = Mark(self.settings.after if after is None else after, 0)
            self._loaded_once.set()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._feed())
                tasks.create_task(self._tick())
                tasks.create_task(self._write())
        except Exception:  # a fault in one group is not to end the server
            log.exception("group.failed", group=self.settings.key, advice="update it, or restart the subsystem")
        finally:
            self._dropped = group_dropped(self.settings.stream, self.settings.group)
            self.ready.set()
            self._loaded_once.set()
            for signal in self._signals.values():
                signal.set()

    async def _loaded(self) -> int | None:
        while True:
            try:
                return await self._load_checkpoint()
            except StoreUnavailable as error:
                log.warning("group.read_failed", group=self.settings.key, reason=str(error))
                await asyncio.sleep(TICK)

    async def _feed(self) -> None:
        self._store.watch(+1)
        try:
            while True:
                room = self._capacity()
                if room <= 0:
                    self._live = False
                    self._room.clear()
                    await self._room.wait()
                    continue
                try:
                    items, reached, head = await self._read(min(room, max(self.settings.read_batch_size, 1)))
                except StoreUnavailable as error:
                    log.warning("group.read_failed", group=self.settings.key, reason=str(error))
                    await asyncio.sleep(TICK)
                    continue
                self._delivery.offer(items, reached)
                self._dispatch()
                self._live = head >= 0
                if self._live:
                    self.ready.set()
                    await self._store.beyond(head)
                elif self._capacity() <= 0:
                    self.ready.set()
        finally:
            self._store.watch(-1)

    def _capacity(self) -> int:
        if self._delivery.buffered_bytes > BUFFERED_BYTES:
            return 0
        return max(self.settings.history_buffer_size, 1) - len(self._delivery.buffer)

    async def _read(self, count: int) -> tuple[list[Item], Mark, int]:
        """New events, how far that was, and where the log's head was if this was the end (else -1)."""
        at, seen = self._delivery.reached
        items: list[Item] = []
        before = self._delivery.reached
        if self.settings.from_all:
            batch = await self._log.all(
                self.settings.choice,
                self.settings.resolve_links,
                after=at,
                before=MAX_VERSION,
                backwards=False,
                count=count,
                reader=None,
            )
            for resolved, rank in zip(batch.events, batch.after, strict=True):
                mark = Mark((resolved[1] or resolved[0]).position, seen + rank)  # type: ignore[union-attr]
                items.append(Item(resolved, mark, before))
                before = mark
            # Not the last that was considered: a piece may hold nothing but what `$all` hides.
            reached = Mark(max(batch.reached, at), seen + len(batch.considered))
            return items, reached, batch.reached if batch.end else -1
        head = await self._log.head()
        try:
            # A group at the end is given what is appended, whatever retention says of it a moment later.
            view = _LIVE if self._live else (await self._log.view(self.settings.stream))[0]
        except (StreamNotFound, StreamDeleted):
            return [], self._delivery.reached, head
        view = view._replace(first=max(view.first, at + 1))
        found, _, more = await self._log.stream(
            self.settings.stream, view, self.settings.resolve_links, backwards=False, count=count, reader=None
        )
        for resolved in found:
            seen += 1
            mark = Mark((resolved[1] or resolved[0]).version, seen)  # type: ignore[union-attr]
            items.append(Item(resolved, mark, before))
            before = mark
        return items, before, -1 if more else head

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._park(self._delivery.expired(monotonic()), f"Reached retry count of {self.settings.max_retry_count}")
            self._dispatch()
            self._consider_checkpoint(timed=True)

    async def _write(self) -> None:
        """One thing after the other: checkpoints and parked events."""
        while True:
            job = await self._work.get()
            try:
                await job()
            except StoreError as error:
                log.warning("group.write_failed", group=self.settings.key, reason=str(error))

    # ---- consumers

    def join(self, consumer: Consumer) -> asyncio.Event:
        """The event is set whenever the consumer has something in its outbox, or is dropped. Raises `Refusal`."""
        limit = self.settings.max_subscriber_count
        if limit and len(self._delivery.consumers) >= limit:
            raise group_full(self.settings.stream, self.settings.group)
        signal = self._signals[consumer] = asyncio.Event()
        self._delivery.join(consumer)
        self._dispatch()
        return signal

    def leave(self, consumer: Consumer) -> None:
        self._signals.pop(consumer, None)
        self._delivery.leave(consumer)
        self._dispatch()

    def check_dropped(self) -> None:
        """Raises `Refusal` when the group has ended."""
        if self._dropped is not None:
            raise self._dropped

    def _dispatch(self) -> None:
        self._delivery.dispatch(monotonic())
        for consumer in self._delivery.told:
            signal = self._signals.get(consumer)
            if signal is not None:
                signal.set()
        self._delivery.told.clear()
        if self._capacity() > 0:
            self._room.set()

    def ack(self, consumer: Consumer, ids: list[bytes]) -> None:
        self._delivery.done(consumer, ids)
        self._answered()

    def nack(self, consumer: Consumer, ids: list[bytes], action: int, reason: str) -> None:
        actions = persistent.ReadReq.Nack
        if action == actions.Park:
            self._park(self._delivery.park(consumer, ids), f"Client explicitly NAK'ed message.\n{reason}")
        elif action in (actions.Skip, actions.Stop):
            self._delivery.done(consumer, ids)
        else:
            exhausted = self._delivery.retry(consumer, ids)
            self._park(exhausted, f"Reached retry count of {self.settings.max_retry_count}")
        self._answered()

    def _answered(self) -> None:
        self._dispatch()
        self._consider_checkpoint(timed=False)

    # ---- checkpoints

    def _consider_checkpoint(self, *, timed: bool) -> None:
        settings, mark = self.settings, self._delivery.finished()
        count = mark.seen - self._saved.seen
        if count <= 0 or mark.at < 0:
            return
        elapsed = monotonic() - self._saved_at
        due = timed and settings.checkpoint_after and elapsed * 1000 >= settings.checkpoint_after
        if count >= max(settings.max_checkpoint_count, 1) or (due and count >= settings.min_checkpoint_count):
            self._saved, self._saved_at = mark, monotonic()
            self._work.put_nowait(lambda: self._save_checkpoint(mark.at))

    async def _save_checkpoint(self, at: int) -> None:
        first = await self._log.last_version(self.checkpoint_stream) < 0
        if first:
            await self._store.set_metadata(self.checkpoint_stream, {"$maxCount": 2})
        data = json.dumps(position_text(at, self.settings.from_all)).encode()
        await self._store.append(self.checkpoint_stream, [EventData("$SubscriptionCheckpoint", data)])
        self._stored = at

    async def _load_checkpoint(self) -> int | None:
        last = await self._last_event(self.checkpoint_stream)
        try:
            text = json.loads(last) if last else None
        except ValueError:
            return None
        at = position_of(text) if isinstance(text, str) else None
        if at is not None:
            self._saved, self._stored = Mark(at, 0), at
        return at

    async def _last_event(self, stream: str) -> bytes:
        try:
            async for event in self._store.read_stream(stream, backwards=True, limit=1):
                return event.data
        except (StreamNotFound, StreamDeleted):
            return b""
        return b""

    # ---- parking

    def _park(self, items: list[Item], reason: str) -> None:
        for item in items:
            self._work.put_nowait(lambda item=item: self._write_parked(item, reason))  # type: ignore[misc]

    async def _write_parked(self, item: Item, reason: str) -> None:
        shown, original = item.shown, item.original
        note = {
            "added": datetime.now(UTC).isoformat(),
            "reason": reason,
            "subscriptionEventNumber": original.position if self.settings.from_all else original.version,
        }
        link = EventData(LINK, f"{shown.version}@{shown.stream}".encode(), json.dumps(note).encode(), OCTETS)
        try:
            await self._store.append(self.parked_stream, [link], expected=ANY)
        except StoreError:
            self._delivery.unparked(item)
            raise
        self._delivery.parked(item)
        self._answered()

    async def parked_count(self) -> int:
        try:
            view, last = await self._log.view(self.parked_stream)
        except (StreamNotFound, StreamDeleted):
            return 0
        return max(last - view.first + 1, 0)

    def replay(self, stop_at: int | None) -> None:
        """Deliver parked events again: those before version `stop_at` of their stream. Returns before that is done."""
        self._work.put_nowait(lambda: self._replay(stop_at))

    async def _replay(self, stop_at: int | None) -> None:
        try:
            view, last = await self._log.view(self.parked_stream)
        except (StreamNotFound, StreamDeleted):
            return
        end = last if stop_at is None else min(last, stop_at - 1)
        at = view.first
        nowhere = Mark(-1, 0)
        while at <= end:
            events, version, more = await self._log.stream(
                self.parked_stream, View(at, end, view.since), True, backwards=False, count=512, reader=None
            )
            self._delivery.replay(Item(resolved, nowhere, nowhere, replayed=True) for resolved in events)
            self._dispatch()
            at = version + 1
            if not more:
                break
        document, _ = await self._metadata(self.parked_stream)
        if end >= view.first:
            await self._store.set_metadata(self.parked_stream, document | {"$tb": end + 1})

    async def _metadata(self, stream: str) -> tuple[dict[str, Any], int]:
        data = await self._last_event(f"$${stream}")
        return document_of(data), 0

    async def forget(self) -> None:
        """Softly delete what it has written for itself."""
        for stream in (self.checkpoint_stream, self.parked_stream):
            try:
                await self._store.delete(stream)
            except (WrongExpectedVersion, StreamDeleted):
                continue

    # ---- description

    async def info(self) -> Any:
        await self._loaded_once.wait()  # else a server that has just started would deny the checkpoint
        delivery, settings = self._delivery, self.settings
        info = persistent.SubscriptionInfo()
        settings.describe(info)
        info.status = "Live" if self._live else "Behind"
        if self._stored >= 0:
            info.last_checkpointed_event_position = position_text(self._stored, settings.from_all)
        if delivery.reached.at >= 0 and delivery.reached.seen:
            info.last_known_event_position = position_text(delivery.reached.at, settings.from_all)
        info.parked_message_count = await self.parked_count()
        info.read_buffer_count = len(delivery.buffer)
        info.retry_buffer_count = len(delivery.retries) + len(delivery.replays)
        info.total_in_flight_messages = info.outstanding_messages_count = delivery.unanswered
        info.total_items = sum(consumer.total for consumer in delivery.consumers)
        for consumer in delivery.consumers:
            connection = info.connections.add()
            setattr(connection, "from", consumer.peer)
            connection.username = consumer.user or "anonymous"
            connection.connection_name = consumer.name
            connection.total_items = consumer.total
            connection.available_slots = max(consumer.room, 0)
            connection.in_flight_messages = len(consumer.unanswered)
        return info

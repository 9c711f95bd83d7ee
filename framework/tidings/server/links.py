"""The system projections `$by_category` and `$by_event_type`: they follow the log and append links. No JavaScript.

A link says which position it was made for, so that after a crash the last link of a stream shows what is in it already:
every event is linked once.
"""

from __future__ import annotations

import asyncio
import json
from typing import Final

import structlog

from tidings.errors import StoreError, StreamDeleted, StreamNotFound
from tidings.server.log import LINK, ServedLog, is_system
from tidings.stores import ANY, JSON, OCTETS, EventData, RecordedEvent
from tidings.stores.rules import MAX_VERSION, document_of
from tidings.stores.sqlite.store import SqliteStore
from tidings.stores.table import Kind

__all__ = ["Linker", "category_of"]

log = structlog.get_logger(__name__)

CHECKPOINT: Final = "$projections-$links-checkpoint"
EVERY: Final = 1000
"""Events between checkpoints."""
REMEMBERED: Final = 10_000
"""Streams of links whose end is known."""
PAGE: Final = 512
PATIENCE: Final = 3.0
"""Seconds that a reader waits for links: the projections of EventStoreDB make nobody wait, but lag."""


def category_of(stream: str) -> str:
    """What stands before the first dash; empty without one."""
    category, dash, _ = stream.partition("-")
    return category if dash else ""


class Linker:
    """Follows one log and links its events, once it has begun."""

    def __init__(self, store: SqliteStore, served: ServedLog, tasks: asyncio.TaskGroup) -> None:
        self._store = store
        self._log = served
        self._tasks = tasks
        self._task: asyncio.Task[None] | None = None
        self.by_category = self.by_type = True
        self._done = -1
        """Everything up to this position is linked."""
        self._progress = asyncio.Condition()
        self._ends: dict[str, int] = {}

    def begin(self) -> None:
        """Harmless when it has begun."""
        if self._task is None or self._task.done():
            self._task = self._tasks.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def has_begun(self) -> bool:
        """In an earlier life, by what it left in the log."""
        return await self._log.last_version(CHECKPOINT) >= 0

    async def catch_up(self) -> None:
        """Wait until what is in the log now is linked; not longer than `PATIENCE`."""
        head = await self._log.head()
        try:
            async with asyncio.timeout(PATIENCE), self._progress:
                await self._progress.wait_for(lambda: self._done >= head)
        except TimeoutError:
            return

    async def _run(self) -> None:
        self._store.watch(+1)
        try:
            after = await self._checkpoint()
            if after < 0:
                await self._store.set_metadata(CHECKPOINT, {"$maxCount": 2})
                await self._save(0)
            saved = after
            while True:
                batch = await self._log.all(
                    None, False, after=after, before=MAX_VERSION, backwards=False, count=PAGE, reader=None
                )
                await self._link([event for event, _ in batch.events if event is not None])
                after = batch.reached
                if len(batch.considered) and after - saved >= EVERY * 8:
                    saved = after
                    await self._save(after)
                async with self._progress:
                    self._done = after
                    self._progress.notify_all()
                if batch.end:
                    await self._store.beyond(after)
        except StoreError as error:
            log.warning("projections.stopped", reason=str(error))
        except Exception:  # a fault here is not to end the server
            log.exception("projections.failed", advice="they begin again when one of their streams is read")
        finally:
            self._store.watch(-1)

    async def _link(self, events: list[RecordedEvent]) -> None:
        appends = []
        for event in events:
            for stream in self._targets(event):
                if await self._end(stream) < event.position:
                    self._ends[stream] = event.position
                    appends.append(self._store.begin(Kind.APPEND, stream, [_link_to(event)], ANY))
        for outcome in await asyncio.gather(*appends, return_exceptions=True):
            # Somebody closed a stream of links for ever: the others go on.
            if isinstance(outcome, BaseException) and not isinstance(outcome, StreamDeleted):
                raise outcome
        if len(self._ends) > REMEMBERED:
            self._ends.clear()

    def _targets(self, event: RecordedEvent) -> list[str]:
        """Return the streams that get a link to this event; none for the store's own.

        A category has all its events, whatever they hold; by type only events with JSON are linked.
        """
        if is_system(event):
            return []
        category = category_of(event.stream) if self.by_category else ""
        by_type = self.by_type and event.is_json and not event.type.startswith("$") and _is_json(event.data)
        return ([f"$ce-{category}"] if category else []) + ([f"$et-{event.type}"] if by_type else [])

    async def _end(self, stream: str) -> int:
        """The position for which the stream's last link was made."""
        end = self._ends.get(stream)
        if end is None:
            note = await self._last(stream)
            end = int(note[1]) if note is not None else -1
            self._ends[stream] = end
        return end

    async def _last(self, stream: str) -> tuple[bytes, int] | None:
        try:
            async for event in self._store.read_stream(stream, backwards=True, limit=1):
                made_for = document_of(event.metadata).get("$c")
                return event.data, made_for if isinstance(made_for, int) else -1
        except (StreamNotFound, StreamDeleted):
            return None
        return None

    async def _checkpoint(self) -> int:
        last = await self._last(CHECKPOINT)
        text = b"" if last is None else last[0]
        return int(text) if text.isdigit() else -1

    async def _save(self, position: int) -> None:
        await self._store.append(CHECKPOINT, [EventData("$ProjectionCheckpoint", b"%d" % position, content_type=JSON)])


def _link_to(event: RecordedEvent) -> EventData:
    note = {"$c": event.position, "$p": event.position, "$causedBy": str(event.id)}
    return EventData(LINK, f"{event.version}@{event.stream}".encode(), json.dumps(note).encode(), OCTETS)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True

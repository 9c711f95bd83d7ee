"""What a service remembers of the log, in its own database: watermarks, floor, staged events, dead letters.

Every write takes the connection of the transaction that it belongs to; nothing here begins or commits one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import Database, dead, floors, staged, watermarks
from tidings.errors import Fenced, LogChanged
from tidings.message import Message
from tidings.stores import JSON, OCTETS, EventData, RecordedEvent

__all__ = ["Inbox", "Letter", "Remembered", "StagedEvent", "recorded", "storable"]


_STAGE: Final = staged.insert()
_BURY: Final = dead.insert()


def storable(value: Any) -> Any:
    """Foreign texts (an exception's message, a header) without what databases refuse: NUL and lone surrogates."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def recorded(row: sa.Row[Any]) -> RecordedEvent:
    """The event that a held or dead row keeps."""
    return RecordedEvent(
        row.position,
        row.stream,
        row.version,
        row.type,
        row.data,
        row.metadata,
        row.is_json,
        UUID(row.event_id).bytes,
        row.ticks,
    )


class Remembered(NamedTuple):
    """The durable state of one bucket range, as found when joining."""

    floor: int
    watermarks: dict[int, int]

    @property
    def highest(self) -> int:
        """The highest position that was handled: the log cannot end below it."""
        return max(self.floor, *self.watermarks.values())


class StagedEvent(NamedTuple):
    """An emitted event that waits to be appended. `bucket` and `cause` (a position) are those of the handled event."""

    bucket: int
    cause: int
    stream: str
    event: EventData


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter: what was given up, whole, and why."""

    kind: str
    reason: str
    attempts: int = 0
    detail: str | None = None
    handler: str | None = None
    position: int | None = None
    bucket: int | None = None
    version: int | None = None
    ticks: int | None = None
    event_id: str | None = None
    stream: str | None = None
    type: str | None = None
    data: bytes | None = None
    metadata: bytes | None = None
    is_json: bool | None = None
    key: str | None = None
    holds_key: bool = False
    """Later events of the same partition key are held until this letter is retried or dropped."""

    @classmethod
    def of_event(
        cls,
        event: RecordedEvent,
        bucket: int,
        *,
        key: str,
        holds_key: bool,
        handler: str,
        attempts: int,
        reason: str,
        detail: str | None,
    ) -> Letter:
        return cls(
            "handler",
            reason,
            attempts,
            detail,
            handler,
            event.position,
            bucket,
            event.version,
            event.ticks,
            str(event.id),
            event.stream,
            event.type,
            event.data,
            event.metadata,
            event.is_json,
            key,
            holds_key,
        )

    @classmethod
    def of_message(cls, message: Message, reason: str) -> Letter:
        """A message that is not ours or cannot be read: its headers go into the detail, its body into the data."""
        headers = {str(name): repr(value)[:1000] for name, value in list(message.headers.items())[:64]}
        return cls(
            "message",
            reason,
            detail=f"message id {message.message_id!r}, headers {headers}",
            type=message.type[:1000] or None,
            data=message.body,
            is_json=message.content_type == JSON,
        )

    @classmethod
    def of_staged(cls, row: StagedEvent, attempts: int, reason: str) -> Letter:
        return cls(
            "staged",
            reason,
            attempts,
            position=row.cause,
            bucket=row.bucket,
            event_id=str(row.event.id),
            stream=row.stream,
            type=row.event.type,
            data=row.event.data,
            metadata=row.event.metadata,
            is_json=row.event.content_type == JSON,
        )


class Inbox:
    """One service's rows about one log and one range of buckets."""

    def __init__(self, database: Database, service: str, log: UUID, buckets: range) -> None:
        self._database = database
        self._service = service
        self._log = log
        self._buckets = buckets
        self._own = {"service": service, "log": str(log)}
        self._range = {"first_bucket": buckets.start, "last_bucket": buckets.stop - 1}
        self._move = (
            watermarks.update()
            .where(
                watermarks.c.service == service,
                watermarks.c.log == str(log),
                watermarks.c.bucket == sa.bindparam("of_bucket"),
                watermarks.c.position == sa.bindparam("from_position"),
            )
            .values(position=sa.bindparam("to_position"))
        )
        self._raise = (
            floors.update()
            .where(*self._floor_is_ours(), floors.c.position < sa.bindparam("to_position"))
            .values(position=sa.bindparam("to_position"))
        )
        self._unstage = staged.delete().where(
            staged.c.service == service, staged.c.log == str(log), staged.c.event_id == sa.bindparam("appended")
        )

    async def join(self) -> Remembered:
        """Read the range's state, making its rows the first time.

        Raises `LogChanged` when only another log was followed so far, `Fenced` when another process made the rows at
        the same moment.
        """
        try:
            async with self._database.transaction() as connection:
                return await self._join(connection)
        except IntegrityError as error:
            raise Fenced(f"service {self._service!r}: another process joined at the same moment") from error

    async def _join(self, connection: AsyncConnection) -> Remembered:
        logs = set(
            await connection.scalars(sa.select(floors.c.log).where(floors.c.service == self._service).distinct())
        )
        if logs and str(self._log) not in logs:
            raise LogChanged(f"service {self._service!r}", UUID(min(logs)), self._log)
        known = await connection.execute(
            sa.select(watermarks.c.bucket, watermarks.c.position).where(
                watermarks.c.service == self._service, watermarks.c.log == str(self._log)
            )
        )
        marks = {bucket: position for bucket, position in known if bucket in self._buckets}
        floor = await connection.scalar(sa.select(floors.c.position).where(*self._floor_is_ours()))
        missing = [self._own | {"bucket": bucket, "position": -1} for bucket in self._buckets if bucket not in marks]
        if missing:
            await connection.execute(watermarks.insert(), missing)
            marks |= dict.fromkeys((row["bucket"] for row in missing), -1)
        if floor is None:
            floor = -1
            await connection.execute(floors.insert().values(**self._own, **self._range, position=floor))
        return Remembered(floor, marks)

    async def settled(self, bucket: int | None) -> int:
        """As committed by whichever process: the bucket's watermark or the floor, whichever is higher; -1 for none.

        Without a bucket, the floor alone.
        """
        async with self._database.reading() as connection:
            floor = await connection.scalar(sa.select(floors.c.position).where(*self._floor_is_ours()))
            mark = None
            if bucket is not None:
                mark = await connection.scalar(
                    sa.select(watermarks.c.position).where(
                        watermarks.c.service == self._service,
                        watermarks.c.log == str(self._log),
                        watermarks.c.bucket == bucket,
                    )
                )
        return max(-1 if floor is None else floor, -1 if mark is None else mark)

    def _floor_is_ours(self) -> tuple[sa.ColumnElement[bool], ...]:
        return (
            floors.c.service == self._service,
            floors.c.log == str(self._log),
            floors.c.first_bucket == self._buckets.start,
            floors.c.last_bucket == self._buckets.stop - 1,
        )

    async def move(self, connection: AsyncConnection, moves: Mapping[int, tuple[int, int]]) -> None:
        """Compare and set watermarks, bucket to (from, to). Raises `Fenced` when any stood elsewhere: roll back."""
        rows = [{"of_bucket": bucket, "from_position": old, "to_position": new} for bucket, (old, new) in moves.items()]
        if not rows:
            return
        if len(rows) == 1 or connection.dialect.supports_sane_multi_rowcount:
            moved = (await connection.execute(self._move, rows)).rowcount
        else:
            moved = 0
            for row in rows:
                moved += (await connection.execute(self._move, row)).rowcount
        if moved != len(rows):
            raise Fenced(
                f"service {self._service!r}: another process moved {len(rows) - moved} of the watermarks of buckets "
                f"{sorted(moves)}; this group was rolled back. Are two processes of the service active at once? "
                "Stop one: on a bus in memory a service is one process"
            )

    async def raise_floor(self, connection: AsyncConnection, position: int) -> None:
        """Never lowers it: two processes may each know something true."""
        await connection.execute(self._raise, {"to_position": position})

    async def bury(self, connection: AsyncConnection, letters: Iterable[Letter]) -> None:
        now = datetime.now(UTC)
        rows: list[dict[str, Any]] = [
            self._own | {name: storable(getattr(letter, name)) for name in Letter.__slots__} | {"died_at": now}
            for letter in letters
        ]
        if rows:
            await connection.execute(_BURY, rows)

    async def stage(self, connection: AsyncConnection, rows: Sequence[StagedEvent]) -> None:
        if rows:
            await connection.execute(
                _STAGE,
                [
                    self._own
                    | {
                        "bucket": row.bucket,
                        "cause": row.cause,
                        "stream": row.stream,
                        "event_id": str(row.event.id),
                        "type": row.event.type,
                        "data": row.event.data,
                        "metadata": row.event.metadata,
                        "is_json": row.event.content_type == JSON,
                    }
                    for row in rows
                ],
            )

    async def unstage(self, connection: AsyncConnection, ids: Sequence[UUID]) -> None:
        """Forget staged events that were appended, or that became dead."""
        if ids:
            await connection.execute(self._unstage, [{"appended": str(identity)} for identity in ids])

    async def staged_events(self) -> list[StagedEvent]:
        """What an earlier process staged and may or may not have appended, oldest first."""
        async with self._database.reading() as connection:
            rows = await connection.execute(
                sa.select(staged)
                .where(
                    staged.c.service == self._service,
                    staged.c.log == str(self._log),
                    staged.c.bucket.between(self._buckets.start, self._buckets.stop - 1),
                )
                .order_by(staged.c.id)
            )
            return [
                StagedEvent(
                    row.bucket,
                    row.cause,
                    row.stream,
                    EventData(row.type, row.data, row.metadata, JSON if row.is_json else OCTETS, id=UUID(row.event_id)),
                )
                for row in rows
            ]

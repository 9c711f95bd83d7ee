"""What a service remembers of the log, in its own database: watermarks, floor, staged events, dead letters.

Every write takes the connection of the transaction that it belongs to; nothing here begins or commits one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.bulk import ForMany
from tidings.database.engine import (
    Database,
    begun,
    dead,
    floors,
    held,
    partials,
    replays,
    skips,
    spans,
    staged,
    watermarks,
)
from tidings.database.layout import layout_of
from tidings.errors import Fenced, LogChanged
from tidings.modelling.roster import BEHIND, SKIPPED
from tidings.protocol.message import Message
from tidings.protocol.position import partition_key
from tidings.stores import JSON, OCTETS, EventData, RecordedEvent

__all__ = [
    "Inbox",
    "Letter",
    "Remembered",
    "Replay",
    "StagedEvent",
    "key_of",
    "recorded",
    "requested_events",
    "stage",
]


_STAGE: Final = staged.insert()
_BURY: Final = dead.insert()
_IDS: Final = 1000
"""Asked for in one statement: databases limit its parameters."""
_KEY_BYTES: Final = 1000


def _plain(value: Any) -> Any:
    """A text without what could be in no row when the first keys were kept: NUL and lone surrogates."""
    if not isinstance(value, str) or (value.isascii() and "\0" not in value):
        return value
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def key_of(event: RecordedEvent, own: Mapping[str, Any] | None = None) -> str:
    """The partition key as rows have it; `own` is as for `partition_key`. Of one that databases refuse, or that fits
    into no index of PostgreSQL's, a digest tells the rest, so that no other key has the same text by chance."""
    name = partition_key(event, own)
    key: str = _plain(name)
    if key == name and (len(key) <= _KEY_BYTES // 4 or len(key.encode()) <= _KEY_BYTES):
        return key
    digest = sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{key.encode()[:_KEY_BYTES].decode(errors='ignore')}...{digest}"


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


@dataclass(frozen=True, slots=True)
class Replay:
    """How far replays sent a bucket range back (`tidings.operations.replay`)."""

    upto: Mapping[int, int] = field(default_factory=dict)
    """By bucket: up to here everything had been settled before."""
    waiting: frozenset[tuple[int, str]] = frozenset()
    """Position and handler of held events, never done, that the replay has not come to: their rows run them."""

    def covers(self, bucket: int, position: int) -> bool:
        return position <= self.upto.get(bucket, -1)


class Remembered(NamedTuple):
    """The durable state of one bucket range, as found when joining."""

    floor: int
    watermarks: dict[int, int]
    replay: Replay = Replay()
    skips: frozenset[int] = frozenset()
    """Positions of events that an operator wants dead without being run."""
    partial: Mapping[int, Mapping[str, bool]] = {}
    """Position to the handlers that are done with an event which waits for others, True for one that a replay has run
    it again."""
    partial_at: Mapping[int, int] = {}
    """Bucket to the position of its rows of that kind, the highest."""

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
    aliases: tuple[UUID, ...] = ()
    """Ids under which it may have been appended when its handler had another name."""
    requested: bool = False
    """A request emitted it (`service.transaction`), no handler: `cause` is only a position below which it cannot be."""

    @property
    def ids(self) -> tuple[UUID, ...]:
        """All of its ids: if an event with any of them is in the log, this one is."""
        return (self.event.id, *self.aliases)


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
    line: str = ""
    """The handler's."""
    replayed: bool = False
    """It failed when a replay ran it again."""

    @classmethod
    def of_event(
        cls,
        event: RecordedEvent,
        bucket: int,
        *,
        key: str,
        holds_key: bool,
        handler: str,
        line: str = "",
        attempts: int,
        reason: str,
        detail: str | None,
        replayed: bool = False,
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
            line,
            replayed,
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

    def __init__(
        self, database: Database, service: str, log: UUID, buckets: range, *, epoch: int | None = None
    ) -> None:
        """With `epoch`, it joins only while the service is laid out as in that epoch."""
        self._database = database
        self._epoch = epoch
        self._service = service
        self._log = log
        self.buckets = buckets
        self._own = {"service": service, "log": str(log)}
        self._range = {"first_bucket": buckets.start, "last_bucket": buckets.stop - 1}
        self._replays: dict[int, int] = {}
        """By bucket: how often it had been sent back when this process joined. What it knew before a replay is true no
        more, even where the watermark stands as before, or will again."""
        self._replay = Replay()
        self._half_done: frozenset[int] = frozenset()
        """Positions of events that a replay may have sent back when only some of their handlers were done."""
        self._sent_back = sa.select(watermarks.c.replays).where(
            watermarks.c.service == service, watermarks.c.log == str(log), watermarks.c.bucket == buckets.start
        )
        self._move = ForMany(
            watermarks.update()
            .where(
                watermarks.c.service == service,
                watermarks.c.log == str(log),
                watermarks.c.bucket == sa.bindparam("of_bucket"),
                watermarks.c.position == sa.bindparam("from_position"),
                watermarks.c.replays == sa.bindparam("at_replays"),
            )
            .values(position=sa.bindparam("to_position"))
        )
        self._raise = (
            floors.update()
            .where(*self._floor_is_ours(), floors.c.position < sa.bindparam("to_position"))
            .values(position=sa.bindparam("to_position"))
        )
        self._forgotten = (begun.c.service == service, begun.c.log == str(log))
        self._unstage = staged.delete().where(
            staged.c.service == service, staged.c.log == str(log), staged.c.event_id == sa.bindparam("appended")
        )

    async def join(self) -> Remembered:
        """Read the range's state, making its rows the first time.

        Raises `LogChanged` when only another log was followed so far, `Fenced` when another process made the rows at
        the same moment, or when the service was resized.
        """
        try:
            async with self._database.turn, self._database.transaction() as connection:
                return await self._join(connection)
        except IntegrityError as error:
            raise Fenced(f"service {self._service!r}: another process joined at the same moment") from error

    async def _join(self, connection: AsyncConnection) -> Remembered:
        if self._epoch is not None:
            layout = await layout_of(connection, self._service, locked=True)
            if layout is None or layout.epoch != self._epoch:
                raise Fenced(f"service {self._service!r} was resized, and this process has not heard of it yet")
        logs = set(
            await connection.scalars(sa.select(floors.c.log).where(floors.c.service == self._service).distinct())
        )
        if logs and str(self._log) not in logs:
            raise LogChanged(f"service {self._service!r}", UUID(min(logs)), self._log)
        known = await connection.execute(
            sa.select(watermarks.c.bucket, watermarks.c.position, watermarks.c.replays).where(
                watermarks.c.service == self._service, watermarks.c.log == str(self._log)
            )
        )
        found = [row for row in known if row.bucket in self.buckets]
        marks = {row.bucket: row.position for row in found}
        self._replays = dict.fromkeys(self.buckets, 0) | {row.bucket: row.replays for row in found}
        floor = await connection.scalar(sa.select(floors.c.position).where(*self._floor_is_ours()))
        missing = [self._own | {"bucket": bucket, "position": -1} for bucket in self.buckets if bucket not in marks]
        if missing:
            await connection.execute(watermarks.insert(), missing)
            marks |= dict.fromkeys((row["bucket"] for row in missing), -1)
        if floor is None:
            floor = -1
            await connection.execute(floors.insert().values(**self._own, **self._range, position=floor))
        await self._forget_settled(connection)
        self._replay = await self._find_replay(connection, floor, marks)
        done: dict[int, dict[str, bool]] = {}
        done_at: dict[int, int] = {}
        for row in await connection.execute(sa.select(partials).where(*self._of_range(partials))):
            done_at[row.bucket] = max(row.position, done_at.get(row.bucket, -1))
            if row.position > max(floor, marks[row.bucket]):
                done.setdefault(row.position, {})[row.handler] = row.again
        self._half_done = frozenset(done)
        return Remembered(floor, marks, self._replay, await self._find_skips(connection, floor), done, done_at)

    def _of_range(self, table: sa.Table) -> tuple[sa.ColumnElement[bool], ...]:
        return (
            table.c.service == self._service,
            table.c.log == str(self._log),
            table.c.bucket.between(self.buckets.start, self.buckets.stop - 1),
        )

    async def _find_skips(self, connection: AsyncConnection, floor: int) -> frozenset[int]:
        ours = self._of_range(skips)
        found = set(await connection.scalars(sa.select(skips.c.position).where(*ours)))
        if any(position <= floor for position in found):  # the log lost them before the service came to them
            await connection.execute(skips.delete().where(*ours, skips.c.position <= floor))
        return frozenset(position for position in found if position > floor)

    async def skipped(self, connection: AsyncConnection, positions: Sequence[int | None]) -> None:
        """These events are dead, as an operator wanted."""
        if positions:
            ours = (skips.c.service == self._service, skips.c.log == str(self._log))
            await connection.execute(skips.delete().where(*ours, skips.c.position.in_(positions)))

    async def _find_replay(self, connection: AsyncConnection, floor: int, marks: Mapping[int, int]) -> Replay:
        first, last = self.buckets.start, self.buckets.stop - 1
        rows = await connection.execute(
            sa.select(replays.c.bucket, replays.c.upto).where(
                replays.c.service == self._service,
                replays.c.log == str(self._log),
                replays.c.bucket.between(first, last),
            )
        )
        if not (upto := {row.bucket: row.upto for row in rows}):
            return Replay()
        rows = await connection.execute(
            sa.select(held.c.bucket, held.c.position, held.c.handler).where(
                held.c.service == self._service,
                held.c.log == str(self._log),
                held.c.bucket.between(first, last),
                held.c.position > floor,
            )
        )
        return Replay(upto, frozenset((row.position, row.handler) for row in rows if row.position > marks[row.bucket]))

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
            floors.c.first_bucket == self.buckets.start,
            floors.c.last_bucket == self.buckets.stop - 1,
        )

    async def occupy(self, connection: AsyncConnection, process: str) -> str | None:
        """`process` is at work on the range from now on. Returns the one that was before, None after a clean end."""
        active = sa.select(floors.c.active).where(*self._floor_is_ours())
        before: str | None = await connection.scalar(active.with_for_update())  # nobody `hold`s it from here on
        ours = floors.update().where(*self._floor_is_ours())
        await connection.execute(ours.values(active=process, asked=None))
        return before

    async def hold(self, connection: AsyncConnection, process: str) -> None:
        """Nobody takes the range over before the end of the transaction. Raises `Fenced` when somebody has done."""
        active = sa.select(floors.c.active).where(*self._floor_is_ours())
        found = await connection.scalar(active.with_for_update(read=True))
        if found != process:
            raise Fenced(f"service {self._service!r}: another process is at work on this range now; joining again")

    async def notes(self, connection: AsyncConnection, names: Collection[str] | None = None) -> dict[int, int]:
        """Position to the number of unclean ends with that event under way (`delivery.crashes`). What was settled
        meanwhile is forgotten first; `names` are all that the service's handlers have, or had, as far as is known."""
        await self._forget_settled(connection, names)
        found = await connection.execute(sa.select(begun.c.position, begun.c.times).where(*self._notes_are_ours()))
        return {row.position: row.times for row in found}

    async def _forget_settled(self, connection: AsyncConnection, names: Collection[str] | None = None) -> None:
        """Forget notes of events that were settled, whoever did it: who noted them may have been fenced since.

        An event that is held, or that is still to be given to a handler on its own (one of `names`, or any), is not
        settled, although the watermark is above it.
        """
        marks = sa.select(watermarks.c.position).where(
            watermarks.c.service == begun.c.service,
            watermarks.c.log == begun.c.log,
            watermarks.c.bucket == begun.c.bucket,
        )
        floor = sa.select(floors.c.position).where(*self._floor_is_ours())
        still_held = sa.exists().where(
            held.c.service == begun.c.service, held.c.log == begun.c.log, held.c.position == begun.c.position
        )
        still_late = sa.exists().where(
            spans.c.service == begun.c.service,
            spans.c.log == begun.c.log,
            spans.c.bucket == begun.c.bucket,
            spans.c.kind != SKIPPED,
            spans.c.done < begun.c.position,
            (spans.c.kind == BEHIND) | (spans.c.upto >= begun.c.position),
            *(() if names is None else (spans.c.handler.in_(names),)),
        )
        settled = sa.or_(begun.c.position <= marks.scalar_subquery(), begun.c.position <= floor.scalar_subquery())
        await connection.execute(begun.delete().where(*self._notes_are_ours(), settled, ~still_held, ~still_late))

    async def leave(self, connection: AsyncConnection, process: str) -> None:
        """`process` ends cleanly; nothing is said of another one that has taken over."""
        mine = floors.update().where(*self._floor_is_ours(), floors.c.active == process)
        if (await connection.execute(mine.values(active=None))).rowcount:
            await connection.execute(begun.delete().where(*self._notes_are_ours()))

    async def note(self, connection: AsyncConnection, notes: Mapping[int, tuple[int, int]]) -> None:
        """Write down what is about to be run: position to bucket, and the number of unclean ends with the event under
        way if the process ends now.

        Raises `Fenced` when another process noted one of them at the same moment: roll back.
        """
        if not notes:
            return
        await self.forget_notes(connection, notes)
        rows = [self._own | {"position": at, "bucket": bucket, "times": times} for at, (bucket, times) in notes.items()]
        try:
            await connection.execute(begun.insert().values(rows))  # one statement, however many
        except IntegrityError as error:
            raise Fenced(
                f"service {self._service!r}: another process began one of the positions {sorted(notes)} at the same "
                "moment"
            ) from error

    async def count_notes(self, connection: AsyncConnection, notes: Mapping[int, int]) -> None:
        """Set the number of unclean ends in notes that are there, position to number."""
        for position, times in notes.items():
            this = begun.update().where(*self._forgotten, begun.c.position == position)
            await connection.execute(this.values(times=times))

    async def forget_notes(self, connection: AsyncConnection, positions: Iterable[int]) -> None:
        """These events ended, and the process did not."""
        these = list(positions)
        for some in (these[start : start + _IDS] for start in range(0, len(these), _IDS)):
            await connection.execute(begun.delete().where(*self._forgotten, begun.c.position.in_(some)))

    def _notes_are_ours(self) -> tuple[sa.ColumnElement[bool], ...]:
        return (
            begun.c.service == self._service,
            begun.c.log == str(self._log),
            begun.c.bucket.between(self.buckets.start, self.buckets.stop - 1),
        )

    async def move(self, connection: AsyncConnection, moves: Mapping[int, tuple[int, int]]) -> None:
        """Compare and set watermarks, bucket to (from, to). Raises `Fenced` when any stood elsewhere: roll back."""
        if not moves:
            return
        rows = [
            {"of_bucket": bucket, "from_position": old, "to_position": new, "at_replays": self._replays[bucket]}
            for bucket, (old, new) in sorted(moves.items())  # one order for all, so that no two wait for each other
        ]
        self._all(moves, await self._move.run(connection, rows))

    async def part(self, connection: AsyncConnection, rows: Sequence[tuple[int, int, str]]) -> None:
        """Some handlers are done with an event that waits for others: bucket, position, handler. The watermark of the
        bucket is compared in the same transaction. Raises `Fenced` when another process wrote the same: roll back."""
        if not rows:
            return
        names = ("bucket", "position", "handler")
        for _, position, handler in rows if self._half_done else ():
            this = (
                partials.c.service == self._service,
                partials.c.log == str(self._log),
                partials.c.position == position,
            )
            await connection.execute(partials.delete().where(*this, partials.c.handler == handler, partials.c.again))
        try:
            await connection.execute(
                partials.insert(), [self._own | dict(zip(names, row, strict=True)) | {"again": False} for row in rows]
            )
        except IntegrityError as error:
            raise Fenced(
                f"service {self._service!r}: another process handled position {rows[0][1]} at the same moment"
            ) from error

    async def check_parts(
        self,
        connection: AsyncConnection,
        moves: Mapping[int, tuple[int, int]],
        known: Mapping[int, tuple[int, frozenset[str]]],
    ) -> None:
        """Each bucket's watermark moves over an event with several handlers. Raises `Fenced` when rows say that another
        process is done with one of them: `known` has those of this process. Call it after `move`, which waits for
        whoever has written such rows and not committed yet."""
        if not moves:
            return
        rows = await connection.execute(
            sa.select(partials.c.bucket, partials.c.position, partials.c.handler).where(
                partials.c.service == self._service, partials.c.log == str(self._log), partials.c.bucket.in_(moves)
            )
        )
        for bucket, position, handler in rows:
            old, new = moves[bucket]
            at, handlers = known.get(bucket, (-1, frozenset()))
            if old < position <= new and (position != at or handler not in handlers):
                raise Fenced(
                    f"service {self._service!r}: another process has handled position {position} with {handler!r}; "
                    "joining again"
                )

    async def forget_parts(self, connection: AsyncConnection, moves: Mapping[int, int]) -> None:
        """All handlers are done with what these buckets had up to these positions."""
        for bucket, position in moves.items():
            await connection.execute(
                partials.delete().where(
                    partials.c.service == self._service,
                    partials.c.log == str(self._log),
                    partials.c.bucket == bucket,
                    partials.c.position <= position,
                )
            )

    async def advance(
        self, connection: AsyncConnection, moves: Sequence[tuple[tuple[int, str, str], int, int]]
    ) -> None:
        """Compare and set spans: bucket, handler and kind; from, to. Raises `Fenced` when any stood elsewhere: roll
        back."""
        for late, old, new in moves:
            this = spans.update().where(*self._span(late), spans.c.done == old).values(done=new)
            self._moved(late, (await connection.execute(this)).rowcount)

    async def end(self, connection: AsyncConnection, ended: Sequence[tuple[tuple[int, str, str], int]]) -> None:
        """Nothing is left of these spans, each of which stands at a position. Raises `Fenced`: roll back."""
        for late, at in ended:
            this = spans.delete().where(*self._span(late), spans.c.done == at)
            self._moved(late, (await connection.execute(this)).rowcount)

    async def caught(self, connection: AsyncConnection, names: Collection[str], position: int) -> None:
        """These handlers have done everything up to here that they are given on their own. `fence` goes before."""
        theirs = (*self._of_range(spans), spans.c.handler.in_(names), spans.c.kind != SKIPPED, spans.c.done < position)
        await connection.execute(spans.update().where(*theirs).values(done=position))

    def _span(self, late: tuple[int, str, str]) -> tuple[sa.ColumnElement[bool], ...]:
        bucket, handler, kind = late
        return (
            spans.c.service == self._service,
            spans.c.log == str(self._log),
            spans.c.bucket == bucket,
            spans.c.handler == handler,
            spans.c.kind == kind,
        )

    def _moved(self, late: tuple[int, str, str], rows: int) -> None:
        if rows != 1:
            raise Fenced(
                f"service {self._service!r}: another process gave handler {late[1]!r} its past in bucket {late[0]}; "
                "this group was rolled back"
            )

    def succeed(self) -> None:
        """Another version of the service was at work before: in the transaction that says so, the watermarks were
        counted up as by a replay, so that it can commit nothing any more."""
        self._replays = {bucket: times + 1 for bucket, times in self._replays.items()}

    async def stand(self, connection: AsyncConnection, marks: Mapping[int, int]) -> None:
        """Raises `Fenced` when any watermark stands elsewhere than `marks` says, bucket to position."""
        if not marks:
            return
        rows = await connection.execute(
            sa.select(watermarks.c.bucket, watermarks.c.position, watermarks.c.replays).where(
                watermarks.c.service == self._service,
                watermarks.c.log == str(self._log),
                watermarks.c.bucket.in_(marks),
            )
        )
        self._all(
            marks, sum((row.position, row.replays) == (marks[row.bucket], self._replays[row.bucket]) for row in rows)
        )

    def _all(self, buckets: Collection[int], found: int) -> None:
        if found != len(buckets):
            raise Fenced(
                f"service {self._service!r}: another process moved {len(buckets) - found} of the watermarks of buckets "
                f"{sorted(buckets)}, or a replay was asked for, or an event skipped; this group was rolled back. Are "
                "two processes of the service active at once? Stop one: on a bus in memory a service is one process"
            )

    async def fence(self, connection: AsyncConnection) -> None:
        """Raises `Fenced` when a replay has sent the service back since this process joined. In a transaction that
        writes, none can until its end."""
        found = await connection.scalar(self._sent_back.with_for_update(read=True))
        if found != self._replays[self.buckets.start]:
            raise Fenced(
                f"service {self._service!r}: a replay was asked for, an event skipped, or another version of the "
                "service has taken over; joining again"
            )

    async def raise_floor(self, connection: AsyncConnection, position: int) -> None:
        """Never lowers it: two processes may each know something true. `fence` goes before: after a replay, what they
        know is not."""
        await connection.execute(self._raise, {"to_position": position})

    async def bury(self, connection: AsyncConnection, letters: Iterable[Letter]) -> None:
        now = datetime.now(UTC)
        rows: list[dict[str, Any]] = [
            self._own | {name: getattr(letter, name) for name in Letter.__slots__} | {"died_at": now}
            for letter in letters
        ]
        if rows:
            await connection.execute(_BURY, rows)

    async def emitted_before(
        self, connection: AsyncConnection, rows: Iterable[StagedEvent], replayed: Collection[int] = ()
    ) -> set[str]:
        """Return the ids of those whose cause is replayed and that wait for their append already, or were given up,
        under whatever name of their handler: they are not staged a second time. `replayed` are positions of causes that
        run again by themselves."""
        of_id = {
            str(identity): str(row.event.id)
            for row in rows
            if self._replay.covers(row.bucket, row.cause) or row.cause in self._half_done or row.cause in replayed
            for identity in row.ids
        }
        ids = list(of_id)

        def of(table: sa.Table, some: Sequence[str]) -> sa.Select[tuple[str]]:
            ours = (table.c.service == self._service, table.c.log == str(self._log))
            return sa.select(table.c.event_id).where(*ours, table.c.event_id.in_(some))

        found: set[str] = set()
        for some in (ids[start : start + _IDS] for start in range(0, len(ids), _IDS)):
            # One statement sees one moment: an operator may bring one from the dead letters back at any time.
            both = sa.union_all(of(staged, some), of(dead, some).where(dead.c.kind == "staged"))
            found.update(of_id[str(identity)] for identity in await connection.scalars(both))
        return found

    async def stage(self, connection: AsyncConnection, rows: Sequence[StagedEvent]) -> None:
        await stage(connection, self._own, rows)

    async def unstage(self, connection: AsyncConnection, ids: Sequence[UUID]) -> None:
        """Forget staged events that were appended."""
        if ids:
            await connection.execute(self._unstage, [{"appended": str(identity)} for identity in ids])

    async def give_up(self, connection: AsyncConnection, id: UUID) -> bool:
        """Forget a staged event that is to be a dead letter; False when another process did before."""
        return (await connection.execute(self._unstage, {"appended": str(id)})).rowcount > 0

    async def staged_events(self) -> list[StagedEvent]:
        """What an earlier process staged and may or may not have appended, oldest first."""
        async with self._database.reading() as connection:
            rows = await connection.execute(
                sa.select(staged)
                .where(
                    staged.c.service == self._service,
                    staged.c.log == str(self._log),
                    staged.c.bucket.between(self.buckets.start, self.buckets.stop - 1),
                )
                .order_by(staged.c.id)
            )
            return [_staged(row) for row in rows]


async def stage(connection: AsyncConnection, own: Mapping[str, str], rows: Sequence[StagedEvent]) -> None:
    """Keep events for their append; `own` is the service and the log that they belong to."""
    if rows:
        await connection.execute(
            _STAGE,
            [
                {
                    **own,
                    "bucket": row.bucket,
                    "cause": row.cause,
                    "stream": row.stream,
                    "event_id": str(row.event.id),
                    "type": row.event.type,
                    "data": row.event.data,
                    "metadata": row.event.metadata,
                    "is_json": row.event.content_type == JSON,
                    "aliases": " ".join(map(str, row.aliases)),
                    "requested": row.requested,
                }
                for row in rows
            ],
        )


async def requested_events(connection: AsyncConnection, service: str, log: UUID, limit: int) -> list[StagedEvent]:
    """The oldest of what requests emitted, in whichever process, and nobody has appended yet."""
    mine = (staged.c.service == service, staged.c.log == str(log), staged.c.requested)
    rows = await connection.execute(sa.select(staged).where(*mine).order_by(staged.c.id).limit(limit))
    return [_staged(row) for row in rows]


def _staged(row: sa.Row[Any]) -> StagedEvent:
    return StagedEvent(
        row.bucket,
        row.cause,
        row.stream,
        EventData(row.type, row.data, row.metadata, JSON if row.is_json else OCTETS, id=UUID(row.event_id)),
        tuple(map(UUID, row.aliases.split())),
        row.requested,
    )

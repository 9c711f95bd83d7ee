"""Replays of one key, stream or handler: chosen events that a service has settled become held events that are due now.

Watermarks stay where they are, so nothing else runs again. The chosen events of a partition key run in order, each in
the transaction that deletes its row, so its effects happen exactly once more. Later events of the key wait behind them.
Those that have not begun can be cancelled.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.contention import again_when_contended, commanding
from tidings.database.engine import Database
from tidings.database.event_rows import columns_of, key_of
from tidings.database.tables import dead, held, partials, replays, spans, watermarks
from tidings.database.watermarks import lock_service
from tidings.errors import ConfigurationError, StreamNotFound, TidingsError
from tidings.modelling.roster import Span
from tidings.operations.fencing import fence
from tidings.operations.replay import Start
from tidings.operations.verify import Settled, settled_in
from tidings.protocol.position import CARRIED, carried, partition_key
from tidings.stores import EventStore, RecordedEvent

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["REPLAYED", "Cancelled", "ReplayConditions", "Picked", "TooMany", "cancel", "pick", "run_again"]

REPLAYED: Final = "replayed by operator"
"""The reason of a held event that was settled, and is to run again because an operator said so."""
MOST: Final = 100_000
"""Events that one selective replay may choose; each is a row with the whole event until it has run."""
CHUNK: Final = 500
"""Rows to write in one statement."""


class TooMany(TidingsError):
    """More events were chosen than a selective replay may run: replay the whole service instead."""


@dataclass(frozen=True, slots=True)
class ReplayConditions:
    """Conditions that must all hold; None is no condition. At least one is given."""

    key: str | None = None
    stream: str | None = None
    handler: str | None = None


class Turn(NamedTuple):
    """An event that one handler is to run again."""

    event: RecordedEvent
    bucket: int
    key: str
    handler: str
    line: str


@dataclass(frozen=True, slots=True)
class Picked:
    """What a choice amounts to; `run_again` carries it out."""

    turns: Sequence[Turn]
    unsettled: int
    """Number of chosen events that are held, dead, or not handled yet. They stay as they are."""
    passed_over: int
    """Number of chosen events for handlers with `replay=False`. They stay as they are."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What `cancel` has taken back."""

    events: int
    """ReplayConditions events that had not begun."""
    buckets: int
    """Buckets that a replay had sent back, and that are again where they were before it."""


async def pick(
    store: EventStore, database: Database, service: Declaration, start: Start, chosen: ReplayConditions
) -> Picked:
    """Find what would run again. It only reads.

    For a stream, read that stream, else the log, and choose events from `start` on. Raises `ConfigurationError` for a
    handler that the service does not have or that has `replay=False`, `TooMany`, `StoreUnavailable`,
    `DatabaseUnavailable`.
    """
    name, log = service.name, await store.log_id()
    if chosen.handler is not None and chosen.handler not in service.named:
        known = ", ".join(service.named) or "none"
        raise ConfigurationError(f"service {name!r} has no handler {chosen.handler!r}; its handlers: {known}")
    if chosen.handler is not None and not service.named[chosen.handler].replay:
        raise ConfigurationError(f"handler {chosen.handler!r} of service {name!r} has replay=False: no replay runs it")
    async with database.reading() as connection:
        stands = await _stands(connection, name, log)
    turns: list[Turn] = []
    unsettled = passed_over = 0
    async for event in _events(store, start, chosen.stream):
        bucket = carried(event)
        if bucket is None or (chosen.key is not None and chosen.key not in (key_of(event), partition_key(event))):
            continue
        for handler in service.handlers_of(event.type):
            if chosen.handler not in (None, handler.name):
                continue
            if any(not span.open for span in stands.late(event.position, bucket, handler.name)):
                continue  # it was never given to the handler, and will not be
            if not stands.done(event.position, bucket, handler.name):
                unsettled += 1
            elif not handler.replay:
                passed_over += 1
            else:
                turns.append(Turn(event, bucket, key_of(event), handler.name, handler.line_of(event.type)))
        if len(turns) > MOST:
            raise TooMany(
                f"more than {MOST} events are chosen: choose fewer (a key, a stream, a later --from), or replay all of "
                "the service with --from alone. Nothing was changed."
            )
    return Picked(turns, unsettled, passed_over)


async def _events(store: EventStore, start: Start, stream: str | None) -> AsyncIterator[RecordedEvent]:
    if stream is None:
        async for event in store.read_all(after=start.before, filter=CARRIED):
            yield event
        return
    try:
        async for event in store.read_stream(stream):
            if event.position > start.before:
                yield event
    except StreamNotFound:
        return


class _Stands(NamedTuple):
    """What a service has settled, and which handlers have not done events of it."""

    settled: Settled
    undone: set[tuple[int, str]]
    """Held and dead events, by position and handler."""
    spans: dict[tuple[int, str], list[Span]]
    """What handlers are behind with, or were never given, by bucket and handler."""

    def late(self, position: int, bucket: int, handler: str) -> list[Span]:
        return [span for span in self.spans.get((bucket, handler), ()) if span.covers(position)]

    def done(self, position: int, bucket: int, handler: str) -> bool:
        """Return whether the handler has done the event."""
        settled = self.settled(bucket, position) and (position, handler) not in self.undone
        return settled and not self.late(position, bucket, handler)


async def _stands(connection: AsyncConnection, service: str, log: UUID) -> _Stands:
    settled, _ = await settled_in(connection, service, log)
    rows = sa.select(held.c.position, held.c.handler).where(held.c.service == service, held.c.log == str(log))
    letters = sa.select(dead.c.position, dead.c.handler).where(
        dead.c.service == service, dead.c.log == str(log), dead.c.kind == "handler"
    )
    undone = {(row[0], row[1]) for row in await connection.execute(sa.union_all(rows, letters))}
    columns = [spans.c[column] for column in Span._fields]
    late = sa.select(*columns).where(spans.c.service == service, spans.c.log == str(log))
    found: dict[tuple[int, str], list[Span]] = {}
    for row in await connection.execute(late):
        span = Span(*row)
        found.setdefault((span.bucket, span.handler), []).append(span)
    return _Stands(settled, undone, found)


@again_when_contended
async def run_again(database: Database, service: str, log: UUID, picked: Picked) -> int:
    """Have the picked events run again, in one transaction, and return how many.

    An event is left out if it has stopped being done since it was picked: it is held or dead, or another replay has
    sent the service back, and runs it in any case. Raises `DatabaseUnavailable`.
    """
    now = time.time()
    async with database.turn, commanding(database) as connection:
        await lock_service(connection, service, log)
        stands = await _stands(connection, service, log)
        turns = [turn for turn in picked.turns if stands.done(turn.event.position, turn.bucket, turn.handler)]
        for start in range(0, len(turns), CHUNK):
            await connection.execute(
                held.insert(), [_row(turn, service, log, now) for turn in turns[start : start + CHUNK]]
            )
        # A process that is already running does not know that these rows now block their keys: fence it.
        await fence(connection, service, log, {turn.bucket for turn in turns})
    return len(turns)


def _row(turn: Turn, service: str, log: UUID, now: float) -> dict[str, Any]:
    return columns_of(turn.event) | {
        "service": service,
        "log": str(log),
        "bucket": turn.bucket,
        "key": turn.key,
        "handler": turn.handler,
        "line": turn.line,
        "attempts": 0,
        "tries": 0,
        "due": now,
        "reason": REPLAYED,
        "detail": None,
        "replayed": True,
        "since": now,
        "code": None,
    }


@again_when_contended
async def cancel(database: Database, service: str, log: UUID) -> Cancelled:
    """Cancel what replays have not run yet: delete chosen events, and move the service forward to where it was before.

    An event that has run and failed stays held. Raises `DatabaseUnavailable`.
    """
    own = (watermarks.c.service == service, watermarks.c.log == str(log))
    async with database.turn, commanding(database) as connection:
        await lock_service(connection, service, log)
        chosen = (
            held.c.service == service,
            held.c.log == str(log),
            held.c.replayed,
            held.c.attempts == 0,
            held.c.reason == REPLAYED,
        )
        events = (await connection.execute(held.delete().where(*chosen))).rowcount
        short = sa.select(replays.c.bucket, replays.c.upto).join(
            watermarks,
            (watermarks.c.service == replays.c.service)
            & (watermarks.c.log == replays.c.log)
            & (watermarks.c.bucket == replays.c.bucket),
        )
        rows = await connection.execute(short.where(*own, watermarks.c.position < replays.c.upto))
        sent_back = {row.bucket: row.upto for row in rows}
        if sent_back:  # fence processes that go on from the position that a replay sent the service back to
            await connection.execute(watermarks.update().where(*own).values(replays=watermarks.c.replays + 1))
        for bucket, upto in sent_back.items():
            await connection.execute(
                watermarks.update().where(*own, watermarks.c.bucket == bucket).values(position=upto)
            )
            await connection.execute(
                partials.delete().where(
                    partials.c.service == service,
                    partials.c.log == str(log),
                    partials.c.bucket == bucket,
                    partials.c.position <= upto,
                )
            )
    return Cancelled(events, len(sent_back))

"""Replays of one key, stream or handler: chosen events that a service has settled become held events that are due now.

Watermarks stay where they are, so nothing else runs again. What is chosen runs in the order of its partition key, each
in the transaction that deletes its row, so its effects come once more, and later events of the key wait behind it. It
can be taken back while it has not begun.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa

from tidings.database.contention import again_when_contended
from tidings.database.engine import Database
from tidings.database.event_rows import columns_of, key_of
from tidings.database.tables import dead, held, partials, replays, spans, watermarks
from tidings.database.watermarks import lock_service
from tidings.errors import ConfigurationError, StreamNotFound, TidingsError
from tidings.modelling.roster import Span
from tidings.operations.fencing import fence
from tidings.operations.replay import Start
from tidings.operations.verify import settled_in
from tidings.protocol.position import CARRIED, carried, partition_key
from tidings.stores import EventStore, RecordedEvent

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["REPLAYED", "Cancelled", "Chosen", "Picked", "TooMany", "cancel", "pick", "run_again"]

REPLAYED: Final = "replayed by operator"
"""The reason of a held event that was settled, and is to run again."""
MOST: Final = 100_000
"""Events that one replay of a choice runs; each is a row with the whole event until then."""
CHUNK: Final = 500
"""Rows that one statement writes."""


class TooMany(TidingsError):
    """Events that are replayed by sending the service back."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """All of these hold together; None chooses nothing away. One at least is given."""

    key: str | None = None
    stream: str | None = None
    handler: str | None = None


class Turn(NamedTuple):
    """An event for one handler."""

    event: RecordedEvent
    bucket: int
    key: str
    handler: str
    line: str


@dataclass(frozen=True, slots=True)
class Picked:
    """What a choice comes to. It is done by `run_again`."""

    turns: Sequence[Turn]
    unsettled: int
    """Chosen, and held, dead, or not handled yet: these stay as they are."""
    passed_over: int
    """Chosen, for handlers with `replay=False`."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What was taken back."""

    events: int
    """Chosen events that had not begun."""
    buckets: int
    """Buckets that were sent back, and are now where they had been."""


async def pick(store: EventStore, database: Database, service: Declaration, start: Start, chosen: Chosen) -> Picked:
    """Read what would run again. It only reads.

    A stream is read by itself, anything else from the log's `start` on. Raises `ConfigurationError` for a handler that
    the service does not have, or that no replay runs; `TooMany`, `StoreUnavailable`, `DatabaseUnavailable`.
    """
    name, log = service.name, await store.log_id()
    if chosen.handler is not None and chosen.handler not in service.named:
        known = ", ".join(service.named) or "none"
        raise ConfigurationError(f"service {name!r} has no handler {chosen.handler!r}; its handlers: {known}")
    if chosen.handler is not None and not service.named[chosen.handler].replay:
        raise ConfigurationError(f"handler {chosen.handler!r} of service {name!r} has replay=False: no replay runs it")
    async with database.reading() as connection:
        settled, _ = await settled_in(connection, name, log)
        undone = await _undone(connection, name, log)
        columns = [spans.c[column] for column in Span._fields]
        late = sa.select(*columns).where(spans.c.service == name, spans.c.log == str(log))
        ungiven: dict[tuple[int, str], list[Span]] = {}
        for row in await connection.execute(late):
            span = Span(*row)
            ungiven.setdefault((span.bucket, span.handler), []).append(span)
    turns: list[Turn] = []
    unsettled = passed_over = 0
    async for event in _events(store, start, chosen.stream):
        bucket = carried(event)
        if bucket is None or (chosen.key is not None and chosen.key not in (key_of(event), partition_key(event))):
            continue
        for handler in service.handlers_of(event.type):
            if chosen.handler not in (None, handler.name):
                continue
            late_by = [span for span in ungiven.get((bucket, handler.name), ()) if span.covers(event.position)]
            if any(not span.open for span in late_by):
                continue  # it was never given to the handler, and is not meant to be
            if late_by or not settled(bucket, event.position) or (event.position, handler.name) in undone:
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


async def _undone(connection: Any, service: str, log: UUID) -> set[tuple[int, str]]:
    rows = sa.select(held.c.position, held.c.handler).where(held.c.service == service, held.c.log == str(log))
    letters = sa.select(dead.c.position, dead.c.handler).where(
        dead.c.service == service, dead.c.log == str(log), dead.c.kind == "handler"
    )
    return {(row[0], row[1]) for row in await connection.execute(sa.union_all(rows, letters))}


@again_when_contended
async def run_again(database: Database, service: str, log: UUID, picked: Picked) -> int:
    """Do it, in one transaction; what became held or dead since it was picked is left alone. Returns how many events
    run again. Raises `DatabaseUnavailable`."""
    now = time.time()
    async with database.turn, database.transaction() as connection:
        await lock_service(connection, service, log)
        undone = await _undone(connection, service, log)
        turns = [turn for turn in picked.turns if (turn.event.position, turn.handler) not in undone]
        for start in range(0, len(turns), CHUNK):
            await connection.execute(
                held.insert(), [_row(turn, service, log, now) for turn in turns[start : start + CHUNK]]
            )
        # A process that goes on would not know that these rows block their keys, too.
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
    """Take back what replays have not begun: chosen events, and the way back to where the service had been.

    What has begun and failed stays held. Raises `DatabaseUnavailable`.
    """
    own = (watermarks.c.service == service, watermarks.c.log == str(log))
    async with database.turn, database.transaction() as connection:
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
        if sent_back:  # fence whoever goes on from where it was sent back to
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

"""Rows and events of a request, committed together: the events wait in the service's database for their append.

The process that is at work for the service appends them, even if this one has died. Nothing is appended here.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

import sqlalchemy as sa
import structlog
from pydantic_core import from_json
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from tidings._support.backoff import Backoff, becomes_true
from tidings.database.staged_events import StagedEvent, stage
from tidings.database.tables import floors, staged
from tidings.database.transaction import TransactionGoesOn, guarded
from tidings.errors import ConfigurationError, EventTooLarge, TransactionMisuse
from tidings.modelling.appending import check_target
from tidings.modelling.codec import BY_REQUEST, encode
from tidings.modelling.context import ATTEMPT
from tidings.modelling.events import Event
from tidings.producing.repetition import check_repetition
from tidings.protocol.identity import UNKEYED, IdKeys, digest
from tidings.protocol.position import bucket_of
from tidings.stores import APPEND_LIMIT, check_stream_name

if TYPE_CHECKING:
    from tidings.hosting.running import RunningService

__all__ = ["Emit", "RequestSession", "transaction"]

log = structlog.get_logger("tidings.outbox")

POLL_SECONDS: Final = (0.005, 0.1)
"""First and longest pause between looks at what waits to be appended, while a caller waits for it."""
SLOW_SECONDS: Final = 0.25
"""Seconds after which a transaction that keeps SQLite's one writer from everybody else is named in the log."""


class RequestSession(TransactionGoesOn, AsyncSession):
    """SQLAlchemy's session, except that it does not end the transaction: the end of the block does."""

    def __init__(self, connection: AsyncConnection) -> None:
        super().__init__(connection, join_transaction_mode="rollback_only", expire_on_commit=False)


class Emit:
    """A function that stages events of one transaction, in the order of its calls."""

    def __init__(
        self,
        service: str,
        key: str | None,
        gone: Callable[[Sequence[UUID]], Awaitable[bool]],
        ids: IdKeys = UNKEYED,
    ) -> None:
        """`gone` returns whether none of these events is still waiting for its append; `ids` are keys of ids."""
        self._gone = gone
        self._service = service
        self._key = key
        self._counts: Counter[tuple[str, str]] = Counter()
        self._secrets = ids.secrets()
        self._correlation = str(uuid4() if key is None else digest(service, "request", key, secret=self._secrets[0]))
        self.events: list[StagedEvent] = []
        self.open = True

    def __call__(
        self,
        stream: str,
        event: Event,
        *,
        metadata: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
    ) -> UUID:
        """Append `event` to `stream` exactly once, after the transaction has been committed; never, if it is not.

        Events of one partition key are appended in the order of their transactions and calls. Returns the event's id;
        `await emit.appended()` after the block waits for the append.
        Without a correlation id, all events of the transaction share one. Raises at once what could never be
        appended: `InvalidStreamName`, `EventTooLarge`, `SchemaError`.
        """
        if not self.open:
            raise ConfigurationError("emit() was called after its transaction had ended: call it within the block")
        check_stream_name(stream)
        check_target(stream)
        data = encode(
            event,
            id=_NO_ID,
            metadata=metadata,
            correlation_id=correlation_id or self._correlation,
            handler=f"{self._service}.{BY_REQUEST}",
        )
        if data.size > APPEND_LIMIT:
            raise EventTooLarge(stream, data.size, APPEND_LIMIT)
        identity, *others = self._next(stream, data.type)
        key = from_json(data.metadata).get("partitionKey")
        self.events.append(
            StagedEvent(bucket_of(key or stream), -1, stream, replace(data, id=identity), tuple(others), requested=True)
        )
        return identity

    async def appended(self, *, timeout: float = 5.0) -> bool:
        """Wait until all events of this transaction have been appended, by whichever process. Return False after
        `timeout` seconds.

        An event that the store refuses for good becomes a dead letter, and is not waited for. Raises
        `DatabaseUnavailable`; and `ConfigurationError` if it is called within the block.
        """
        if self.open:
            raise ConfigurationError("emit.appended() was called within its transaction: call it after the block")
        ids = [row.event.id for row in self.events]
        return await becomes_true(lambda: self._gone(ids), timeout, Backoff(*POLL_SECONDS, factor=1.5))

    def _next(self, stream: str, type: str) -> tuple[UUID, ...]:
        """Return the event's id, and then those that it would have with other keys."""
        if self._key is None:
            return (uuid4(),)
        nth = self._counts[stream, type]
        self._counts[stream, type] += 1
        parts = (self._service, "request", self._key, stream, type, str(nth))
        return tuple(digest(*parts, secret=secret) for secret in self._secrets)


_NO_ID: Final = UUID(int=0)
_OPEN: Final[ContextVar[Emit | None]] = ContextVar("transaction of a request", default=None)


@asynccontextmanager
async def transaction(
    running: RunningService, idempotency_key: str | None, appended_within: float
) -> AsyncIterator[tuple[AsyncSession, Emit]]:
    """Commit rows and events together, as `Service.transaction` says."""
    name = running.service.name
    _refuse_within(name)
    log_id = await running.log_id()
    emit = Emit(name, idempotency_key, partial(_are_gone, running, log_id), running.trust.ids)
    watched: list[asyncio.Future[bool]] = []
    token, before = None, _OPEN.get()
    database = running.database
    try:
        async with database.turn, database.transaction() as connection:
            began = time.monotonic()
            token = _OPEN.set(emit)
            # Within a savepoint, so that a statement which fails undoes what was written here, and is raised as it is.
            async with connection.begin_nested() as savepoint:
                with guarded(connection):
                    async with RequestSession(connection) as session:
                        yield session, emit
                        emit.open = False
                        await session.flush()
                if not savepoint.is_active:
                    raise TransactionMisuse("rollback")
            if idempotency_key is not None and emit.events:
                await check_repetition(connection, running.store, name, str(log_id), idempotency_key, emit.events)
            rows = await _new(connection, name, str(log_id), emit.events, known=idempotency_key is not None)
            watched = running.watch(emit.events) if appended_within > 0 else []
            await stage(connection, {"service": name, "log": str(log_id)}, rows)
            _note_slow(name, database.one_writer, time.monotonic() - began)
    finally:
        emit.open = False
        if token is not None:
            with suppress(ValueError):  # left in another context than it was entered in
                _OPEN.reset(token)
            if _OPEN.get() is emit:
                _OPEN.set(before)
    running.staged.set()
    if watched:
        await asyncio.wait(watched, timeout=appended_within)


async def _are_gone(running: RunningService, log: UUID, ids: Sequence[UUID]) -> bool:
    texts = [str(identity) for identity in ids]
    mine = (staged.c.service == running.service.name, staged.c.log == str(log), staged.c.event_id.in_(texts))
    async with running.database.reading() as connection:
        return await connection.scalar(sa.select(sa.func.count()).where(*mine)) == 0


def _refuse_within(service: str) -> None:
    """Raise `ConfigurationError` within a handler or another transaction: with one writer, it would wait for itself."""
    if ATTEMPT.get() is not None:
        raise ConfigurationError(
            f"service.transaction() of {service!r} was called in a handler: take `session: AsyncSession` there, and "
            "`context.emit`; they are committed together with the watermark"
        )
    outer = _OPEN.get()
    if outer is not None and outer.open:
        raise ConfigurationError(
            f"service.transaction() of {service!r} was called within another one: use the session and emit of that"
        )


async def _new(
    connection: AsyncConnection, service: str, log: str, events: list[StagedEvent], *, known: bool
) -> list[StagedEvent]:
    """Return the events that are not staged yet, each with a position below which it cannot be in the log.

    So nobody has to look for it further down. A request with a key may be repeated after a year: there is no such
    position for its events.
    """
    if not events:
        return []
    own = (staged.c.service == service, staged.c.log == log)
    if known:
        ids = [str(identity) for row in events for identity in row.ids]
        waiting = set(await connection.scalars(sa.select(staged.c.event_id).where(*own, staged.c.event_id.in_(ids))))
        return [row for row in events if not waiting.intersection(map(str, row.ids))]
    highest = sa.select(sa.func.max(floors.c.position)).where(floors.c.service == service, floors.c.log == log)
    settled = await connection.scalar(highest)
    return [row._replace(cause=-1 if settled is None else settled) for row in events]


def _note_slow(service: str, one_writer: bool, seconds: float) -> None:
    if one_writer and seconds > SLOW_SECONDS:
        log.warning(
            "transaction.holds_writer",
            service=service,
            seconds=round(seconds, 3),
            advice="on SQLite, nothing else can write meanwhile, not even handlers: do slow work before it",
        )

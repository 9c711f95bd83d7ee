"""Tidings' tables in a service's own database, as SQLAlchemy knows them. It reads and writes none of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import sqlalchemy as sa

from tidings.database.texts import Text

__all__ = [
    "begun",
    "dead",
    "floors",
    "handlers",
    "held",
    "metadata",
    "partials",
    "partitions",
    "processes",
    "replays",
    "schema",
    "skips",
    "spans",
    "staged",
    "watermarks",
]

metadata = sa.MetaData()


class _Moment(sa.TypeDecorator[datetime]):
    """SQLite forgets that it was given UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value if value is None or value.tzinfo is not None else value.replace(tzinfo=UTC)


_NAME = sa.String(100)
_LOG = sa.String(36)

watermarks = sa.Table(
    "tidings_watermarks",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("replays", sa.Integer, nullable=False, server_default="0", comment="how often it was sent back"),
    comment="Per bucket: position of the last event whose effects are committed",
)

replays = sa.Table(
    "tidings_replay",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("upto", sa.BigInteger, nullable=False),
    comment="Per bucket: how far it had been settled when a replay sent it back; no replay lowers it",
)

floors = sa.Table(
    "tidings_floors",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("first_bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("last_bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("active", sa.String(36), comment="process at work on the range; null after a clean end"),
    sa.Column("asked", sa.String(36), comment="process that asks the one at work to give the range up"),
    sa.Column("handlers", Text, comment="JSON: each handler that its events are given to, and after which position"),
    comment="Per bucket range: everything up to here is settled",
)

partials = sa.Table(
    "tidings_partial",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("handler", Text, primary_key=True),
    sa.Column("bucket", sa.Integer, nullable=False),
    sa.Column("again", sa.Boolean, nullable=False, server_default=sa.false(), comment="a replay has it run again"),
    comment="Handlers that are done with an event which waits for others; gone when the watermark has passed it",
)

handlers = sa.Table(
    "tidings_handlers",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("handler", Text, primary_key=True),
    sa.Column("since", sa.BigInteger, nullable=False, comment="it is given events after this position"),
    sa.Column("seen_at", _Moment, nullable=False, comment="when it was first at work"),
    comment="Handlers that have been at work in a service",
)

spans = sa.Table(
    "tidings_spans",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("handler", Text, primary_key=True),
    sa.Column("kind", sa.String(10), primary_key=True, comment="behind, past or skipped"),
    sa.Column("done", sa.BigInteger, nullable=False, comment="its first event is above this position"),
    sa.Column("upto", sa.BigInteger, nullable=False, comment="its last position; -1 for kind behind, which has none"),
    comment="What a handler that was added late, or was away, is still given on its own, or was not given",
)

begun = sa.Table(
    "tidings_begun",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("bucket", sa.Integer, nullable=False),
    sa.Column("times", sa.Integer, nullable=False),
    comment="Events that are being handled, noted only after an unclean end",
)

processes = sa.Table(
    "tidings_processes",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("process", sa.String(36), primary_key=True),
    sa.Column("host", Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("version", Text, nullable=False, comment="of the package that the handlers are in"),
    sa.Column("code", sa.String(32), nullable=False, comment="fingerprint of the handlers"),
    sa.Column("started", sa.Double, nullable=False, comment="seconds since 1970"),
    sa.Column("seen", sa.Double, nullable=False, comment="seconds since 1970"),
    comment="Processes of the service, for operators to look at",
)

skips = sa.Table(
    "tidings_skips",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("bucket", sa.Integer, nullable=False),
    comment="Events that an operator wants dead without being run, until the service comes to them",
)

partitions = sa.Table(
    "tidings_partitions",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False, comment="rises by one with each resizing"),
    sa.Column("rebound", sa.Integer, nullable=False, comment="epoch whose queues were made"),
    sa.Column("former", sa.Integer, nullable=False, comment="largest count that there was"),
    comment="Into how many partitions a service is divided; without a row, into one that was never resized",
)

_event_columns = (
    ("event_id", sa.String(36)),
    ("stream", Text),
    ("type", Text),
    ("data", sa.LargeBinary),
    ("metadata", sa.LargeBinary),
    ("is_json", sa.Boolean),
)

staged = sa.Table(
    "tidings_staged",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("service", _NAME, nullable=False),
    sa.Column("log", _LOG, nullable=False),
    sa.Column("bucket", sa.Integer, nullable=False),
    sa.Column(
        "cause",
        sa.BigInteger,
        nullable=False,
        comment="position of the event whose handler emitted this; of a request, one below it",
    ),
    *(sa.Column(name, kind, nullable=False) for name, kind in _event_columns),
    sa.Column("aliases", Text, nullable=False, server_default="", comment="ids under former names of the handler"),
    sa.Column("requested", sa.Boolean, nullable=False, server_default=sa.false(), comment="emitted by a request"),
    sa.UniqueConstraint("service", "log", "event_id"),
    comment="Events that handlers and requests emitted, until they are appended to the store",
)

sa.Index(
    "tidings_staged_requested",
    *(staged.c.service, staged.c.log, staged.c.id),
    sqlite_where=sa.text("requested = 1"),
    postgresql_where=staged.c.requested,
)

held = sa.Table(
    "tidings_held",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("bucket", sa.Integer, nullable=False),
    sa.Column("partition_key", Text, key="key", nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("ticks", sa.BigInteger, nullable=False),
    *(sa.Column(name, kind, nullable=False) for name, kind in _event_columns),
    sa.Column("handler", Text, primary_key=True),
    sa.Column("attempts", sa.Integer, nullable=False, comment="all of them; 0 for one that waits behind another"),
    sa.Column("tries", sa.Integer, nullable=False, comment="attempts since it was held"),
    sa.Column("due", sa.Double, nullable=False, comment="seconds since 1970"),
    sa.Column("reason", Text, nullable=False, comment="one line: error type and message, or whom it waits for"),
    sa.Column("detail", Text, comment="traceback of the last attempt"),
    sa.Column("replayed", sa.Boolean, nullable=False, server_default=sa.false(), comment="it failed in a replay"),
    sa.Column("since", sa.Double, comment="when it was held first, seconds since 1970"),
    sa.Column("code", sa.String(32), comment="fingerprint of the handler's code that failed"),
    sa.Column("line", Text, nullable=False, server_default="", comment="of the handler; others do not wait for it"),
    sa.Index("tidings_held_order", "service", "log", "key", "line", "position", "bucket", "attempts"),
    comment="Events that failed for now, and later events of their keys; they run again when they are due",
)

_failed: Final = held.c.attempts > sa.literal_column("0")
# Without those that wait behind another: they are due as soon as it is gone, and may be many. What comes after `due`
# lets them be counted by handler without a look at the rows.
sa.Index(
    "tidings_held_tried",
    *(
        held.c.service,
        held.c.log,
        held.c.due,
        held.c.handler,
        held.c.since,
        held.c.attempts,
        held.c.bucket,
        held.c.code,
    ),
    sqlite_where=_failed,
    postgresql_where=_failed,
)

dead = sa.Table(
    "tidings_dead",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("service", _NAME, nullable=False, index=True),
    sa.Column("log", _LOG, nullable=False),
    sa.Column("kind", sa.String(20), nullable=False, comment="handler, message or staged"),
    sa.Column("position", sa.BigInteger, comment="of the event; of the cause for kind staged; null for kind message"),
    sa.Column("bucket", sa.Integer),
    sa.Column("version", sa.BigInteger),
    sa.Column("ticks", sa.BigInteger),
    *(sa.Column(name, kind) for name, kind in _event_columns),
    sa.Column("handler", Text),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("reason", Text, nullable=False, comment="one line: error type and message"),
    sa.Column("detail", Text, comment="traceback, or the headers of a message that could not be read"),
    sa.Column("died_at", _Moment, nullable=False),
    sa.Column("partition_key", Text, key="key"),
    sa.Column("holds_key", sa.Boolean, nullable=False, server_default=sa.false(), comment="later events wait for it"),
    sa.Column("replayed", sa.Boolean, nullable=False, server_default=sa.false(), comment="it failed in a replay"),
    sa.Column("line", Text, nullable=False, server_default="", comment="of the handler; others do not wait for it"),
    comment="Events and messages that this service gave up, whole, with the reason",
    sqlite_autoincrement=True,  # an id from an older listing must never name another letter
)

sa.Index(
    "tidings_dead_order",
    *(dead.c.service, dead.c.log, dead.c.key, dead.c.line, dead.c.position, dead.c.bucket),
    sqlite_where=sa.text("holds_key = 1"),
    postgresql_where=dead.c.holds_key,
)

schema = sa.Table("tidings_schema", metadata, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))

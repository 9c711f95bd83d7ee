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
    "id_keys",
    "metadata",
    "partials",
    "partitions",
    "processes",
    "proofs",
    "replays",
    "schema",
    "skips",
    "spans",
    "staged",
    "watermarks",
]

metadata = sa.MetaData()


class _Moment(sa.TypeDecorator[datetime]):
    """A time in UTC. SQLite does not store the time zone, so values that come back without one get UTC."""

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
    sa.Column(
        "replays",
        sa.Integer,
        nullable=False,
        server_default="0",
        comment="counts up whenever a process at work on the bucket must notice: a replay, a skip, newer code, a rival",
    ),
    sa.Column(
        "receipt_at",
        sa.BigInteger,
        nullable=False,
        server_default="-1",
        comment="position up to which the receipt has all events of the bucket",
    ),
    sa.Column(
        "receipt",
        sa.Text,  # always ASCII
        nullable=False,
        server_default="",
        comment="what was settled: since which position, first event out of order, count, sums; empty: it begins anew",
    ),
    comment="Position of the last event in each bucket whose effects are committed",
)

proofs = sa.Table(
    "tidings_proofs",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.BigInteger, nullable=False, comment="the receipt agrees with the log up to here"),
    sa.Column("receipt", sa.Text, nullable=False, comment="as it was then"),
    comment="What 'tidings verify --deep' has proved last, where the next proof can begin",
)

replays = sa.Table(
    "tidings_replay",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("upto", sa.BigInteger, nullable=False, comment="position; later replays never lower it"),
    comment="How far each bucket was settled when a replay set it back",
)

floors = sa.Table(
    "tidings_floors",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("first_bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("last_bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("active", sa.String(36), comment="id of the process at work on the range; null after a clean stop"),
    sa.Column("asked", sa.String(36), comment="id of a process that asks for the range"),
    sa.Column(
        "handlers", Text, comment="JSON: the handlers of the range, and the position after which each gets events"
    ),
    sa.Column(
        "receipted",
        sa.BigInteger,
        nullable=False,
        server_default="-2",
        comment="the floor for which receipts were written last; another one: a version without receipts raised it",
    ),
    comment="Position up to which everything is settled, for each range of buckets",
)

partials = sa.Table(
    "tidings_partial",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("handler", Text, primary_key=True),
    sa.Column("bucket", sa.Integer, nullable=False),
    sa.Column(
        "again", sa.Boolean, nullable=False, server_default=sa.false(), comment="a replay runs the handler again"
    ),
    comment="Handlers that are done with an event while other handlers of it are not; deleted when all are done",
)

handlers = sa.Table(
    "tidings_handlers",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("handler", Text, primary_key=True),
    sa.Column("since", sa.BigInteger, nullable=False, comment="the handler gets events after this position"),
    sa.Column("seen_at", _Moment, nullable=False, comment="when the handler first ran in this service"),
    comment="Every handler that the service has ever had",
)

spans = sa.Table(
    "tidings_spans",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("bucket", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("handler", Text, primary_key=True),
    sa.Column("kind", sa.String(10), primary_key=True, comment="behind, past (both still to be handled) or skipped"),
    sa.Column("done", sa.BigInteger, nullable=False, comment="the handler is done up to this position"),
    sa.Column("upto", sa.BigInteger, nullable=False, comment="last position; -1 for kind behind, which has no end yet"),
    comment="Positions that a handler added later has still to handle, or was never given",
)

begun = sa.Table(
    "tidings_begun",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("bucket", sa.Integer, nullable=False),
    sa.Column("times", sa.Integer, nullable=False, comment="how many times a process has died while handling it"),
    comment="Events being handled, noted only after a process has died; used to find the event that kills it",
)

processes = sa.Table(
    "tidings_processes",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("process", sa.String(36), primary_key=True),
    sa.Column("host", Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("version", Text, nullable=False, comment="version of the package that contains the handlers"),
    sa.Column("code", sa.String(32), nullable=False, comment="fingerprint of the code of all handlers"),
    sa.Column("started", sa.Double, nullable=False, comment="seconds since 1970"),
    sa.Column("seen", sa.Double, nullable=False, comment="seconds since 1970"),
    comment="Processes of the service, for display only; a row is updated every 10 seconds",
)

skips = sa.Table(
    "tidings_skips",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("log", _LOG, primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("bucket", sa.Integer, nullable=False),
    comment="Events that an operator has skipped and that the service has not reached yet",
)

id_keys = sa.Table(
    "tidings_id_keys",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("name", sa.String(16), primary_key=True, comment="digest of the key; open: ids without a key"),
    comment="Keys that the service has made ids of emitted events with",
)

partitions = sa.Table(
    "tidings_partitions",
    metadata,
    sa.Column("service", _NAME, primary_key=True),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False, comment="increases by one with each resizing"),
    sa.Column("rebound", sa.Integer, nullable=False, comment="epoch for which the queues were last made"),
    sa.Column("former", sa.Integer, nullable=False, comment="largest count so far"),
    comment="Number of partitions of the service; no row means one partition, never resized",
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
        comment="position of the event whose handler emitted this; for a request, a position before this event",
    ),
    *(sa.Column(name, kind, nullable=False) for name, kind in _event_columns),
    sa.Column(
        "aliases",
        Text,
        nullable=False,
        server_default="",
        comment="ids the event would have under former names of its handler, separated by spaces",
    ),
    sa.Column(
        "requested",
        sa.Boolean,
        nullable=False,
        server_default=sa.false(),
        comment="emitted by a request, not by a handler",
    ),
    sa.UniqueConstraint("service", "log", "event_id"),
    comment="Events that handlers and requests have emitted and that are not in the log yet",
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
    sa.Column(
        "attempts", sa.Integer, nullable=False, comment="all attempts; 0 for an event that only waits behind another"
    ),
    sa.Column("tries", sa.Integer, nullable=False, comment="attempts since the event was held"),
    sa.Column("due", sa.Double, nullable=False, comment="seconds since 1970"),
    sa.Column(
        "reason", Text, nullable=False, comment="one line: error type and message, or the event that it waits for"
    ),
    sa.Column("detail", Text, comment="traceback of the last attempt"),
    sa.Column(
        "replayed",
        sa.Boolean,
        nullable=False,
        server_default=sa.false(),
        comment="a replay was running the event again",
    ),
    sa.Column("since", sa.Double, comment="when the event was first held, seconds since 1970"),
    sa.Column("code", sa.String(32), comment="fingerprint of the handler code that failed"),
    sa.Column(
        "line",
        Text,
        nullable=False,
        server_default="",
        comment="handler with an order of its own; empty for the first handlers of all types, which share one",
    ),
    sa.Index("tidings_held_order", "service", "log", "key", "line", "position", "bucket", "attempts"),
    comment="Events that failed and will be retried when due, and later events of their keys, which wait",
)

_failed: Final = held.c.attempts > sa.literal_column("0")
# Events that only wait behind another are left out: they are due as soon as it is gone, and there may be many. The
# columns after `due` let the events be counted by handler from the index alone.
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
    sa.Column("position", sa.BigInteger, comment="of the event; for kind staged, of its cause; null for kind message"),
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
    sa.Column(
        "holds_key",
        sa.Boolean,
        nullable=False,
        server_default=sa.false(),
        comment="later events of the key wait until this is retried or dropped",
    ),
    sa.Column(
        "replayed",
        sa.Boolean,
        nullable=False,
        server_default=sa.false(),
        comment="a replay was running the event again",
    ),
    sa.Column(
        "line",
        Text,
        nullable=False,
        server_default="",
        comment="handler with an order of its own; empty for the first handlers of all types, which share one",
    ),
    comment="Events and messages that the service has given up, complete, with the reason",
    sqlite_autoincrement=True,  # an id in an older listing must never name another letter
)

sa.Index(
    "tidings_dead_order",
    *(dead.c.service, dead.c.log, dead.c.key, dead.c.line, dead.c.position, dead.c.bucket),
    sqlite_where=sa.text("holds_key = 1"),
    postgresql_where=dead.c.holds_key,
)

schema = sa.Table("tidings_schema", metadata, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))

"""The log's schema in PostgreSQL: its tables and functions, its versions, and the place where it was made.

Everything is in the schema `tidings_log`. Its names are written in full, and all others are PostgreSQL's own:
connections and functions look for them in `pg_catalog`, whatever `search_path` is. Names and types are bytes of UTF-8,
which any database can hold, whatever its encoding and collation; also NUL characters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final
from uuid import UUID, uuid4

import asyncpg

from tidings.errors import ConfigurationError, StoreUnavailable

__all__ = ["CHANNEL", "LOG_STREAM", "RENEWED", "SCHEMA_VERSION", "key_of", "prepare", "uuid_of"]

SCHEMA_VERSION: Final = 1
LOG_STREAM: Final = "tidings_log"
RENEWED: Final = "tidings_LogRenewed"
"""The type of the event by which a restored log gets a new identity (`tidings.database.lineage`)."""
CHANNEL: Final = "tidings_log"
"""The channel on which every commit is announced."""
MAKING: Final = 0x54494447
"""The advisory lock under which the schema is made and upgraded."""


@lru_cache(16_384)
def key_of(stream: str) -> UUID:
    """Return the key under which a stream is found: names may be longer than an entry of an index."""
    return uuid_of(hashlib.sha256(stream.encode()).digest()[:16])


def uuid_of(id_: bytes) -> UUID:
    """Return the UUID of these 16 bytes as asyncpg's own class, which it writes several times faster."""
    made: UUID = asyncpg.pgproto.pgproto.UUID(id_)
    return made


_TABLES: Final = (
    # `writer` is the lock that whoever appends holds until the commit: a table is seen and named in pg_locks.
    "CREATE TABLE tidings_log.writer ()",
    """
CREATE TABLE tidings_log.about (
    only_row boolean PRIMARY KEY CHECK (only_row),
    schema_version integer NOT NULL,
    place text NOT NULL
)""",
    # The widest alignment first, so that no row has padding. Rows are only ever added: vacuum freezes them, once, soon
    # after they were written.
    """
CREATE TABLE tidings_log.events (
    position bigint PRIMARY KEY,
    version bigint NOT NULL,
    ticks bigint NOT NULL,
    key uuid NOT NULL,
    id uuid NOT NULL,
    is_json boolean NOT NULL,
    stream bytea NOT NULL,
    type bytea NOT NULL,
    data bytea NOT NULL,
    metadata bytea NOT NULL
) WITH (fillfactor = 100, autovacuum_freeze_min_age = 0)""",
    "CREATE UNIQUE INDEX events_key_version ON tidings_log.events (key, version)",
    "CREATE INDEX events_key_id ON tidings_log.events (key, id)",
)

_FUNCTIONS: Final = (
    """
CREATE FUNCTION tidings_log.place() RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    -- Which log this is among all that dumps and restores make of one: server, database and table.
    SELECT concat_ws('/', (SELECT system_identifier FROM pg_control_system()),
        (SELECT oid FROM pg_database WHERE datname = current_database()), 'tidings_log.events'::regclass::oid)
$$""",
    """
CREATE FUNCTION tidings_log.accept_place() RETURNS text LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    UPDATE tidings_log.about SET place = tidings_log.place() RETURNING place
$$""",
    """
CREATE FUNCTION tidings_log.append(
    -- What is taken for granted: streams with their last versions, and ids that streams do not have.
    keys uuid[], lasts bigint[], id_keys uuid[], new_ids uuid[],
    -- The rows, in the order of their positions.
    row_keys uuid[], streams bytea[], versions bigint[], types bytea[], are_json boolean[], ids uuid[],
    datas bytea[], metadatas bytea[]
) RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
-- Write the rows if all that is taken for granted is so. Return the head before them; null if nothing was written.
DECLARE
    head bigint;
BEGIN
    IF cardinality(row_keys) > 0 THEN
        -- Held until the commit is visible: so positions become visible in their order, and without gaps.
        LOCK TABLE tidings_log.writer IN EXCLUSIVE MODE;
    END IF;
    IF EXISTS (
        SELECT FROM unnest(keys, lasts) AS granted (key, last)
        WHERE granted.last <> coalesce((SELECT max(e.version) FROM tidings_log.events e WHERE e.key = granted.key), -1)
    ) OR EXISTS (
        SELECT FROM unnest(id_keys, new_ids) AS granted (key, id)
        WHERE (SELECT e.version FROM tidings_log.events e WHERE e.key = granted.key AND e.id = granted.id LIMIT 1)
            IS NOT NULL
    ) THEN
        RETURN NULL;
    END IF;
    SELECT max(e.position) INTO head FROM tidings_log.events e;
    IF head IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'TL001', MESSAGE = 'its log is empty, without the first event';
    END IF;
    IF cardinality(row_keys) > 0 THEN
        INSERT INTO tidings_log.events (position, version, ticks, key, id, is_json, stream, type, data, metadata)
        SELECT head + r.n, r.version, (extract(epoch FROM clock_timestamp()) * 10000000)::bigint, r.key, r.id,
            r.is_json, r.stream, r.type, r.data, r.metadata
        FROM unnest(row_keys, streams, versions, types, are_json, ids, datas, metadatas)
            WITH ORDINALITY AS r (key, stream, version, type, is_json, id, data, metadata, n);
        PERFORM pg_notify('tidings_log', '');
    END IF;
    RETURN head;
END
$$""",
)

_CONTENTS: Final = """
SELECT EXISTS (SELECT FROM pg_class WHERE relnamespace = n.oid AND relname = 'about') AS ours,
    EXISTS (SELECT FROM pg_class WHERE relnamespace = n.oid) OR EXISTS (SELECT FROM pg_proc WHERE pronamespace = n.oid)
    OR EXISTS (SELECT FROM pg_type WHERE typnamespace = n.oid) AS anybodys
FROM pg_namespace n WHERE nspname = 'tidings_log'"""
"""Whether the schema has the log's tables, and anything at all. No row: there is no such schema."""

_UPGRADES: Final[dict[int, Sequence[str]]] = {}
"""What makes of a schema of this version one of the next."""


async def prepare(connection: Any, shown: str, *, make: bool = True) -> None:
    """Make the schema and the log's first event unless they are there, or upgrade the schema. A schema without anything
    in it may have been made before, by somebody who has the right to. Raises what asyncpg raises, `ConfigurationError`
    and `StoreUnavailable`."""
    if await _version(connection, shown) == SCHEMA_VERSION:
        return  # without a lock, and without the right to create anything
    if not make:
        raise StoreUnavailable(
            f"the event store {shown} has no log any more, or one with an older schema. Find out what happened to the "
            "database, and start again",
            waiting_helps=False,
        )
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", MAKING)
        version = await _version(connection, shown)
        if version is None:
            await _create(connection)
            return
        while version < SCHEMA_VERSION:
            for statement in _UPGRADES[version]:
                await connection.execute(statement)
            version += 1
        await connection.execute("UPDATE tidings_log.about SET schema_version = $1", version)


async def _version(connection: Any, shown: str) -> int | None:
    """The schema's version; None where nothing is in it, or there is none. Raises `ConfigurationError` for one that
    cannot be used."""
    # The catalogue itself: functions as to_regclass may remember, behind a lock, how it was before.
    found = await connection.fetchrow(_CONTENTS)
    if found is None or not found["ours"]:
        if found is not None and found["anybodys"]:
            raise ConfigurationError(
                f"{shown} has a schema tidings_log that is no event log: nothing was written to it. Rename it "
                "(ALTER SCHEMA tidings_log RENAME TO ...), or name another database in TIDINGS_STORE"
            )
        return None
    version: int | None = await connection.fetchval("SELECT schema_version FROM tidings_log.about")
    if version is None:
        raise StoreUnavailable(
            f"the event store {shown} has lost what table tidings_log.about said: it is being restored, or a restore "
            "broke off. Wait until it has ended, or restore the backup again."
        )
    if version > SCHEMA_VERSION:
        raise ConfigurationError(
            f"the event store {shown} has schema version {version}, this Tidings knows {SCHEMA_VERSION}: "
            "install the version of Tidings that wrote it, or a newer one"
        )
    return version


async def _create(connection: Any) -> None:
    if await connection.fetchrow(_CONTENTS) is None:
        await connection.execute("CREATE SCHEMA tidings_log")
    for statement in (*_TABLES, *_FUNCTIONS):
        await connection.execute(statement)
    identity = uuid4()
    await connection.execute("INSERT INTO tidings_log.about VALUES (true, $1, tidings_log.place())", SCHEMA_VERSION)
    await connection.execute(
        "INSERT INTO tidings_log.events (position, version, ticks, key, id, is_json, stream, type, data, metadata) "
        "VALUES (1, 0, (extract(epoch FROM clock_timestamp()) * 10000000)::bigint, $1, $2, true, $3, $4, $5, '')",
        key_of(LOG_STREAM),
        identity,
        LOG_STREAM.encode(),
        b"tidings_LogCreated",
        json.dumps({"log": str(identity)}).encode(),
    )

"""Opening the service's database: what cannot work says so, names the remedy, and never shows a password."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from tidings.database.engine import connected, open_database
from tidings.database.outages import is_outage
from tidings.database.tables import held
from tidings.database.transaction import guarded
from tidings.errors import ConfigurationError, DatabaseUnavailable, TransactionMisuse

SECRET = "hunter2secret"


@pytest.mark.parametrize(
    "url",
    [
        f"postgres://me:{SECRET}@host/db",
        f"postgresql://me:{SECRET}@host/db",
        f"postgresql+asyncpg://me:{SECRET}@host:port/db",
        f"mysql+nothing://me:{SECRET}@host/db",
        f"sqlite+pysqlite://me:{SECRET}@/x.db",
        "sqlite+aiosqlite:///x.db",
        f"me:{SECRET}@host",
        f"sqlite:/{SECRET}",
        f"sqlite://{SECRET}/x.db",
        "",
    ],
)
async def test_a_url_that_cannot_work_is_a_configuration_error_without_its_password(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        async with open_database(url):
            pass
    if "@" in url or "?" in url:
        assert SECRET not in str(caught.value)
    assert "TIDINGS_DATABASE" in str(caught.value)


async def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnavailable, match="make sure that the folder exists"):
        async with open_database(f"sqlite:///{tmp_path}/missing/x.db"):
            pass


async def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(DatabaseUnavailable, match="is no SQLite database"):
        async with open_database(f"sqlite:///{tmp_path}/x.db"):
            pass


async def test_a_read_only_file_is_named(tmp_path: Path) -> None:
    async with open_database(f"sqlite:///{tmp_path}/x.db"):
        pass
    with pytest.raises(DatabaseUnavailable, match="writable"):
        async with open_database(f"sqlite:///file:{tmp_path}/x.db?mode=ro&uri=true"):
            pass


async def test_a_locked_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_database(f"sqlite:///{tmp_path}/x.db"):
        pass
    monkeypatch.setattr("tidings.database.sqlite_dialect.BUSY_TIMEOUT", 0.05)
    with closing(sqlite3.connect(tmp_path / "x.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseUnavailable, match="another process holds the writer"):
            async with open_database(f"sqlite:///{tmp_path}/x.db"):
                pass
        other.execute("ROLLBACK")


async def test_tables_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    async with open_database(f"sqlite:///{tmp_path}/x.db"):
        pass
    with closing(sqlite3.connect(tmp_path / "x.db")) as other:
        other.execute("UPDATE tidings_schema SET version = 99")
        other.commit()
    with pytest.raises(ConfigurationError, match="tables of version 99"):
        async with open_database(f"sqlite:///{tmp_path}/x.db"):
            pass


async def test_a_wrong_statement_is_no_outage_and_an_outage_of_another_engine_is_not_ours(tmp_path: Path) -> None:
    async with open_database(f"sqlite:///{tmp_path}/x.db") as database, database.reading() as connection:
        with pytest.raises(sa.exc.OperationalError) as caught:
            await connection.execute(sa.text("SELECT * FROM nowhere"))
    assert not is_outage(caught.value)
    other = sa.create_engine(f"sqlite:///{tmp_path}/missing/x.db")
    with pytest.raises(sa.exc.OperationalError) as caught:
        other.connect()
    assert not is_outage(caught.value)
    other.dispose()


@pytest.mark.parametrize(
    ("statement", "refused"),
    [
        ("COMMIT", True),
        (" -- why\n commit work", True),
        ("/* a */ /* b */ROLLBACK", True),
        ("rollback transaction", True),
        ("ABORT", True),
        ("START  TRANSACTION", True),
        ("ROLLBACK TO SAVEPOINT x", False),
        ("rollback transaction to x", False),
        ('SAVEPOINT "commit"', False),
        ("SELECT 'COMMIT'", False),
    ],
)
async def test_statements_that_end_a_transaction_are_refused_within_a_guard_only(
    tmp_path: Path, statement: str, refused: bool
) -> None:
    async with open_database(f"sqlite:///{tmp_path}/x.db") as database, database.reading() as plain:
        with pytest.raises(sa.exc.OperationalError) if statement == "ABORT" else _nothing():
            await plain.execute(sa.text("SELECT 1"))
            if statement == "ABORT":
                await plain.execute(sa.text(statement))
    async with open_database(f"sqlite:///{tmp_path}/x.db") as database, database.transaction() as connection:
        await connection.execute(sa.text("SAVEPOINT x"))
        with guarded(connection), pytest.raises(TransactionMisuse) if refused else _nothing():
            await connection.execute(sa.text(statement))


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


async def test_a_database_in_memory_is_one_database(tmp_path: Path) -> None:
    async with open_database("sqlite://") as database:
        async with database.transaction() as connection:
            await connection.execute(sa.text("CREATE TABLE x (y)"))
        async with database.reading() as connection:
            assert (await connection.execute(sa.text("SELECT count(*) FROM x"))).scalar() == 0


async def test_what_a_driver_raises_while_it_connects_is_the_databases_outage(tmp_path: Path) -> None:
    """Some errors of asyncpg are not wrapped by SQLAlchemy."""

    def refuse(*_: object) -> None:
        raise ConnectionRefusedError(111, "Connect call failed")

    async with connected(f"sqlite:///{tmp_path}/a.db") as database:
        sa.event.listen(database.engine.sync_engine, "do_connect", refuse)
        for enter in (database.transaction, database.reading):
            with pytest.raises(DatabaseUnavailable, match="lets nobody in: ConnectionRefusedError") as caught:
                async with enter():
                    pass
            assert caught.value.waiting_helps


async def test_a_connection_that_is_lost_within_a_transaction_hides_no_error(tmp_path: Path) -> None:
    async with connected(f"sqlite:///{tmp_path}/a.db") as database:

        async def lose_it() -> None:
            async with database.transaction() as connection:
                await connection.invalidate()
                raise DatabaseUnavailable("it is gone")

        with pytest.raises(DatabaseUnavailable, match="it is gone"):
            await lose_it()


@pytest.mark.parametrize(
    ("state", "outage"),
    [("40P01", True), ("40001", True), ("53300", True), ("57P01", True), ("57014", False), ("23505", False)],
)
def test_of_errors_that_sqlalchemy_does_not_class_the_servers_state_says_whose_they_are(
    state: str, outage: bool
) -> None:
    """A deadlock, a shutdown or a lack of connections is the database's failure; a statement's timeout is the
    handler's."""

    class Refused(Exception):
        sqlstate = state

    error = DBAPIError("SELECT 1", None, Refused())
    error._tidings = True  # type: ignore[attr-defined]  # as the engine marks its own
    assert is_outage(error) is outage


async def test_held_events_of_an_older_schema_are_kept_and_may_be_held_for_a_second_handler(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    async with open_database(f"sqlite:///{path}"):
        pass
    with closing(sqlite3.connect(path)) as connection, connection:
        (made,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'tidings_held'").fetchone()
        connection.execute("DROP TABLE tidings_held")
        connection.execute(made.replace("position, handler)", "position)"))
        connection.execute("CREATE INDEX tidings_held_keys ON tidings_held (service, log, partition_key)")
        connection.execute("UPDATE tidings_schema SET version = 3")
        connection.execute(HELD, ("first", b"\x00\xff"))
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(HELD, ("second", b""))
    for _ in range(2):
        async with open_database(f"sqlite:///{path}"):
            pass
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(HELD, ("second", b""))
        found = connection.execute("SELECT handler, data, replayed FROM tidings_held ORDER BY handler").fetchall()
        indexes = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert found == [("first", b"\x00\xff", 0), ("second", b"", 0)]
    assert {index.name for index in held.indexes} <= indexes
    assert "tidings_held_keys" not in indexes
    assert "tidings_held_former" not in tables


HELD = (
    "INSERT INTO tidings_held (service, log, position, bucket, partition_key, version, ticks, event_id, stream, type, "
    "handler, data, metadata, is_json, attempts, tries, due, reason) VALUES "
    "('s', 'l', 5, 0, 'k', 0, 0, 'id', 's', 't', ?, ?, x'', 1, 1, 0, 0.0, 'because')"
)

"""Where a service's database of an integration test is: in an SQLite file, or on a PostgreSQL server.

`TIDINGS_TEST_DATABASE=postgresql` asks for the second; `make postgresql` runs the tests of a service's database so. A
database that is not there is made when it is first connected to, as a file would be.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path
from threading import Thread
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import make_url

from tidings.database.engine import connected
from tidings.testing.databases import create_database, drop_databases

__all__ = ["EVERYWHERE", "PLACE", "answers", "database_url", "on_server", "remove_database"]

EVERYWHERE: Final = os.environ.get("TIDINGS_TEST_DATABASE", "sqlite") == "postgresql"
PLACE: Final = "TIDINGS_TEST_DATABASE_URL"
"""Environment variable with the URL of the test's database. Names of further databases begin with its name. Processes
of the test inherit it."""


def on_server() -> bool:
    """Return whether the running test has its databases on PostgreSQL."""
    return PLACE in os.environ


def database_url(folder: Path, service: str = "{service}") -> str:
    """Return the database URL of a service whose files are in this folder."""
    if not on_server():
        return f"sqlite:///{folder}/{service}.db"
    of_folder = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    return f"{os.environ[PLACE]}_{of_folder}_{service}"


async def remove_database(folder: Path, service: str) -> None:
    """Remove the database, as if it had never existed."""
    url = make_url(database_url(folder, service))
    if on_server():
        _made.discard(str(url.database))
        await drop_databases(os.environ[PLACE], str(url.database))
    else:
        os.unlink(str(url.database))


async def answers(folder: Path, statement: str, service: str = "audit") -> list[Any]:
    """Return the first column of a query's rows; none while the tables do not exist yet."""
    async with connected(database_url(folder, service)) as database, database.engine.connect() as connection:
        try:
            return list(await connection.scalars(sa.text(statement)))
        except sa.exc.DBAPIError as error:
            if "no such table" in str(error) or "does not exist" in str(error):
                return []
            raise


def _make(dialect: sa.Dialect, record: object, args: object, options: dict[str, Any]) -> None:
    """Create the database before SQLAlchemy connects."""
    place = os.environ.get(PLACE)
    name = str(options.get("database"))
    if place is None or name in _made or not name.startswith(f"{make_url(place).database}_"):
        return
    _made.add(name)
    maker = Thread(target=asyncio.run, args=(create_database(place, name),))
    maker.start()
    maker.join()


_made: Final = set[str]()
sa.event.listen(sa.Engine, "do_connect", _make)

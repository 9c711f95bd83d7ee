"""Which errors mean that a service's database is in trouble, and what to do about each. It runs no statement."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy.engine import Dialect, ExceptionContext
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tidings._support.ownership import related
from tidings.errors import DatabaseMoved, DatabaseUnavailable

__all__ = [
    "advice_for",
    "is_contention",
    "is_lock_timeout",
    "is_outage",
    "is_refusal",
    "is_unusable",
    "marked",
    "outages",
    "stays_with_connections",
    "waits_for_itself",
]

# SQLite's result codes (sqlite.org/rescode.html) that say "the database", not "your statement".
_SQLITE_OUTAGES: Final = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOTADB,
    }
)

# PostgreSQL's (appendix A of its manual), for drivers whose errors SQLAlchemy does not class.
_REFUSED: Final = ("28", "3D000")
_RESOURCES: Final = ("53000", "53100", "53200", "53300")
_SYSTEM: Final = ("58000", "58030")
"""Without what a handler's own statement may bring about: too many temporary files, or a file that is not there."""
_SERVER_OUTAGES: Final = ("08", "25006", "25P03", "40001", "40P01", *_RESOURCES, "57P", *_SYSTEM, *_REFUSED)
"""Connection, a standby that takes no writes, idleness, serialization, deadlock, resources, shutdown, system."""
_TIMEOUTS: Final = ("55P03", "57014")
"""Codes of a lock timeout and a statement timeout, which the server's operator has set, or a handler for itself."""

_PASSING: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def is_outage(error: BaseException, dialect: Dialect | None = None) -> bool:
    """Return whether the error means that a service's database is down, locked or full, so that no handler is to blame.

    With `dialect`, only the database whose engine has this dialect object counts; else any service's. An error of any
    other engine, which a handler may use for something else, is the handler's.
    """
    if isinstance(error, DatabaseUnavailable | PoolTimeout):
        return dialect is None and not isinstance(error, DatabaseMoved)  # it does not come back by itself
    if not isinstance(error, DBAPIError) or not _is_of(error, dialect):
        return False
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _SQLITE_OUTAGES
    if error.connection_invalidated:
        return True
    state = _state(error)
    # An InterfaceError of a connection that is whole is about what the driver was given. An InternalError is asyncpg's,
    # for a statement that follows the server's goodbye.
    return state.startswith(_SERVER_OUTAGES) if state else isinstance(error, OperationalError | InternalError)


def _is_of(error: BaseException, dialect: Dialect | None) -> bool:
    owner = getattr(error, "_tidings", None)
    return owner is not None and (dialect is None or owner is dialect)


def _state(error: BaseException) -> str:
    """Return PostgreSQL's error code, or "". Older versions of SQLAlchemy let a driver's own errors pass while it
    connects."""
    return str(getattr(getattr(error, "orig", error), "sqlstate", None) or "")


def is_contention(error: BaseException, dialect: Dialect | None = None) -> bool:
    """Was another transaction of the same database in its way, by a deadlock or because it could not be serialized?

    With `dialect`, only of the database whose engine has this dialect object; else of any service's."""
    return any(
        isinstance(each, DBAPIError) and _is_of(each, dialect) and _state(each).startswith("40")
        for each in related(error)
    )


def is_lock_timeout(error: BaseException) -> bool:
    """Return whether PostgreSQL gave up waiting for a lock."""
    return any(isinstance(each, DBAPIError) and _state(each) == "55P03" for each in related(error))


def is_refusal(error: BaseException) -> bool:
    """Return whether the user is not let in, or there is no such database: only a person can mend that, at any time."""
    return _state(error).startswith(_REFUSED)


def is_unusable(error: DBAPIError) -> bool:
    """Return whether PostgreSQL refuses the statement only because one before it failed in the same savepoint."""
    return _state(error) == "25P02"


_OF_CONNECTIONS: Final = ("08", "25006", "57P")
"""Codes after which PostgreSQL connections may be useless for good: the server is a standby now, is shutting down, or
was read-only when they began (`default_transaction_read_only` is read only then)."""
_OF_FILES: Final = frozenset(
    {
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_NOTADB,
    }
)
"""Codes of SQLite after which the file may be another one of the same name."""


def stays_with_connections(error: BaseException) -> bool:
    """Return whether the connections may be at fault rather than the database, so that only fresh ones can tell."""
    if not isinstance(error, DBAPIError):
        return False
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _OF_FILES
    return error.connection_invalidated or _state(error).startswith(_OF_CONNECTIONS)


def waits_for_itself(error: BaseException, dialect: Dialect) -> bool:
    """Return whether a handler with a session has failed because it wrote to its SQLite database through another
    connection, and so waited for the one writer that it holds itself."""
    if not isinstance(error, DBAPIError) or not _is_of(error, dialect):
        return False
    code = getattr(error.orig, "sqlite_errorcode", 0)
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def marked(context: ExceptionContext) -> None:
    """Mark an error with the dialect object of its engine, so that the service's own can be told from any other's.

    It is a listener. Engines that are made from one engine share the dialect object.
    """
    if context.sqlalchemy_exception is not None:
        context.sqlalchemy_exception._tidings = context.dialect  # type: ignore[attr-defined]


@contextmanager
def outages(database: str) -> Iterator[None]:
    """Turn the database's own failures into `DatabaseUnavailable` with the remedy; let the rest pass."""
    try:
        yield
    except (DBAPIError, PoolTimeout) as error:
        state = _state(error)
        if isinstance(error, PoolTimeout) or is_outage(error) or state in _TIMEOUTS:
            code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
            passing = not is_refusal(error) if code is None else code & 0xFF in _PASSING
            raise DatabaseUnavailable(f"database {database}: {_remedy(error)}", waiting_helps=passing) from error
        raise


_ADVICE: Final = {
    ("3D000",): "; create it (createdb NAME), or correct its name in TIDINGS_DATABASE",
    ("28",): "; check user and password in TIDINGS_DATABASE, and what pg_hba.conf allows",
    ("25006",): "; it takes no writes, as a standby does: name the primary in TIDINGS_DATABASE",
    ("40",): "; another transaction was in its way: a service does its own again, and any other can be done again",
    ("53100",): "; free some space",
    ("53300",): "; raise its max_connections, or look for who holds so many",
    _TIMEOUTS: "; its lock_timeout or statement_timeout is too short, or somebody holds a lock for long",
}
"""What to do, by the beginning of PostgreSQL's code."""


def advice_for(error: BaseException) -> str:
    """Return what to do about an error of PostgreSQL, beginning with a semicolon; "" where nothing is known."""
    state = _state(error)
    return next((advice for states, advice in _ADVICE.items() if state.startswith(states)), "")


def _remedy(error: DBAPIError | PoolTimeout) -> str:
    if isinstance(error, PoolTimeout):
        return "no connection became free: look for who holds one, or raise ?connections= in TIDINGS_DATABASE"
    code = getattr(error.orig, "sqlite_errorcode", None)
    cause = f"{error.orig}"
    if code is None:
        advice = advice_for(error)
        return f"{cause}{advice}. Nothing is lost: the service goes on where it was when the database answers again"
    advice = {
        sqlite3.SQLITE_BUSY: "another process holds the writer: find it (lsof on the file) and let it finish",
        sqlite3.SQLITE_LOCKED: "another process holds the writer: find it (lsof on the file) and let it finish",
        sqlite3.SQLITE_READONLY: "make the file and its folder writable for this user",
        sqlite3.SQLITE_PERM: "make the file and its folder writable for this user",
        sqlite3.SQLITE_CANTOPEN: "make sure that the folder exists and is writable for this user",
        sqlite3.SQLITE_FULL: "the disk is full: free some space",
        sqlite3.SQLITE_IOERR: "the disk failed or is full: look at the system's log",
        sqlite3.SQLITE_CORRUPT: "the file is damaged: restore it from a backup",
        sqlite3.SQLITE_NOTADB: "the file is no SQLite database: check the path",
    }.get(code & 0xFF, "see sqlite.org/rescode.html")
    return f"{cause}; {advice}. Nothing is lost"

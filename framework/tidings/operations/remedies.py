"""Advice for a log or a database that can be read, but takes no writes, in the same words everywhere."""

from __future__ import annotations

from shlex import quote
from typing import Final

from sqlalchemy import URL

__all__ = ["STORE_WRITABLE", "client_for", "origin_of", "writable", "writes_refused"]

STORE_WRITABLE: Final = (
    "free the disk of the store's machine (df -h), or make it writable: nothing can be appended until then. What "
    "services emit waits in their databases, and goes on by itself"
)
"""Advice for a log that takes no appends."""


def writes_refused(error: str) -> str:
    """Return the problem's description for a log that takes no appends."""
    return f"the log can be read, but takes no appends: {error}"


def client_for(url: URL) -> str:
    """Return the `psql` command that opens a PostgreSQL database as its service does; "" for any other database.

    It does not contain the password: `psql` asks for it.
    """
    if url.get_backend_name() != "postgresql":
        return ""
    said = {
        "-h": url.host or _first(url.query.get("host")),
        "-p": str(url.port) if url.port else _first(url.query.get("port")),
        "-U": url.username or _first(url.query.get("user")),
        "-d": url.database or _first(url.query.get("database")),
    }
    return " ".join(["psql", *(f"{option} {quote(value)}" for option, value in said.items() if value)])


def origin_of(url: URL, shown: str, error: str) -> str:
    """Return a text that is the same for outages of all databases on one server; "" for a file.

    It is the server's address, and the error without the database's URL, which `shown` is.
    """
    host = url.host or _first(url.query.get("host"))
    return f"{host}:{url.port or _first(url.query.get('port'))} {error.replace(shown, '')}" if host else ""


def _first(value: str | tuple[str, ...] | None) -> str:
    return value if isinstance(value, str) else value[0] if value else ""


def writable(place: str, client: str = "") -> str:
    """Return advice for a database that takes no writes.

    `place` is its file or URL. `client` is the command that opens it, if it is on a server.
    """
    goes_on = "the service goes on by itself, and nothing is lost"
    if "://" in place:
        if not client:
            return f"free its disk, or let it take writes ({place}). Then {goes_on}"
        look = f"{client} -c 'SHOW transaction_read_only' -c 'SELECT pg_is_in_recovery()'"
        return (
            f"free its disk, or let it take writes: {look}  says 'on' if it is read-only, and 't' if it is a standby: "
            f"then name the primary in TIDINGS_DATABASE. Then {goes_on}"
        )
    return (
        f"free its disk or make it writable: df -h '{place}'; ls -l '{place}'; findmnt -T '{place}' (is it mounted "
        f"ro?); lsof '{place}' (does somebody hold it?). Then {goes_on}"
    )

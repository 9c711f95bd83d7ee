"""The URL of a log in PostgreSQL: the hosts that it names, and what of it asyncpg is given. It connects nowhere."""

from __future__ import annotations

from typing import Final, NamedTuple
from urllib.parse import parse_qs, urlencode

from tidings.errors import ConfigurationError
from tidings.urls import redact

__all__ = ["Addresses", "Host", "addresses_of"]

READERS: Final = 4
"""Connections that read, at most. `?connections=` in the URL says another number."""

_IGNORED: Final = {
    # The store limits the time of everything itself.
    *("connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
    *("tcp_user_timeout", "command_timeout", "timeout"),
    # It plans each statement once for a connection, speaks UTF-8, and has one name.
    *("prepared_statement_cache_size", "statement_cache_size", "async_fallback"),
    *("client_encoding", "fallback_application_name"),
}
"""Options of libpq and of SQLAlchemy that change nothing here, so that the URL of a service's database can be used."""
_NOT_REQUIRED: Final = {"gssencmode", "channel_binding"}
"""Options of libpq for what asyncpg cannot do. They may be in the URL unless they demand it."""


class Host(NamedTuple):
    """One host of the URL."""

    dsn: str
    """What asyncpg is given."""
    shown: str
    """The same for errors, without the password."""


class Addresses(NamedTuple):
    hosts: list[Host]
    readers: int
    """Connections that read, at most."""


def addresses_of(url: str) -> Addresses:
    """Raises `ConfigurationError` for a URL that cannot be meant. What asyncpg refuses is not noticed here."""
    shown = redact(url)
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in ("postgresql", "postgres", "postgresql+asyncpg"):
        raise ConfigurationError(f"{shown!r} names no PostgreSQL: write postgresql://user:password@host/database")
    rest, _, query = rest.partition("?")
    options = {name: ",".join(values) for name, values in parse_qs(query, keep_blank_values=True).items()}
    readers = options.pop("connections", str(READERS))
    if not readers.isdecimal() or not 1 <= int(readers) <= 1000:
        raise ConfigurationError(
            f"TIDINGS_STORE {shown}: connections= is no whole number from 1: as in ?connections={READERS}"
        )
    authority, _, database = rest.partition("/")
    if not database and not options.get("database") and not options.get("dbname"):
        raise ConfigurationError(
            f"TIDINGS_STORE {shown} names no database: write postgresql://user:password@host/database"
        )
    options = _understood(options, shown)
    user, at, hosts = authority.rpartition("@")
    if not hosts and options.get("host"):
        named = [
            (f"{user}{at}/{database}", {**options, **each})
            for each in _hosts_of(options.pop("host"), options.pop("port", ""), shown)
        ]
    else:
        named = [(f"{user}{at}{host}/{database}", options) for host in hosts.split(",") if host or not hosts]
    dsns = [f"postgresql://{place}?{urlencode(each)}" for place, each in named]
    return Addresses([Host(dsn, redact(dsn) if len(dsns) > 1 else shown) for dsn in dsns], int(readers))


def _understood(options: dict[str, str], shown: str) -> dict[str, str]:
    """The options that asyncpg knows, and those that it hands on to the server as settings."""
    for name in _NOT_REQUIRED & options.keys():
        if options[name] == "require":
            raise ConfigurationError(
                f"TIDINGS_STORE {shown} demands {name}=require, which the driver (asyncpg) cannot do: write "
                f"{name}=prefer, or leave it out; sslmode=verify-full makes sure of the server, too"
            )
    kept = {name: value for name, value in options.items() if name not in _IGNORED | _NOT_REQUIRED}
    if "ssl" in kept:  # as SQLAlchemy's URLs say it
        kept["sslmode"] = kept.pop("ssl")
    return {"application_name": "tidings", **kept}


def _hosts_of(hosts: str, ports: str, shown: str) -> list[dict[str, str]]:
    """The options host= and port= for each of the hosts that they name together."""
    names = [name for name in hosts.split(",") if name]
    numbers = ports.split(",")
    if len(numbers) == 1:
        numbers *= len(names)
    if len(numbers) != len(names) or not names:
        raise ConfigurationError(
            f"TIDINGS_STORE {shown} names {len(names)} hosts and {len(numbers)} ports: write one port for each host, "
            "or one for all"
        )
    return [{"host": name, **({"port": port} if port else {})} for name, port in zip(names, numbers, strict=True)]

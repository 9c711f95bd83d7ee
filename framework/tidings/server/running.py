"""The server as a process: options, signals, one line that says where it listens. It serves nothing itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Final

from tidings.errors import ConfigurationError
from tidings.hosting.signals import StopSignals
from tidings.logs import configure_logging
from tidings.server.budgets import Limits
from tidings.server.releases import EVENTSTOREDB, release_of
from tidings.server.serving import DEFAULT_PORT, EventStoreServer

__all__ = ["PASSWORDS", "run_server"]

PASSWORDS: Final = "TIDINGS_SERVER_USERS"
"""Users for TLS, as `name:password,...`: not an option, because everybody on the machine can read those."""


def run_server(
    db: str | None,
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    memory: bool = False,
    tls: bool = False,
    certificate: str | None = None,
    key: str | None = None,
    insecure: bool = False,
    remember_ids: bool = False,
    projections: bool = False,
    strict: bool = False,
    services: Sequence[str] = (),
    limits: Sequence[str] = (),
    release: str = EVENTSTOREDB.name,
) -> None:
    """Serve until SIGINT or SIGTERM, then drain; a second signal ends the process at once.

    `limits` are texts such as `streams=200`. Raises what `EventStoreServer` raises, and `ConfigurationError` for users
    or limits that cannot be read.
    """
    configure_logging()
    if (db is None) != memory:
        raise ConfigurationError("where is the log? Give a database, or say memory, and not both")
    server = EventStoreServer(
        db,
        host=host,
        port=port,
        tls=tls,
        certificate=certificate,
        key=key,
        users=_users(os.environ.get(PASSWORDS, "")),
        insecure=insecure,
        remember_ids=remember_ids,
        projections=projections,
        strict=strict,
        services=services,
        limits=_limits(limits, release_of(release).limits),
        release=release,
    )
    asyncio.run(_run(server))


def _users(text: str) -> dict[str, str]:
    users: dict[str, str] = {}
    for pair in filter(None, text.split(",")):
        name, separator, password = pair.strip().partition(":")
        if not separator or not name or not password:
            raise ConfigurationError(f"{PASSWORDS} is name:password,...: one of its parts has no name or no password")
        users[name] = password
    return users


def _limits(texts: Sequence[str], default: Limits) -> Limits:
    """From `name=number`; the others are as by default. Raises `ConfigurationError`."""
    known = {field.name: type(getattr(Limits(), field.name)) for field in fields(Limits)}
    chosen: dict[str, Any] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            chosen[name] = known[name](number)
        except (KeyError, ValueError):
            raise ConfigurationError(
                f"--limit {text!r} is no budget: write NAME=NUMBER, with one of the names {', '.join(known)}"
            ) from None
    try:
        return replace(default, **chosen)
    except ConfigurationError as error:
        raise ConfigurationError(f"--limit: {error}") from None


async def _run(server: EventStoreServer) -> None:
    with StopSignals() as signals:
        async with server:
            shown = server.uri if "@" not in server.uri else f"esdb://{server.uri.rpartition('@')[2]}"
            trust = f", its certificate is {server.certificate}" if server.certificate else ""
            print(f"tidings server: listening on {shown}{trust}", flush=True)
            ended = asyncio.create_task(server.wait())
            stop = asyncio.create_task(signals.requested.wait())
            await asyncio.wait([ended, stop], return_when=asyncio.FIRST_COMPLETED)
            stop.cancel()
            if ended.done():
                ended.result()
            ended.cancel()

"""The server as a process: options, signals, one line that says where it listens. It serves nothing itself."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

from tidings.errors import ConfigurationError, TidingsError
from tidings.logs import configure_logging
from tidings.server.serving import DEFAULT_PORT, EventStoreServer

__all__ = ["main", "run_server"]

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
) -> int:
    """Serve until SIGINT or SIGTERM, then drain. Returns an exit code: 0, 2 for options, 1 for anything else."""
    configure_logging()
    try:
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
        )
        asyncio.run(_run(server))
    except ConfigurationError as error:
        print(f"tidings server: {error}", file=sys.stderr)
        return 2
    except (TidingsError, OSError) as error:
        print(f"tidings server: {error}", file=sys.stderr)
        return 1
    return 0


def _users(text: str) -> dict[str, str]:
    users: dict[str, str] = {}
    for pair in filter(None, text.split(",")):
        name, separator, password = pair.strip().partition(":")
        if not separator or not name or not password:
            raise ConfigurationError(f"{PASSWORDS} is name:password,...: one of its parts has no name or no password")
        users[name] = password
    return users


async def _run(server: EventStoreServer) -> None:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked.set)
    async with server:
        shown = server.uri if "@" not in server.uri else f"esdb://{server.uri.partition('@')[2]}"
        trust = f", its certificate is {server.certificate}" if server.certificate else ""
        print(f"tidings server: listening on {shown}{trust}", flush=True)
        ended = asyncio.create_task(server.wait())
        stop = asyncio.create_task(asked.wait())
        await asyncio.wait([ended, stop], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if ended.done():
            ended.result()


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m tidings.server`."""
    parser = argparse.ArgumentParser(
        prog="python -m tidings.server",
        description="An EventStoreDB-compatible server over the embedded store.",
        epilog=f"Users for TLS come from {PASSWORDS}=name:password,... in the environment.",
    )
    parser.add_argument("--db", metavar="PATH", help="database file; made when it is not there")
    parser.add_argument("--memory", action="store_true", help="keep the log in memory, and lose it at the end")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 for a free one (%(default)s)")
    parser.add_argument("--tls", action="store_true", help="TLS and users; a certificate is made when none is given")
    parser.add_argument("--certificate", metavar="FILE", help="PEM file with the server's certificate")
    parser.add_argument("--key", metavar="FILE", help="PEM file with its key")
    parser.add_argument("--insecure", action="store_true", help="listen elsewhere than here without TLS and users")
    parser.add_argument("--remember-ids", action="store_true", help="keep ids of ANY appends over a restart")
    parser.add_argument("--projections", action="store_true", help="run the system projections from the start")
    options = parser.parse_args(arguments)
    return run_server(**vars(options))

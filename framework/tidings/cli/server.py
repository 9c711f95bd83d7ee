"""`tidings server`: runs an EventStoreDB-compatible server over the embedded store."""

from __future__ import annotations

from typing import Annotated

import typer

from tidings.cli._exits import USAGE, Refused, answering

__all__ = ["server"]


_Services = Annotated[
    list[str] | None,
    typer.Option(metavar="USER", help="A user who may read $all, as relays and services must. Repeat it for more."),
]
_Limits = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=NUMBER", help="A budget of the server, as streams=200. Repeat it for more."),
]
_Strict = Annotated[
    bool,
    typer.Option("--strict", help="Drop an append that is repeated while it is being written, as EventStoreDB does."),
]

_As = Annotated[
    str,
    typer.Option("--as", metavar="SERVER", help="Answer as eventstoredb-24.2 or kurrentdb-26.1, with its limits."),
]


@answering
def server(
    db: Annotated[str | None, typer.Option(metavar="PATH", help="Database file; created if there is none.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Keep the log in memory only.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 2113,
    tls: Annotated[
        bool, typer.Option("--tls", help="Use TLS and users; without --certificate, one is created.")
    ] = False,
    certificate: Annotated[str | None, typer.Option(metavar="FILE", help="PEM file with the certificate.")] = None,
    key: Annotated[str | None, typer.Option(metavar="FILE", help="PEM file with its key.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow other addresses than this machine's without TLS and users.")
    ] = False,
    remember_ids: Annotated[
        bool,
        typer.Option("--remember-ids", help="Remember ids of ANY appends over a restart. EventStoreDB does not."),
    ] = False,
    projections: Annotated[
        bool, typer.Option("--projections", help="Run $by_category and $by_event_type from the start.")
    ] = False,
    service: _Services = None,
    limit: _Limits = None,
    strict: _Strict = False,
    answer_as: _As = "eventstoredb-24.2",
) -> None:
    """Serve EventStoreDB's protocol from a file until Ctrl-C or SIGTERM: for tests, laptops and small machines.

    Clients connect with esdb://127.0.0.1:2113?tls=false. Users for --tls come from the environment:
    TIDINGS_SERVER_USERS=name:password,...
    """
    try:
        from tidings.server import run_server
    except ImportError as error:
        missing = (error.name or "").replace(" ", ".").partition(".")[0]
        if missing not in ("grpc", "esdbclient", "kurrentdbclient", "h2", "google"):
            raise
        raise Refused(
            USAGE,
            f"tidings server needs the package {error.name!r}: install it with  pip install 'tidings[kurrentdb]'",
        ) from error
    run_server(
        db,
        host=host,
        port=port,
        memory=memory,
        tls=tls,
        certificate=certificate,
        key=key,
        insecure=insecure,
        remember_ids=remember_ids,
        projections=projections,
        strict=strict,
        services=service or (),
        limits=limit or (),
        release=answer_as,
    )

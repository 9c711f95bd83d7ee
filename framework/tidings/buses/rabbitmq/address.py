"""Where an AMQP URL leads, as whom, with which client and options. It connects to nothing, and shows no password."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from pamqp import commands, frame

from tidings.buses.rabbitmq.tls import FILES, context_of, refuse_blindness
from tidings.errors import ConfigurationError

__all__ = ["CLIENTS", "Address", "address_of", "address_of_connection", "check_aiormq"]

CLIENTS: Final = ("pamqp", "aio-pika")
"""What `?client=` may say: the client of Tidings on pamqp, or aio-pika's."""

_OPTIONS: Final = ("heartbeat", "client", *FILES)


@dataclass(frozen=True)
class Address:
    """Where and as whom to connect; its text never shows the password. `heartbeat` in seconds."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    vhost: str
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    heartbeat: int = 10
    others: tuple[tuple[str, int], ...] = ()
    """Hosts and ports of further nodes of the same cluster."""
    client: str = "pamqp"
    """Which of `CLIENTS` speaks to it."""

    def each(self) -> list[Address]:
        """One address per node, in the order given."""
        nodes = ((self.host, self.port), *self.others)
        return [replace(self, host=host, port=port, others=()) for host, port in nodes]

    def __str__(self) -> str:
        nodes = ",".join(f"{host}:{port}" for host, port in ((self.host, self.port), *self.others))
        return f"{nodes}, vhost {self.vhost!r}, user {self.user!r}"


def address_of(url: str) -> Address:
    """Where an AMQP URL leads. The `ConfigurationError` of one that cannot be read never shows it: a password may stand
    anywhere in it."""
    try:
        url.encode()  # what no text is, the environment may hold all the same
        parts = urlsplit(url)
        login, _, places = parts.netloc.rpartition("@")
        nodes = [(place.hostname, place.port) for place in map(urlsplit, (f"//{at}" for at in places.split(",")))]
        for host, _ in nodes:
            (host or "").encode("idna")  # as the resolver does
    except ValueError:
        parts, login, nodes = urlsplit(""), "", [(None, None)]
    user, _, password = login.partition(":")
    if (
        not all(host for host, _ in nodes)
        or parts.fragment
        or "/" in parts.path[1:]
        or "@" in parts.path + parts.query
        or ("@" in login and "," in login)  # a user and password for each host
    ):
        raise ConfigurationError(
            "the RabbitMQ URL cannot be read: write amqp://user:password@host:5672/vhost, or for a cluster "
            "amqp://user:password@host1:5672,host2:5672/vhost, and in user, password and vhost '/' as %2F, '@' as %40, "
            "'#' as %23, '?' as %3F, '%' as %25"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        refuse_blindness(unknown[0])
        raise ConfigurationError(
            f"the RabbitMQ URL has the unknown option {unknown[0]!r}; known: {', '.join(_OPTIONS)}"
        )
    heartbeat = options.get("heartbeat", "10")
    if not heartbeat.isdecimal() or not 1 <= int(heartbeat) <= 60:
        raise ConfigurationError(f"the RabbitMQ URL says heartbeat={heartbeat!r}: it must be 1 to 60 seconds")
    client = options.get("client", CLIENTS[0])
    if client not in CLIENTS:
        raise ConfigurationError(f"the RabbitMQ URL says client={client!r}: it must be {' or '.join(CLIENTS)}")
    tls = None
    if parts.scheme.lower() == "amqps":
        tls = context_of(options)
    elif options.keys() & set(FILES):
        raise ConfigurationError("the RabbitMQ URL names certificates, but begins with amqp://: write amqps://")
    default = 5672 if tls is None else 5671
    (host, port), *others = [(host or "", port or default) for host, port in nodes]
    vhost = unquote(parts.path[1:]) or "/"
    try:
        frame.marshal(commands.Connection.Open(virtual_host=vhost), 0)
    except ValueError as error:
        raise ConfigurationError(f"the RabbitMQ URL names a vhost of {len(vhost)} characters: {error}") from None
    return Address(
        host=host,
        port=port,
        others=tuple(others),
        user=unquote(user or "guest"),
        password=unquote(password or "guest"),
        vhost=vhost,
        tls=tls,
        heartbeat=int(heartbeat),
        client=client,
    )


def address_of_connection(connection: Any) -> Address:
    """Return where a connection of aio-pika leads, as errors and permissions name it."""
    url = connection.url
    return Address(
        host=url.host or "",
        port=url.port or 5672,
        user=url.user or "guest",
        password=url.password or "guest",
        vhost=url.path[1:] or "/",
    )


def check_aiormq() -> None:
    """Raise `ConfigurationError` where the aiormq under aio-pika is too old, `ImportError` where there is none.

    Before 7.1 it does not tell that a queue was deleted, and before 7 its pamqp cannot write -1 in a header.
    """
    found = version("aiormq")
    if tuple(int(part) for part in found.split(".")[:2]) < (7, 1):
        raise ConfigurationError(
            f"client=aio-pika needs aio-pika 10 with aiormq 7.1, but aiormq {found} is installed: install it with  "
            "pip install 'aio-pika>=10' 'aiormq>=7.1', or leave out client=aio-pika"
        )

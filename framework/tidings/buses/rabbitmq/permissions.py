"""Who may do what on RabbitMQ: one user for each service and each relay, and the definitions that make them. No I/O.

Each user has the name of the queue that is its own, and may:

| User | configure | write | read |
|---|---|---|---|
| `tidings.relay.NAME` | its lock's queue | the exchange `tidings.events` | nothing |
| `tidings.SERVICE` | its queues | its queues | its queues, and both exchanges |

Binding a queue needs write on the queue and read on the exchange (AMQP 0-9-1 has no permissions; these are RabbitMQ's,
rabbitmq.com/docs/access-control). Write on a queue does not let anybody publish into it: that is write on the default
exchange, `amq.default`. Nobody may make or delete an exchange or bind `tidings.partitions`, because who can bind an
exchange can publish to it: so the definitions bring them. Queues are not among them: a service makes its own, as many
as its database says.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tidings.buses.rabbitmq.topology import EXCHANGE, LOCK, PARTITIONS

__all__ = ["definitions", "password_hash", "relay_user", "service_user"]

_NOTHING: Final = "^$"
_SALT: Final = 4
"""Bytes; RabbitMQ's format has no room for more, so a password must be long by itself."""


def service_user(service: str) -> str:
    """The user of a service; no service's name has a dot, so it is nobody else's."""
    return f"tidings.{service}"


def relay_user(name: str) -> str:
    """The user of all relays of one name, which take turns."""
    return LOCK + name


def definitions(
    vhost: str, services: Sequence[str], relays: Sequence[str], passwords: Mapping[str, str]
) -> dict[str, Any]:
    """What `rabbitmqctl import_definitions` takes; importing it again changes nothing but salts.

    A user that `passwords` does not name has no password, and loses one it had: it cannot log in before
    `rabbitmqctl change_password`.
    """
    users = [*map(relay_user, relays), *map(service_user, services)]
    allowed = [*map(_of_relay, relays), *map(_of_service, services)]
    exchange = {"vhost": vhost, "durable": True, "auto_delete": False, "internal": False, "arguments": {}}
    return {
        "vhosts": [{"name": vhost}],
        "users": [
            {
                "name": user,
                "password_hash": password_hash(passwords[user]) if user in passwords else "",
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": "",
            }
            for user in users
        ],
        "permissions": [
            {"user": user, "vhost": vhost, "configure": configure, "write": write, "read": read}
            for user, (configure, write, read) in zip(users, allowed, strict=True)
        ],
        "exchanges": [
            {"name": EXCHANGE, "type": "fanout"} | exchange,
            {"name": PARTITIONS, "type": "direct"} | exchange,
        ],
        "bindings": [
            {
                "source": EXCHANGE,
                "vhost": vhost,
                "destination": PARTITIONS,
                "destination_type": "exchange",
                "routing_key": "",
                "arguments": {},
            }
        ],
    }


def password_hash(password: str, salt: bytes | None = None) -> str:
    """As RabbitMQ keeps it: base64 of salt and SHA-256 (rabbitmq.com/docs/passwords)."""
    salt = secrets.token_bytes(_SALT) if salt is None else salt
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode("ascii")


def _of_relay(name: str) -> tuple[str, str, str]:
    return f"^{re.escape(relay_user(name))}$", f"^{re.escape(EXCHANGE)}$", _NOTHING


def _of_service(service: str) -> tuple[str, str, str]:
    name = re.escape(service)
    own = rf"^tidings\.{name}(\.[0-9]+)?$"
    return own, own, rf"^tidings\.(events|partitions|{name}(\.[0-9]+)?)$"

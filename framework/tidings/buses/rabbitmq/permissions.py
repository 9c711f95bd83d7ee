"""Who may do what and how much on RabbitMQ: one user for each service and each relay, and the definitions that make
them. No I/O.

Each user has the name of the queue that is its own, and may:

| User | configure | write | read |
|---|---|---|---|
| `tidings.relay.NAME` | its lock's queue | the exchange `tidings.events` | nothing |
| `tidings.SERVICE` | its queues | its queues | its queues, and both exchanges |

Binding a queue needs write on the queue and read on the exchange (AMQP 0-9-1 has no permissions; these are RabbitMQ's,
rabbitmq.com/docs/access-control). Write on a queue does not let anybody publish into it: that is write on the default
exchange, `amq.default`. Nobody may make or delete an exchange or bind `tidings.partitions`, because who can bind an
exchange can publish to it: so the definitions bring them. Queues are not among them: a service makes its own. Its
queues are named one by one, because a queue that it does not need, bound to `tidings.events`, could refuse what the
relay publishes, or fill the broker's disk.

How much: each user has a number of connections and channels, and a policy lets every queue of Tidings drop its oldest
messages beyond `QUEUE_BYTES`, which heals from the log. For a quorum queue a policy outdoes the arguments that it was
declared with (RabbitMQ 3.10), so none of them can be made to refuse messages instead; for a classic queue it does not.
A stream knows no overflow, so another policy bounds what a service may declare as one.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tidings.buses import Subscription
from tidings.buses.rabbitmq.topology import EXCHANGE, LOCK, PARTITIONS, QUEUE_BYTES

__all__ = ["CHANNELS", "CONNECTIONS", "definitions", "password_hash", "relay_user", "service_user"]

CONNECTIONS: Final = 64
"""Connections that a user may have at once; a service's as many for each of its queues."""
CHANNELS: Final = 16
"""Channels that a user may have at once for each of its connections. Tidings opens a few."""
POLICY: Final = "tidings.limits"
"""Name of the policy for all queues of Tidings. Its priority is -1: any other policy goes first."""
STREAMS: Final = "tidings.limits.streams"
"""Name of the policy for what the first one does not apply to. Its priority is -2."""
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
    vhost: str, queues: Sequence[Subscription], relays: Sequence[str], passwords: Mapping[str, str]
) -> dict[str, Any]:
    """What `rabbitmqctl import_definitions` takes; importing it again changes nothing but salts.

    `queues` are all that services may make, each for the user of its service.
    A user that `passwords` does not name has no password, and loses one it had: it cannot log in before
    `rabbitmqctl change_password`.
    """
    own: dict[str, list[str]] = {}
    for part in queues:
        own.setdefault(part.service, []).append(part.queue)
    users = [*map(relay_user, relays), *map(service_user, own)]
    allowed = [*map(_of_relay, relays), *map(_of_service, own.values())]
    limits = [CONNECTIONS] * len(relays) + [CONNECTIONS * len(names) for names in own.values()]
    exchange = {"vhost": vhost, "durable": True, "auto_delete": False, "internal": False, "arguments": {}}
    return {
        "vhosts": [{"name": vhost}],
        "users": [
            {
                "name": user,
                "password_hash": password_hash(passwords[user]) if user in passwords else "",
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": "",
                "limits": {"max-connections": limit, "max-channels": CHANNELS * limit},
            }
            for user, limit in zip(users, limits, strict=True)
        ],
        "permissions": [
            {"user": user, "vhost": vhost, "configure": configure, "write": write, "read": read}
            for user, (configure, write, read) in zip(users, allowed, strict=True)
        ],
        "policies": [
            _policy(vhost, POLICY, -1, {"max-length-bytes": QUEUE_BYTES, "overflow": "drop-head"}),
            _policy(vhost, STREAMS, -2, {"max-length-bytes": QUEUE_BYTES}),
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


def _policy(vhost: str, name: str, priority: int, definition: Mapping[str, Any]) -> dict[str, Any]:
    where = {"vhost": vhost, "pattern": r"^tidings\.", "apply-to": "queues"}
    return {"name": name, "priority": priority, "definition": definition} | where


def password_hash(password: str, salt: bytes | None = None) -> str:
    """As RabbitMQ keeps it: base64 of salt and SHA-256 (rabbitmq.com/docs/passwords)."""
    salt = secrets.token_bytes(_SALT) if salt is None else salt
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode("ascii")


def _of_relay(name: str) -> tuple[str, str, str]:
    return f"^{re.escape(relay_user(name))}$", f"^{re.escape(EXCHANGE)}$", _NOTHING


def _of_service(queues: Sequence[str]) -> tuple[str, str, str]:
    own = "|".join(map(re.escape, dict.fromkeys(queues)))
    return f"^({own})$", f"^({own})$", f"^({re.escape(EXCHANGE)}|{re.escape(PARTITIONS)}|{own})$"

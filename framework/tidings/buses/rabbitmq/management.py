"""The queues that RabbitMQ's management API lists: AMQP itself lists none. It only reads."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from typing import Any, Final
from urllib.error import URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

from tidings.buses import Found
from tidings.buses.rabbitmq.topology import EXCHANGE
from tidings.errors import BusUnavailable, ConfigurationError
from tidings.urls import redact

__all__ = ["listed_queues"]

_SECONDS: Final = 10.0
"""Seconds to wait for each answer of the management API."""
_OURS: Final = re.compile(r"tidings\.(?!relay\.)")
"""Begins the names of services' queues, and not those of relays' locks."""


async def listed_queues(management: str, user: str, password: str, vhost: str) -> list[Found]:
    """Return the queues of a vhost that have Tidings' names, or are bound to its exchange.

    `management` is the API's URL, `http://host:15672`; a user and password in it take the place of the others. Raises
    `ConfigurationError` for another kind of URL, and `BusUnavailable`.
    """
    parts = urlsplit(management)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"--management {redact(management)!r}: write http://host:15672")
    user, password = unquote(parts.username or user), unquote(parts.password or password)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    base = f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path.rstrip('/')}/api"
    token = base64.b64encode(f"{user}:{password}".encode()).decode()

    def ask(path: str) -> Any:
        request = Request(f"{base}/{path}", headers={"Authorization": f"Basic {token}"})
        with urlopen(request, timeout=_SECONDS) as answer:  # nosec B310: the scheme is checked above
            return json.load(answer)

    try:
        where = quote(vhost, safe="")
        bound = await asyncio.to_thread(ask, f"exchanges/{where}/{quote(EXCHANGE, safe='')}/bindings/source")
        queues = await asyncio.to_thread(ask, f"queues/{where}")
        there = {str(queue["name"]): queue for queue in queues}
        names = {str(one["destination"]) for one in bound if one["destination_type"] == "queue"}
        names |= {name for name in there if _OURS.match(name)}
        return [
            Found("queue", name, "fits", "", there[name].get("messages_ready"), there[name].get("consumers"))
            for name in sorted(names & there.keys())
        ]
    except (URLError, OSError, ValueError, KeyError, TypeError) as error:
        raise BusUnavailable(
            f"the management API at {redact(management)} does not say which queues there are: {error}. Check host, "
            "port and user; it is a plugin:  rabbitmq-plugins enable rabbitmq_management"
        ) from error

"""The queues and bindings that RabbitMQ's management API lists: AMQP itself lists none. It only reads."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from urllib.error import URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

from tidings.buses import Subscription, TopologyItem
from tidings.buses.rabbitmq.topology import EXCHANGE, PARTITIONS
from tidings.errors import BusUnavailable, ConfigurationError
from tidings.urls import redact

__all__ = ["drops_after", "foreign", "foreign_bindings", "limiting_policies", "listed_queues"]

_SECONDS: Final = 10.0
"""Seconds to wait for each answer of the management API."""
_OURS: Final = re.compile(r"tidings\.(?!relay\.)")
"""Begins the names of services' queues, and not those of relays' locks."""
_SERVICE: Final = re.compile(r"tidings\.(?!relay\.)([a-z0-9][a-z0-9_-]*)(?:\.[0-9]+)?")
"""The name of a service's queue."""


async def listed_queues(management: str, user: str, password: str, vhost: str) -> list[TopologyItem]:
    """Return the queues of a vhost that have Tidings' names, or are bound to its exchange.

    `management` is the API's URL, `http://host:15672`; a user and password in it take the place of the others. Raises
    `ConfigurationError` for another kind of URL, and `BusUnavailable`.
    """
    ask, where = _asking(management, user, password), quote(vhost, safe="")
    with _answering(management, "queues"):
        bound = await asyncio.to_thread(ask, f"exchanges/{where}/{quote(EXCHANGE, safe='')}/bindings/source")
        queues = await asyncio.to_thread(ask, f"queues/{where}")
        there = {str(queue["name"]): queue for queue in queues}
        names = {str(one["destination"]) for one in bound if one["destination_type"] == "queue"}
        names |= {name for name in there if _OURS.match(name)}
        return [
            TopologyItem("queue", name, "fits", "", there[name].get("messages_ready"), there[name].get("consumers"))
            for name in sorted(names & there.keys())
        ]


async def limiting_policies(
    management: str, user: str, password: str, vhost: str, subscriptions: Sequence[Subscription]
) -> list[TopologyItem]:
    """Return the policies that give a delivery limit to queues of these partitions. Raises as `listed_queues` does."""
    ask, names = _asking(management, user, password), {part.queue for part in subscriptions}
    with _answering(management, "queues"):
        found = []
        for queue in await asyncio.to_thread(ask, f"queues/{quote(vhost, safe='')}"):
            policy = dict(queue.get("effective_policy_definition") or {}).get("delivery-limit")
            argument = dict(queue.get("arguments") or {}).get("x-delivery-limit")
            if queue["name"] in names and policy is not None and drops_after(argument, policy) == policy:
                policies = " or ".join(str(queue[kind]) for kind in ("policy", "operator_policy") if queue.get(kind))
                name = str(queue["name"])
                found.append(TopologyItem("policy", f"{policies} -> {name}", "differs", _drops(name, policy, vhost)))
        return found


def drops_after(argument: int | None, policy: int) -> int | None:
    """Return the deliveries after which a quorum queue with a policy drops a message; None if it never does.

    As RabbitMQ decides: the lower of both counts, but a negative one, which means no limit, gives way to the other.
    """
    said = [policy] if argument is None else [argument, policy]
    limit = max(said) if min(said) < 0 else min(said)
    return limit if limit >= 0 else None


def _drops(queue: str, limit: int, vhost: str) -> str:
    return (
        f"queue {queue} drops each message that was delivered more than {limit} times. A service that crashes "
        "gives back all that it had taken, so after so many crashes all of that is dropped, and the service "
        "reads it from the log, which is slower. Take delivery-limit out of the policy: rabbitmqctl "
        f"list_policies --vhost {vhost}; rabbitmqctl list_operator_policies --vhost {vhost}; rabbitmqctl set_policy"
    )


async def foreign_bindings(
    management: str, user: str, password: str, vhost: str, subscriptions: Sequence[Subscription]
) -> list[TopologyItem]:
    """Return the bindings of Tidings' exchanges to queues and exchanges that these partitions do not need, and of other
    exchanges to their queues. Raises as `listed_queues` does."""
    ask = _asking(management, user, password)
    with _answering(management, "bindings"):
        listed = await asyncio.to_thread(ask, f"bindings/{quote(vhost, safe='')}")
        bindings = {(str(one["source"]), str(one["destination"]), str(one["destination_type"])) for one in listed}
    return foreign(bindings, subscriptions, vhost)


CARRYING: Final = (EXCHANGE, PARTITIONS)
"""The one binding between exchanges that is Tidings' own."""


def foreign(bindings: Iterable[tuple[str, str, str]], needed: Sequence[Subscription], vhost: str) -> list[TopologyItem]:
    """Return which of these bindings, each from a source to a destination of a type, are none of Tidings', where the
    services have the partitions `needed`. Nothing is said of services that have none of them."""
    found = []
    services = {part.service for part in needed}
    queues = {part.queue for part in needed}
    for source, destination, kind in sorted(bindings):
        ours = source in (EXCHANGE, PARTITIONS)
        service = _SERVICE.fullmatch(destination)
        if kind == "queue" and service is not None and service[1] not in services:
            continue  # of a service that is not named here
        if ours and (destination not in queues if kind == "queue" else destination != PARTITIONS):
            detail = (
                f"{kind} {destination!r} is bound to exchange {source!r}, and no service that is named here needs it: "
                "it gets every event, and if it refuses one, the relay hears of it. Whoever bound it may read all "
                f"events. If nobody should: rabbitmqctl delete_queue {destination} --vhost {vhost}, or unbind it"
            )
        elif source and not ours and kind == "queue" and destination in queues:
            detail = (
                f"exchange {source!r} is bound to the service's queue {destination!r}: whoever publishes there reaches "
                "the service past the relay. Unbind it (management page or rabbitmqadmin), and set TIDINGS_BUS_KEYS"
            )
        elif kind == "exchange" and destination in (EXCHANGE, PARTITIONS) and (source, destination) != CARRYING:
            detail = (
                f"exchange {source!r} is bound to exchange {destination!r}: whoever publishes there reaches every "
                "service past the relay. Unbind it (management page or rabbitmqadmin), and set TIDINGS_BUS_KEYS"
            )
        else:
            continue
        found.append(TopologyItem("binding", f"{source} -> {destination}", "differs", detail))
    return found


def _asking(management: str, user: str, password: str) -> Callable[[str], Any]:
    """Return what asks the API for a path. Raises `ConfigurationError`."""
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

    return ask


@contextmanager
def _answering(management: str, what: str) -> Iterator[None]:
    try:
        yield
    except (URLError, OSError, ValueError, KeyError, TypeError) as error:
        raise BusUnavailable(
            f"the management API at {redact(management)} does not say which {what} there are: {error}. Check host, "
            "port and user; it is a plugin:  rabbitmq-plugins enable rabbitmq_management"
        ) from error

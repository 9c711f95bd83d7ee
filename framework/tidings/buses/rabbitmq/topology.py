"""What Tidings needs on RabbitMQ: exchanges, and a quorum queue per partition of a service. It compares, never changes.

Comparing takes two steps. A passive declare says whether something exists, and needs no permission; an active one makes
the broker compare (or make) it, and answers a difference by closing the channel with a 406, which becomes
`TopologyMismatch`. So each declare has a channel of its own. Inspecting declares actively only what is there; no
declare compares without that, so what somebody deletes between the two is made anew, empty and unbound. Bindings cannot
be looked at over AMQP: provisioning makes them anew each time.

A service's only queue is bound to the fanout `tidings.events`. The queues of a divided one are bound to
`tidings.partitions`, a direct exchange behind the fanout, with the buckets of their partition, and with `marker`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, TypeVar, cast

import structlog
from pamqp import commands
from pamqp.base import Frame

from tidings.buses import Subscription, TopologyItem
from tidings.buses.rabbitmq.client import AmqpConnection, ChannelClosed
from tidings.errors import TopologyMismatch
from tidings.protocol.position import ALL_BUCKETS

__all__ = [
    "EXCHANGE",
    "LOCK",
    "PARTITIONS",
    "QUEUE_BYTES",
    "delete",
    "inspect",
    "provision",
    "routing_key",
]

EXCHANGE: Final = "tidings.events"
PARTITIONS: Final = "tidings.partitions"
LOCK: Final = "tidings.relay."
"""Followed by the relay's name: an exclusive queue that nothing is ever sent to."""
QUEUE_BYTES: Final = 1 << 30
"""Bytes of bodies in one queue; beyond it the oldest message is dropped, and the log heals the gap.

RabbitMQ's advice is to leave limits to policies, because an argument that differs from the declared one is a 406. But
a policy needs an administrator, and a stopped service must not fill the broker's disk where nobody thought of one. So
it is an argument, and the one whose difference is accepted: whoever declared the queue with another limit meant it. A
policy (`max-length-bytes`) can still make it smaller, because the broker takes the lower of both.
"""

_LIMIT: Final = "x-max-length-bytes"
_DELIVERIES: Final = "x-delivery-limit"
_TOLERATED: Final = (_LIMIT, _DELIVERIES)
"""Arguments of a queue that may have other values: then it is taken as it is, and what differs is said."""
_BOUNDLESS: Final = (4, 0)
"""The RabbitMQ from which on a quorum queue drops a message after 20 deliveries, unless its delivery limit is -1, which
earlier ones refuse. A consumer that crashes gives back all that it had, so each crash would count for every message
within its prefetch: after 20 crashes the queue would lose all of them to the log."""
_DIFFERENCE: Final = re.compile(
    r"inequivalent arg '(?P<name>[^']+)' for .*?: received (?P<wanted>.*?) but current is (?P<found>.*)", re.DOTALL
)
_VALUE: Final = re.compile(r"(?:the value )?'(?P<value>.*?)'(?: of type '.*')?", re.DOTALL)

_EXCHANGES: Final = {EXCHANGE: "fanout", PARTITIONS: "direct"}
_KEYS: Final = tuple(map(str, ALL_BUCKETS))
_MARKER: Final = "marker"

log = structlog.get_logger(__name__)

F = TypeVar("F", bound=Frame)
_Declare = commands.Exchange.Declare | commands.Queue.Declare


def routing_key(bucket: int | None) -> str:
    """Return the routing key of an event in this bucket, or of a marker. The fanout passes it on to `PARTITIONS`."""
    return _MARKER if bucket is None else _KEYS[bucket]


async def provision(connection: AmqpConnection, vhost: str, subscription: Subscription | None) -> None:
    """Make exchanges and the partition's queue, or see that they fit. Raises `TopologyMismatch`, `AmqpError`."""
    await _exchange(connection, vhost, EXCHANGE)
    if subscription is None:
        return
    exchange, keys, last = EXCHANGE, list[str](), ""
    if subscription.count > 1:
        exchange, keys, last = PARTITIONS, [_KEYS[bucket] for bucket in subscription.buckets], _MARKER
        await _exchange(connection, vhost, PARTITIONS)
        behind = commands.Exchange.Bind(destination=PARTITIONS, source=EXCHANGE)
        try:
            await (await connection.channel()).call(behind, commands.Exchange.BindOk)
        except ChannelClosed as error:
            if error.code != 403:  # a service may not: who made the exchanges has bound them
                raise
    queue = subscription.queue
    differs = await _queue(connection, vhost, queue, exists=await _waiting(connection, vhost, queue) is not None)
    if _LIMIT in differs:
        log.warning("bus.queue_limit_differs", queue=queue, vhost=vhost, wanted=QUEUE_BYTES, found=differs[_LIMIT])
    if _DELIVERIES in differs:
        log.warning("bus.delivery_limit_differs", queue=queue, vhost=vhost, wanted=-1, found=differs[_DELIVERIES])
    channel = await connection.channel()
    for key in keys:
        channel.tell(commands.Queue.Bind(queue=queue, exchange=exchange, routing_key=key, nowait=True))
    bind = commands.Queue.Bind(queue=queue, exchange=exchange, routing_key=last)
    await channel.call(bind, commands.Queue.BindOk)


async def delete(connection: AmqpConnection, subscriptions: Sequence[Subscription]) -> None:
    """Delete their queues, with what waits in them. Raises `AmqpError`."""
    channel = await connection.channel()
    for subscription in subscriptions:
        await channel.call(commands.Queue.Delete(queue=subscription.queue), commands.Queue.DeleteOk)


async def inspect(connection: AmqpConnection, vhost: str, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
    """What is there of what these services need. Raises `AmqpError`."""
    divided = any(subscription.count > 1 for subscription in subscriptions)
    found = [await _inspect_exchange(connection, vhost, name) for name in _EXCHANGES if name == EXCHANGE or divided]
    return found + [await _inspect_queue(connection, vhost, subscription.queue) for subscription in subscriptions]


def _declared(name: str) -> commands.Exchange.Declare:
    return commands.Exchange.Declare(exchange=name, exchange_type=_EXCHANGES[name], durable=True)


async def _exchange(connection: AmqpConnection, vhost: str, name: str) -> None:
    """Make it, or see that it fits."""
    wanted = _declared(name)
    there = await _there(connection, vhost, wanted, commands.Exchange.DeclareOk)
    await _compare(connection, vhost, wanted, commands.Exchange.DeclareOk, exists=there is not None)


async def _inspect_exchange(connection: AmqpConnection, vhost: str, name: str) -> TopologyItem:
    wanted = _declared(name)
    try:
        if await _there(connection, vhost, wanted, commands.Exchange.DeclareOk) is None:
            return TopologyItem("exchange", name, "missing")
        await _compare(connection, vhost, wanted, commands.Exchange.DeclareOk, exists=True)
    except TopologyMismatch as error:
        return TopologyItem("exchange", name, "differs", str(error))
    return TopologyItem("exchange", name, "fits")


async def _inspect_queue(connection: AmqpConnection, vhost: str, queue: str) -> TopologyItem:
    messages = consumers = None
    try:
        there = await _waiting(connection, vhost, queue)
        if there is None:
            return TopologyItem("queue", queue, "missing")
        messages, consumers = there.message_count, there.consumer_count
        differs = await _queue(connection, vhost, queue, exists=True)
    except TopologyMismatch as error:
        return TopologyItem("queue", queue, "differs", str(error), messages, consumers)
    detail = []
    if _LIMIT in differs:
        detail.append(f"its limit is {differs[_LIMIT]} bytes, not {QUEUE_BYTES}: taken as it is")
    if _DELIVERIES in differs:
        detail.append(_delivery_limit(queue, vhost, differs[_DELIVERIES]))
    return TopologyItem("queue", queue, "fits", ". ".join(detail), messages, consumers)


async def _waiting(connection: AmqpConnection, vhost: str, queue: str) -> commands.Queue.DeclareOk | None:
    return await _there(connection, vhost, commands.Queue.Declare(queue=queue), commands.Queue.DeclareOk)


def _delivery_limit(queue: str, vhost: str, found: str) -> str:
    """What it means that a queue was declared with this delivery limit on RabbitMQ 4, and what to do."""
    limit = f"it was declared with a delivery limit of {found}"
    if found == "none":
        limit = (
            "it was declared without a delivery limit, as on RabbitMQ 3; unless a policy says -1, RabbitMQ 4 takes 20"
        )
    return (
        f"{limit}. RabbitMQ drops a message that was delivered more often, as when a service crashes again and again, "
        "and the service reads it from the log. If it should wait instead, delete the queue: its service makes it "
        f"anew, and reads from the log what it held (rabbitmqctl delete_queue {queue} --vhost {vhost})"
    )


async def _queue(connection: AmqpConnection, vhost: str, queue: str, *, exists: bool) -> dict[str, str]:
    """Make or compare a service's queue; what was found of arguments that may differ and do."""
    arguments: dict[str, Any] = {
        "x-queue-type": "quorum",
        "x-single-active-consumer": True,
        "x-overflow": "drop-head",
        _LIMIT: QUEUE_BYTES,
    }
    if connection.version >= _BOUNDLESS:
        arguments[_DELIVERIES] = -1
    differs: dict[str, str] = {}
    while True:
        request = commands.Queue.Declare(queue=queue, durable=True, arguments=cast("Any", arguments))
        tolerated = [name for name in _TOLERATED if name not in differs]
        found = await _compare(connection, vhost, request, commands.Queue.DeclareOk, exists=exists, tolerated=tolerated)
        if found is None:
            return differs
        name, value = found
        differs[name] = value
        if re.fullmatch(r"-?\d+", value):
            arguments[name] = int(value)
        else:
            arguments.pop(name, None)


async def _there(connection: AmqpConnection, vhost: str, wanted: _Declare, reply: type[F]) -> F | None:
    """The broker's answer to a passive declare; None when there is nothing of that name."""
    if isinstance(wanted, commands.Queue.Declare):
        passive: Frame = commands.Queue.Declare(queue=wanted.queue, passive=True)
    else:
        passive = commands.Exchange.Declare(exchange=wanted.exchange, passive=True)
    try:
        return await (await connection.channel()).call(passive, reply)
    except ChannelClosed as error:
        if error.code == 405:
            raise _mismatch(vhost, wanted, error) from error
        if error.code != 404:
            raise
        return None


async def _compare(
    connection: AmqpConnection,
    vhost: str,
    wanted: _Declare,
    reply: type[Frame],
    *,
    exists: bool,
    tolerated: Sequence[str] = (),
) -> tuple[str, str] | None:
    """None when it is as wanted; else the first argument of those `tolerated` that differs, and what was found."""
    try:
        await (await connection.channel()).call(wanted, reply)
    except ChannelClosed as error:
        if error.code == 403 and exists:
            return None  # it is there, and this user may use but not declare it: nothing more can be known
        if error.code not in (405, 406):
            raise
        difference = _DIFFERENCE.search(error.text)
        if difference is not None and difference["name"] in tolerated:
            return difference["name"], _value(difference["found"])
        raise _mismatch(vhost, wanted, error) from error
    return None


def _mismatch(vhost: str, request: _Declare, error: ChannelClosed) -> TopologyMismatch:
    if isinstance(request, commands.Queue.Declare):
        kind, name = "queue", request.queue
    else:
        kind, name = "exchange", request.exchange
    difference = _DIFFERENCE.search(error.text)
    if difference is not None:
        fact = f"its {difference['name']} is {_value(difference['found'])}, but must be {_value(difference['wanted'])}"
    elif error.code == 405:
        fact = "another connection holds it as exclusive"
    else:
        fact = f"the broker says: {error.text}"
    if kind == "queue":
        remedy = (
            f"Stop what uses it, delete it (rabbitmqctl delete_queue {name} --vhost {vhost}) and start the service: it "
            "makes the queue anew and reads from the log what it held."
        )
    else:
        remedy = (
            f"Delete exchange {name!r} in vhost {vhost!r} (management page or rabbitmqadmin), then start relay and "
            "services: they make it anew with their bindings."
        )
    return TopologyMismatch(f"{kind} {name!r} of vhost {vhost!r} exists, but {fact}. {remedy}")


def _value(text: str) -> str:
    found = _VALUE.fullmatch(text.strip())
    return found["value"] if found is not None else text.strip()

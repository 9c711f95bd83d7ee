"""A `Message` as AMQP properties, and back: what the bus writes, and whatever it finds on a queue. No I/O."""

from __future__ import annotations

from tidings.buses.rabbitmq.content import Properties
from tidings.protocol.message import Message

__all__ = ["message_of", "properties_of"]


def properties_of(message: Message) -> Properties:
    return Properties(
        message.headers,
        message.content_type,
        message.correlation_id,
        message.message_id,
        message.type,
        message.app_id,
    )


def message_of(properties: Properties | None, body: bytes) -> Message:
    """Whatever is on the queue as a `Message`, with empty fields where a foreign publisher left them, or wrote what
    cannot be read."""
    if properties is None:
        return Message(body=body, message_id="", type="", content_type="")
    headers, content_type, correlation_id, message_id, kind, app_id = properties
    bucket = headers.get("tidings-bucket")
    return Message(
        body,
        message_id or "",
        kind or "",
        headers,
        content_type or "",
        correlation_id,
        app_id,
        bucket if type(bucket) is int else None,
    )

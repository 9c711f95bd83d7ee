"""One AMQP channel on pamqp: calls, publishes with confirms, deliveries. Knows nothing of sockets or of events.

What the broker says against one channel ends that channel alone; what is no AMQP raises, and ends the connection.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar, cast

from pamqp import commands, frame
from pamqp.base import Frame

from tidings.buses.rabbitmq.client import (
    AmqpError,
    Blame,
    ChannelClosed,
    ConnectionLost,
    OnClosed,
    OnDelivery,
    Outcome,
    conclude,
)
from tidings.buses.rabbitmq.content import Properties, body_size, pack, unpack

__all__ = ["Channel"]

FRAME: Final = struct.Struct(">BHI")
METHOD, CONTENT, BODY, HEARTBEAT = 1, 2, 3, 8
END: Final = b"\xce"
_ACK: Final = struct.Struct(">QB")
_DELIVER, _RETURN, _ACKED, _NACKED = (60 << 16) + 60, (60 << 16) + 50, (60 << 16) + 80, (60 << 16) + 120

F = TypeVar("F", bound=Frame)


@dataclass(slots=True)
class _Publish:
    future: asyncio.Future[Outcome]
    key: str | None
    blame: Blame | None
    returned: bool = False

    def end(self, outcome: Outcome | AmqpError) -> None:
        conclude(self.future, outcome, self.blame)


class _Content:
    """A message that is arriving: its method, then its header, then as many body frames as the header promised."""

    __slots__ = ("body", "method", "missing", "properties", "tag")

    def __init__(self, method: int, tag: int) -> None:
        self.method, self.tag = method, tag
        self.missing = 0
        self.properties: Properties | None = None
        self.body = bytearray()


def read_method(payload: bytes) -> Frame:
    """Raises whatever pamqp does for a method that cannot be read."""
    return cast("Frame", frame.unmarshal(FRAME.pack(METHOD, 0, len(payload)) + payload + END)[2])


class Wire(Protocol):
    """What a channel needs of its connection."""

    frame_max: int
    """Bytes of the largest frame."""

    @property
    def crowded(self) -> bool: ...

    def write(self, *parts: bytes) -> None: ...

    async def room(self) -> None: ...

    def forget(self, number: int) -> None: ...


class Channel:
    """One channel: calls, publishes with confirms, one consumer. Made by `Connection.channel`."""

    def __init__(self, connection: Wire, number: int) -> None:
        self._connection = connection
        self._number = number
        self._turn = asyncio.Lock()
        self._reply: asyncio.Future[Frame] | None = None
        self._content: _Content | None = None
        self._unconfirmed: dict[int, _Publish] = {}
        self._published = 0
        self._publish: dict[tuple[str, str], bytes] = {}
        """Exchange and routing key to the method frame that begins every message to them."""
        self._on_delivery: OnDelivery | None = None
        self._body_limit = 0
        self._on_closed: OnClosed | None = None
        self.closed: AmqpError | None = None
        """Why this channel is of no more use; None while it lives."""
        self.abandoned = 0
        """Messages that were unconfirmed when it closed: with one, the broker's complaint is about that one."""

    async def call(self, request: Frame, reply: type[F]) -> F:
        """Send a method and wait for its reply. Raises `AmqpError`; when cancelled, the channel is of no more use."""
        async with self._turn:
            if self.closed is not None:
                raise self.closed
            self._reply = asyncio.get_running_loop().create_future()
            self._connection.write(frame.marshal(request, self._number))
            try:
                answer = await self._reply
            except asyncio.CancelledError:
                self.fail(ChannelClosed(f"{request.name} was cancelled before its reply came"))
                raise
            finally:
                self._reply = None
        if not isinstance(answer, reply):
            raise ConnectionLost(f"the broker answered {request.name} with {answer.name}")
        return answer

    def tell(self, request: Frame) -> None:
        """Send a method that asks for no reply: what the broker has against it, the next call raises."""
        if self.closed is not None:
            raise self.closed
        self._connection.write(frame.marshal(request, self._number))

    @property
    def crowded(self) -> bool:
        """The broker reads slower than it is sent to: `room` before the next publish."""
        return self._connection.crowded

    async def room(self) -> None:
        """Wait until the socket takes more. Who waits first publishes first, and at once after this returns."""
        await self._connection.room()

    def publish(
        self, exchange: str, properties: Properties, body: bytes, blame: Blame | None = None, *, routing_key: str = ""
    ) -> asyncio.Future[Outcome]:
        """Send a mandatory message at once; the future is done when the broker has said what became of it. With
        `blame`, it raises what that makes of anything but a confirm.

        Raises `AmqpError` on a dead channel, `ValueError` or `TypeError` for properties that no frame can hold. Returns
        are matched by message id, and all unconfirmed messages of that id count as returned, or all there are if the
        return shows none (an id over 255 bytes is not sent): one too many is sent again, which is harmless; one too
        few would be lost.
        """
        if self.closed is not None:
            raise self.closed
        number, limit = self._number, self._connection.frame_max - 8
        content = pack(properties, len(body))
        if len(content) > limit:
            raise ValueError(f"its headers are {len(content) + 8} bytes, a frame of this broker ends at {limit + 8}")
        method = self._publish.get((exchange, routing_key))
        if method is None:
            publish = commands.Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=True)
            method = self._publish[exchange, routing_key] = frame.marshal(publish, number)
        parts = [method, FRAME.pack(CONTENT, number, len(content)), content, END]
        for start in range(0, len(body), limit):
            part = body[start : start + limit]
            parts += (FRAME.pack(BODY, number, len(part)), part, END)
        self._connection.write(*parts)
        self._published += 1
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._unconfirmed[self._published] = _Publish(future, properties.message_id or None, blame)
        return future

    async def consume(
        self, queue: str, prefetch: int, on_delivery: OnDelivery, on_closed: OnClosed, *, body_limit: int
    ) -> None:
        """Begin to consume: `on_delivery` for each message, `on_closed` once when no more can come.

        A body over `body_limit` bytes is delivered cut to one byte more, so that it can be told and takes no memory.
        """
        self._body_limit = body_limit
        await self.call(commands.Basic.Qos(prefetch_count=prefetch), commands.Basic.QosOk)
        self._on_delivery, self._on_closed = on_delivery, on_closed
        await self.call(commands.Basic.Consume(queue=queue, consumer_tag="tidings"), commands.Basic.ConsumeOk)

    def ack_through(self, tag: int) -> None:
        """Settle all deliveries up to `tag`; nothing happens on a dead channel, whose tags mean nothing any more."""
        if self.closed is None:
            self._connection.write(frame.marshal(commands.Basic.Ack(delivery_tag=tag, multiple=True), self._number))

    def fail(self, error: AmqpError) -> None:
        """End everything that waits on this channel with `error`."""
        if self.closed is not None:
            return
        self.closed = error
        self.abandoned = len(self._unconfirmed)
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(error)
        for publish in self._unconfirmed.values():
            publish.end(error)
        self._unconfirmed.clear()
        if self._on_closed is not None:
            self._on_closed(error)

    # ---- frames of this channel ----------------------------------------------------------

    def on_method(self, payload: bytes) -> None:
        method = int.from_bytes(payload[:4], "big")
        if method == _DELIVER:
            at = 5 + payload[4]
            self._content = _Content(method, int.from_bytes(payload[at : at + 8], "big"))
        elif method in (_ACKED, _NACKED):
            tag, flags = _ACK.unpack_from(payload, 4)
            self._confirmed(tag, bool(flags & 1), Outcome.CONFIRMED if method == _ACKED else Outcome.REFUSED)
        elif method == _RETURN:
            self._content = _Content(method, 0)
        else:
            answer = read_method(payload)
            if isinstance(answer, commands.Channel.Close):
                self._connection.write(frame.marshal(commands.Channel.CloseOk(), self._number))
                self._connection.forget(self._number)
                self.fail(ChannelClosed(answer.reply_text or "", answer.reply_code or 0))
            elif isinstance(answer, commands.Basic.Cancel):
                self.fail(
                    ChannelClosed("the broker cancelled the consumer: its queue was deleted, or its node is gone")
                )
            elif self._reply is not None and not self._reply.done():
                self._reply.set_result(answer)

    def on_header(self, payload: bytes) -> None:
        content = self._content
        if content is None:
            raise ConnectionLost("the broker sent a content header out of turn")
        content.missing = body_size(payload)
        content.properties = unpack(payload)
        if not content.missing:
            self._arrived(content)

    def on_body(self, payload: bytes) -> None:
        content = self._content
        if content is None:
            raise ConnectionLost("the broker sent a content body out of turn")
        content.missing -= len(payload)
        content.body += payload[: self._body_limit + 1 - len(content.body)]
        if content.missing <= 0:
            self._arrived(content)

    def _arrived(self, content: _Content) -> None:
        self._content = None
        if content.method == _DELIVER:
            if self._on_delivery is not None and self.closed is None:
                self._on_delivery(content.tag, content.properties, bytes(content.body))
            return
        key = (content.properties.message_id if content.properties is not None else None) or None
        for publish in self._unconfirmed.values():
            if key is None or publish.key == key:
                publish.returned = True

    def _confirmed(self, tag: int, multiple: bool, outcome: Outcome) -> None:
        unconfirmed = self._unconfirmed
        tags = [tag]
        if multiple:
            tags = []
            for sent in unconfirmed:  # in the order of publishing, so this stops at the first that is newer
                if sent > tag:
                    break
                tags.append(sent)
        for sent in tags:
            publish = unconfirmed.pop(sent, None)
            if publish is not None:
                publish.end(Outcome.RETURNED if publish.returned else outcome)

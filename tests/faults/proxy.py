"""A TCP proxy that misbehaves as networks do, and reads AMQP frames to do so at the worst place. It knows no events.

What is no AMQP passes in pieces as they come, so that only faults of whole connections can meet it.

It listens on the loopback interface alone. Without a fault, what passes is a little later and otherwise unchanged.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from pamqp import commands, frame

__all__ = ["Proxy"]

_FRAME: Final = struct.Struct(">BHI")
_METHOD: Final = 1
_GREETING: Final = b"AMQP"
_PUBLISH, _DELIVER = (60 << 16) + 40, (60 << 16) + 60
_ACK, _NACK = (60 << 16) + 80, (60 << 16) + 120
_AT_ONCE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends RST."""


class Proxy:
    """`async with Proxy(url) as proxy`: clients connect to `proxy.url`. A fault is a method, or an attribute that
    applies to existing and new connections."""

    def __init__(self, url: str, *, options: str = "") -> None:
        """Prepare a proxy. `options` are added to `proxy.url`, such as `"heartbeat=2"`."""
        self._place = urlsplit(url)
        self.reads = self._place.scheme.startswith("amqp")
        """Whether to read AMQP frames and count messages."""
        self._options = options
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._passable = asyncio.Event()
        self._passable.set()
        self.url = ""
        self.piece: int | None = None
        """Bytes per write; None passes data on as it comes."""
        self.delay = 0.0
        """Seconds that each part waits, in both directions."""
        self.cut_after: int | None = None
        """Messages in one direction after which a connection breaks, in the middle of the last one. Half of them must
        be confirmed or acknowledged by then, or nothing would ever get through."""
        self.swallow_confirms = False
        """Whether to drop the broker's confirms and nothing else."""
        self.cuts = self.confirms_swallowed = self.channels_spoilt = 0
        """Number of times that each fault had an effect."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        here = f"{self._place.netloc.rpartition('@')[0]}@127.0.0.1:{port}"
        self.url = self._place._replace(netloc=here, query=self._options).geturl()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        while self._links:
            await asyncio.sleep(0.01)

    @property
    def connections(self) -> int:
        return len(self._links)

    def cut(self) -> None:
        """Break every connection on both sides (RST)."""
        for link in self._links:
            link.ended.set()

    def black_hole(self) -> None:
        """Let nothing pass in either direction until `heal`, not even the end of a connection or a new one."""
        self._passable.clear()

    def heal(self) -> None:
        """Undo `black_hole`: what waited arrives, as if TCP sent it again."""
        self._passable.set()

    def forget(self) -> int:
        """Make every connection a black hole for good, as when a firewall has lost its table; new ones work. Return
        their number."""
        for link in self._links:
            link.forgotten.set()
        return len(self._links)

    def half_open(self) -> int:
        """Break the client's half of every connection without telling the broker. Return their number."""
        for link in self._links:
            link.lose_client()
        return len(self._links)

    def spoil_channels(self) -> int:
        """On every connection, let the client seem to acknowledge a message that was never delivered, just before it
        next publishes or acknowledges: the broker closes that channel (406). Return their number."""
        for link in self._links:
            link.to_be_spoilt = True
        return len(self._links)

    async def passable(self) -> None:
        """Wait for the end of the black hole."""
        await self._passable.wait()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(self, reader, writer)
        self._links.add(link)
        try:
            await link.run(self._place.hostname or "", self._place.port or 0)
        finally:
            self._links.discard(link)


class _Over(Exception):
    """Raised when a connection has ended."""


class _Link:
    """A client's connection to the proxy, and the proxy's to the broker."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._client = writer
        self._writers = [writer]
        self.ended = asyncio.Event()
        """Break the connection."""
        self.forgotten = asyncio.Event()
        """Let nothing pass any more."""
        self.to_be_spoilt = False
        self._messages = {_PUBLISH: 0, _DELIVER: 0}
        """Messages that have begun, by the method that carries them."""
        self._answered = 0
        """Messages that were confirmed or acknowledged. A connection either publishes or consumes."""

    def lose_client(self) -> None:
        self.forgotten.set()
        self._client.transport.abort()

    async def run(self, host: str, port: int) -> None:
        """Pass data on until one side ends or the connection is cut."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch())
                await self._gate()
                reader, writer = await asyncio.open_connection(host, port)
                self._writers.append(writer)
                for each in self._writers:
                    each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                tasks.create_task(self._pump(self._reader, writer, self._to_broker))
                tasks.create_task(self._pump(reader, self._client, self._to_client))
        except* (_Over, OSError):
            pass
        finally:
            for each in self._writers:
                await self._close(each)

    async def _watch(self) -> None:
        await self.ended.wait()
        raise _Over

    async def _gate(self) -> None:
        await self._proxy.passable()
        if self.forgotten.is_set():
            await self.ended.wait()

    async def _close(self, writer: asyncio.StreamWriter) -> None:
        if self.ended.is_set():
            with suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            writer.transport.abort()
        else:
            writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await writer.wait_closed()
        writer.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, passing: Callable[[bytes], Iterator[bytes]]
    ) -> None:
        """Pass data on, a frame at a time. The end of a connection is passed on, too, but not through a black hole."""
        proxy, kept = self._proxy, bytearray()
        while True:
            try:
                data = await source.read(1 << 16)
            except ConnectionError:
                data = b""
            if proxy.delay:
                await asyncio.sleep(proxy.delay)
            await self._gate()
            if not data:
                raise _Over
            if proxy.reads:
                kept += data
                data = b"".join(part for whole in _frames(kept) for part in passing(whole))
            out = data
            size = proxy.piece or len(out) or 1
            for at in range(0, len(out), size):
                sink.write(out[at : at + size])
                await sink.drain()

    def _to_broker(self, whole: bytes) -> Iterator[bytes]:
        method = _method_of(whole)
        if method == _ACK:
            self._answer(whole)
        if self.to_be_spoilt and method in (_PUBLISH, _ACK):
            self.to_be_spoilt = False
            self._proxy.channels_spoilt += 1
            yield frame.marshal(commands.Basic.Ack(delivery_tag=1 << 40), _FRAME.unpack_from(whole)[1])
        yield from self._counted(method, _PUBLISH, whole)

    def _to_client(self, whole: bytes) -> Iterator[bytes]:
        method = _method_of(whole)
        if method in (_ACK, _NACK):
            if self._proxy.swallow_confirms:
                self._proxy.confirms_swallowed += 1
                return
            self._answer(whole)
        yield from self._counted(method, _DELIVER, whole)

    def _counted(self, method: int | None, carrier: int, whole: bytes) -> Iterator[bytes]:
        limit = self._proxy.cut_after
        if limit is not None and self._messages[carrier] >= limit:
            return
        if method == carrier:
            self._messages[carrier] += 1
            if limit is not None and self._messages[carrier] == limit:
                whole = whole[: len(whole) // 2]
                self._cut_when_answered()
        yield whole

    def _answer(self, whole: bytes) -> None:
        """Count a confirm or acknowledgement. Both kinds of tags begin at 1 on their channel and rise by one."""
        (tag,) = struct.unpack_from(">Q", whole, 11)
        self._answered = max(self._answered, tag)
        self._cut_when_answered()

    def _cut_when_answered(self) -> None:
        limit = self._proxy.cut_after
        if limit is None or max(self._messages.values()) < limit or self._answered < limit // 2:
            return
        if not self.ended.is_set():
            self._proxy.cuts += 1
            self.ended.set()


def _frames(kept: bytearray) -> Iterator[bytes]:
    """Take whole frames out of `kept`. The protocol header of AMQP counts as one."""
    while len(kept) >= 8:
        size = 8 if kept[:4] == _GREETING else 8 + _FRAME.unpack_from(kept)[2]
        if len(kept) < size:
            return
        yield bytes(kept[:size])
        del kept[:size]


def _method_of(whole: bytes) -> int | None:
    if whole[0] != _METHOD:
        return None
    return int.from_bytes(whole[7:11], "big")

"""An adapter and its server, and what a test may put between them."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.integration.processes import ROOT
from tidings.server import EventStoreServer
from tidings.stores import (
    RecordedEvent,
)
from tidings.stores.eventstoredb.store import EventStoreDB
from tidings.testing.store_conformance import take

PATIENCE = 30.0


def many(count: int) -> Callable[[list[Any]], bool]:
    return lambda got: sum(isinstance(item, RecordedEvent) for item in got) >= count


@asynccontextmanager
async def opened(port: int, **options: object) -> AsyncIterator[EventStoreDB]:
    more = "".join(f"&{name}={value}" for name, value in options.items())
    store = EventStoreDB(f"esdb://127.0.0.1:{port}?Tls=false{more}")
    try:
        async with asyncio.timeout(PATIENCE):
            yield store
    finally:
        await store.close()


async def serve(database: str, port: int) -> None:
    """The program of such a process."""
    async with EventStoreServer(database, port=port) as server:
        print(server.port, flush=True)
        await asyncio.sleep(3600)


class Server:
    """A server that can be killed, stopped, and started again on its database and port."""

    def __init__(self, database: Path) -> None:
        self.database = database
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "tests.integration.eventstoredb",
            str(self.database),
            str(self.port),
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._process = process
        assert process.stdout is not None
        with process.stdout:
            self.port = int(process.stdout.readline())

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Proxy:
    """A proxy between adapter and server: it can drop answers, cut connections, and lead to another server."""

    def __init__(self) -> None:
        self.target = 0
        """The port of the current server."""
        self.mute = False
        self.deaf = False
        """Requests go nowhere."""
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._carry(reader, writer)
        finally:
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner, outer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            return
        self._writers.add(outer)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, back: bool) -> None:
            try:
                while data := await source.read(1 << 16):
                    if not (self.mute if back else self.deaf):
                        sink.write(data)
                        await sink.drain()
            except OSError:
                pass
            finally:
                writer.transport.abort()
                outer.transport.abort()

        await asyncio.gather(pump(reader, outer, False), pump(inner, writer, True))


@asynccontextmanager
async def behind_a_proxy(**options: object) -> AsyncIterator[tuple[EventStoreDB, Proxy]]:
    """Open a store whose server the test can change."""
    async with Proxy() as proxy, opened(proxy.port, **options) as store:
        yield store, proxy


@asynccontextmanager
async def serving(proxy: Proxy, database: Path, release: str = "eventstoredb-24.2") -> AsyncIterator[None]:
    """Run a server behind the proxy. At the end connections break, as when it is killed."""
    async with EventStoreServer(str(database), release=release) as server:
        proxy.target, proxy.mute, proxy.deaf = server.port, False, False
        yield
        proxy.target = 0
        proxy.cut()
        for _ in range(9):  # turns of the loop, in which the server hears of it, and has nothing to drain
            await asyncio.sleep(0)


async def stored(port: int, stream: str, count: int) -> None:
    """Wait until the server has this many events of the stream, even if its answers are dropped."""
    async with opened(port) as store:
        await take(store.subscribe_stream(stream), many(count))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))

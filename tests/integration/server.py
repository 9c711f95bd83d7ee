"""The server as a process, and calls to it that no client library would make."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from tidings.server.budgets import Limits, Treasury
from tidings.server.calls import Method
from tidings.server.connections import Connections
from tidings.server.http1 import Site
from tidings.server.http2 import Connection as HttpConnection
from tidings.server.protocol import shared, streams
from tidings.server.releases import EVENTSTOREDB
from tidings.server.running import PASSWORDS
from tidings.stores.eventstoredb.grpc import Address, Connection

__all__ = ["STREAMS", "ServerProcess", "appends", "batch", "connected", "message", "named", "raw"]

STREAMS = "/event_store.client.streams.Streams"


class ServerProcess:
    """`python -m tidings server`, which is ready when the block begins."""

    def __init__(self, db: Path | None, *options: str, port: int = 0, users: str = "", size_limit: int = 0) -> None:
        where = ["--memory"] if db is None else ["--db", str(db)]
        self._command = [sys.executable, "-m", "tidings", "server", *where, "--port", str(port), *options]
        if size_limit:
            self._command = ["sh", "-c", f'ulimit -f {size_limit}; trap "" XFSZ; exec "$@"', "sh", *self._command]
        self._environment = os.environ | {PASSWORDS: users}
        self.process: subprocess.Popen[str] | None = None
        self.said = ""

    def start(self) -> Self:
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self._environment
        )
        assert self.process.stdout is not None
        timer = threading.Timer(30, self.process.kill)
        timer.start()
        self.said = self.process.stdout.readline()
        timer.cancel()
        return self

    @property
    def uri(self) -> str:
        found = re.search(r"esdb://\S+?(?=[\s,]|$)", self.said)
        assert found, self.said or self.end()
        return found[0]

    @property
    def port(self) -> int:
        found = re.search(r":(\d+)", self.uri.removeprefix("esdb:"))
        assert found
        return int(found[1])

    def end(self) -> str:
        """Wait for its end. Return what it printed."""
        assert self.process is not None
        try:
            return self.process.communicate(timeout=30)[1]
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.communicate()

    def stop(self) -> int:
        """Stop it with SIGTERM. Return the exit status."""
        assert self.process is not None
        self.process.terminate()
        self.process.communicate(timeout=30)
        return self.process.returncode

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.kill()  # harmless when it has ended; what it said is closed


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    connection = await Connection.open(Address("127.0.0.1", port))
    try:
        yield connection
    finally:
        await connection.close()


async def raw(connection: Connection, path: str, *requests: bytes) -> list[bytes]:
    """Return all answers of a call whose requests are these bytes. Raises `CallFailed`."""
    with await connection.call(path, timeout=20) as call:
        call.send(*requests, end=True)
        answers: list[bytes] = []
        while got := await call.receive():
            answers += got
        return answers


def named(stream: str | bytes) -> shared.StreamIdentifier:
    return shared.StreamIdentifier(stream_name=stream if isinstance(stream, bytes) else stream.encode())


def message(kind: Any, data: bytes = b"{}", type: str = "T", **more: Any) -> Any:
    metadata = {"type": type, "content-type": "application/json"}
    return kind(**{"id": shared.UUID(string=str(uuid4())), "metadata": metadata, "data": data} | more)


def appends(stream: str | bytes, *datas: bytes) -> list[bytes]:
    """Return the requests of an `Append` that expects any version."""
    options = streams.AppendReq.Options(stream_identifier=named(stream), any=shared.Empty())
    kind = streams.AppendReq.ProposedMessage
    requests = [streams.AppendReq(options=options)]
    requests += [streams.AppendReq(proposed_message=message(kind, data)) for data in datas]
    return [request.SerializeToString() for request in requests]


def batch(stream: str) -> bytes:
    """Return a complete request of a `BatchAppend` that expects any version."""
    options = streams.BatchAppendReq.Options(stream_identifier=named(stream))
    options.any.SetInParent()
    kind = streams.BatchAppendReq.ProposedMessage
    id_ = shared.UUID(string=str(uuid4()))
    proposed = kind(id=id_, metadata={"type": "T", "content-type": "application/json"}, data=b"{}")
    request = streams.BatchAppendReq(correlation_id=id_, options=options, proposed_messages=[proposed], is_final=True)
    data: bytes = request.SerializeToString()
    return data


@asynccontextmanager
async def serving(method: Method) -> AsyncIterator[tuple[int, Connections]]:
    """Serve one method of a test's own to everybody. Give the port, and all connections to it."""

    async def anybody(metadata: object, allowance: object, public: bool) -> str:
        return ""

    all_ = Connections(Treasury(Limits()))
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(30):
        server = await asyncio.get_running_loop().create_server(
            lambda: HttpConnection(
                {method.path: method}, anybody, tasks, all_, lambda: None, Site(EVENTSTOREDB, users=False)
            ),
            "127.0.0.1",
            0,
        )
        async with server:
            yield server.sockets[0].getsockname()[1], all_


async def in_thread(function: Any, *arguments: Any) -> Any:
    """Run a call of the blocking client in a thread."""
    return await asyncio.wait_for(asyncio.to_thread(function, *arguments), 60)

"""An EventStoreDB or KurrentDB for tests: named by a variable, installed, in Docker, or else `tidings server`.

`eventstoredb_for_tests()` looks for `TIDINGS_TEST_ESDB` (a URL of one that may be written to), an installed `kurrentd`
or `eventstored`, and Docker (through testcontainers, where an engine answers). On these, tests share the log. Without
any of them, each test has a `tidings server`, which speaks their protocol, with a log in memory.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from tidings.adapters import open_store
from tidings.errors import StoreUnavailable
from tidings.testing.local import docker_answers, guarded
from tidings.urls import redact

__all__ = ["EventStoreDB", "eventstoredb_for_tests"]

READY_SECONDS: Final = 60.0
"""Seconds that a server may take until it answers."""
_BINARIES: Final = ("kurrentd", "eventstored")


class EventStoreDB(Protocol):
    """An event store that tests share, or one for each test."""

    def isolated(self) -> AbstractAsyncContextManager[str]:
        """Yield the URL of an event store for one test."""
        ...


class _Shared:
    """A server that tests share. They share its log, too, so each uses streams and services of its own."""

    def __init__(self, url: str, ended: Callable[[], str | None] = lambda: None) -> None:
        self._url = url
        self._ended = ended
        """Returns what the server said before it ended; None while it runs."""

    @asynccontextmanager
    async def isolated(self) -> AsyncIterator[str]:
        await _answers(self._url, self._ended)
        yield self._url


class _Served:
    """`tidings server`: each test has one, in a process."""

    @asynccontextmanager
    async def isolated(self) -> AsyncIterator[str]:
        port = _free_port()
        code = f"from tidings.server import run_server; run_server(None, memory=True, port={port})"
        with _started([sys.executable, "-c", code], port) as shared:
            async with shared.isolated() as url:
                yield url


@contextmanager
def _started(command: Sequence[str], port: int) -> Iterator[_Shared]:
    """Run a server in a process around the block."""
    with tempfile.TemporaryDirectory(prefix="tidings-eventstoredb-") as folder:
        said = Path(folder) / "said.txt"
        with guarded(command, said) as ended:
            yield _Shared(f"esdb://127.0.0.1:{port}?tls=false", lambda: said.read_text()[-2000:] if ended() else None)


async def _answers(url: str, ended: Callable[[], str | None]) -> None:
    """Wait until the server answers. Raises `StoreUnavailable` after `READY_SECONDS`, or when it has ended."""
    parts = urlsplit(url.partition(",")[0])
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            _, writer = await asyncio.open_connection(parts.hostname, parts.port or 2113)
            writer.close()
            break
        except OSError as error:
            if (said := ended()) is not None:
                raise StoreUnavailable(
                    f"the event store for tests ended before it answered, and said: {said}"
                ) from error
            if time.monotonic() > deadline:
                raise StoreUnavailable(
                    f"{redact(url)} has not answered for {READY_SECONDS:g} s: is it running?"
                ) from error
            await asyncio.sleep(0.1)
    async with open_store(url) as store:  # waits for what answers, and does not yet do so as it should
        await store.head()


@contextmanager
def _installed(binary: str) -> Iterator[EventStoreDB]:
    """Start the binary on free ports, with a log in memory and its own logs in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="tidings-eventstoredb-") as folder:
        port = _free_port()
        options = [f"--node-port={port}", f"--replication-port={_free_port()}", f"--log={folder}", f"--db={folder}"]
        with _started([binary, "--insecure", "--mem-db", *options], port) as shared:
            yield shared


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _container() -> Any:
    """Start a container. Return None without testcontainers or a Docker engine that answers."""
    try:
        from testcontainers.core.container import DockerContainer
    except ImportError:
        return None
    if not docker_answers():
        return None
    made = DockerContainer("docker.kurrent.io/eventstore/eventstoredb-ee:24.10").with_exposed_ports(2113)
    return made.with_env("EVENTSTORE_INSECURE", "true").with_env("EVENTSTORE_MEM_DB", "true").start()


@contextmanager
def eventstoredb_for_tests() -> Iterator[EventStoreDB]:
    """Yield the event store that a test session shares, or one that makes a server for each test."""
    if named := os.environ.get("TIDINGS_TEST_ESDB"):
        yield _Shared(named)
    elif binary := next(filter(None, map(shutil.which, _BINARIES)), None):
        with _installed(binary) as store:
            yield store
    elif (container := _container()) is not None:
        try:
            host, port = container.get_container_host_ip(), container.get_exposed_port(2113)
            yield _Shared(f"esdb://{host}:{port}?tls=false")
        finally:
            container.stop()
    else:
        yield _Served()

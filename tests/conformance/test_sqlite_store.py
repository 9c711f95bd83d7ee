"""The embedded store keeps the rules of the port: in a file, and in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from tidings.stores import EventStore
from tidings.stores.sqlite.log import now
from tidings.stores.sqlite.store import open_sqlite
from tidings.testing.store_conformance import Reopen, StoreConformance


class Clock:
    """A clock of real time plus what a test adds."""

    def __init__(self) -> None:
        self.added = 0

    def __call__(self) -> int:
        return now() + self.added

    def advance(self, seconds: float) -> None:
        self.added += int(seconds * 10_000_000)


class Embedded(StoreConformance):
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def advance(self, clock: Clock) -> Callable[[float], None]:
        return clock.advance

    @pytest.fixture
    async def store(self, url: str, clock: Clock) -> AsyncIterator[EventStore]:
        store = await open_sqlite(url, clock=clock)
        yield store
        await store.close()


class TestFile(Embedded):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path / 'log.db'}"

    @pytest.fixture
    def reopen(self, url: str) -> Reopen:
        @asynccontextmanager
        async def again() -> AsyncIterator[EventStore]:
            store = await open_sqlite(url)
            yield store
            await store.close()

        return again


class TestMemory(Embedded):
    @pytest.fixture
    def url(self) -> str:
        return f"memory://{uuid4().hex}"

"""Appends that are repeated while their first copy is being written: EventStoreDB answers `Timeout`, to them alone.

`tidings server` behaves so when it is strict.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import pytest

from tests.integration.eventstoredb import opened
from tidings.errors import StoreUnavailable
from tidings.server import EventStoreServer
from tidings.server import batches as server_batches
from tidings.stores import ANY, NO_STREAM, STREAM_EXISTS, Appended, Expected
from tidings.stores.eventstoredb.appends import Write
from tidings.stores.eventstoredb.finding import find as find_in_log
from tidings.stores.eventstoredb.store import EventStoreDB
from tidings.testing.store_conformance import event, events, read

SOON = 1.8
"""Seconds in which a busy machine answers a call that it does not drop. A timeout takes two."""


@pytest.fixture
async def store() -> AsyncIterator[EventStoreDB]:
    async with EventStoreServer(strict=True) as server, opened(server.port) as store:
        await store.append("warm", events(0))
        yield store


async def seconds(*appends: asyncio.Future[Appended]) -> float:
    began = asyncio.get_running_loop().time()
    await asyncio.gather(*appends)
    return asyncio.get_running_loop().time() - began


def looking_up(store: EventStoreDB) -> tuple[asyncio.Event, asyncio.Event]:
    """Hold up the adapter's search for an append. Return two events: the search has begun; it may go on."""
    asked, answer_may_come = asyncio.Event(), asyncio.Event()

    async def find(write: Write) -> Appended | Expected:
        asked.set()
        await answer_may_come.wait()
        return await find_in_log(store, write)

    store._appends._find = find
    return asked, answer_may_come


@pytest.mark.parametrize("expected", [ANY, STREAM_EXISTS, NO_STREAM, 0], ids=["any", "exists", "no_stream", "version"])
async def test_a_repetition_under_way_is_answered_as_the_first_and_stalls_no_neighbour(
    store: EventStoreDB, expected: Expected
) -> None:
    if expected in (STREAM_EXISTS, 0):
        await store.append("s", events(0))
    before = 1 if expected in (STREAM_EXISTS, 0) else 0
    batch = events(7, 8)
    repeated = [asyncio.ensure_future(store.append("s", batch, expected=expected)) for _ in range(3)]
    neighbours = [asyncio.ensure_future(store.append(f"n-{n % 20}", events(n))) for n in range(200)]
    assert await seconds(*neighbours) < SOON
    assert not repeated[1].done(), "the server drops the repetition, or this test tries nothing"
    looked_up: list[str] = []

    async def find(write: Write) -> Appended | Expected:
        looked_up.append(write.stream)
        return await find_in_log(store, write)

    store._appends._find = find
    while not all(one.done() for one in repeated):  # also what is under way when the time-out comes
        some = [asyncio.ensure_future(store.append(f"n-{n}", events(n))) for n in range(20)]
        assert await seconds(*some) < SOON
    answers = await asyncio.gather(*repeated)
    assert {*looked_up} <= {"s"}, "no other append is taken for lost"
    assert len(set(answers)) == 1
    assert await read(store, "s") == [(0, 0)] * before + [(before, 7), (before + 1, 8)]


async def test_later_appends_of_its_stream_wait_for_what_timed_out_and_keep_their_order(store: EventStoreDB) -> None:
    one = event(0)
    asked, answer_may_come = looking_up(store)
    first, repeated = (asyncio.ensure_future(store.append("s", [one])) for _ in range(2))
    await asked.wait()
    later = [asyncio.ensure_future(store.append("s", events(n))) for n in range(1, 6)]
    assert await seconds(asyncio.ensure_future(store.append("n", events(1)))) < SOON
    assert not any(answer.done() for answer in later)
    answer_may_come.set()
    assert await repeated == await first
    assert [(await answer).version for answer in later] == [1, 2, 3, 4, 5]
    assert await read(store, "s") == [(n, n) for n in range(6)]


@pytest.mark.parametrize("expected", [ANY, NO_STREAM], ids=["any", "no_stream"])
async def test_an_append_that_always_times_out_is_given_up_alone_with_its_outcome_unknown(
    monkeypatch: pytest.MonkeyPatch, expected: Expected
) -> None:
    monkeypatch.setattr(server_batches, "TIMEOUT", 0.2)
    monkeypatch.setattr(
        server_batches.UnderWay, "__contains__", lambda self, append: append.stream == "never"
    )  # as a server whose write never ends
    async with EventStoreServer(strict=True) as server, opened(server.port, DefaultDeadline=2) as store:
        never = asyncio.ensure_future(store.append("never", events(1), expected=expected))
        while not never.done():
            assert await seconds(asyncio.ensure_future(store.append("n", events(1)))) < SOON
            await asyncio.sleep(0.05)
        with pytest.raises(StoreUnavailable, match="'never' may or may not have been appended"):
            await never
        assert store._appends.idle, "nothing is left behind"


async def test_a_server_that_dies_meanwhile_loses_and_doubles_nothing() -> None:
    async with EventStoreServer(strict=True) as server, opened(server.port) as store:
        await store.append("warm", events(0))
        batch = events(0)
        asked, _ = looking_up(store)
        repeated = [asyncio.ensure_future(store.append("s", batch)) for _ in range(2)]
        await asked.wait()
        later = [asyncio.ensure_future(store.append("s", events(n))) for n in range(1, 4)]
        store._appends._find = partial(find_in_log, store)
        for connection in set(store.connections):
            await connection.close()
        assert await repeated[1] == await repeated[0]
        assert [(await answer).version for answer in later] == [1, 2, 3]
        assert await read(store, "s") == [(n, n) for n in range(4)]

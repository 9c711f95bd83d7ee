"""Nobody waits for ever on the EventStoreDB adapter: errors in the program, closing that is cut short, full servers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

import tidings.stores.eventstoredb.wire as wire
from tests.integration.eventstoredb import many, opened
from tidings import open_store
from tidings.errors import EventTooLarge, StoreUnavailable
from tidings.server import EventStoreServer
from tidings.stores import CaughtUp, EventData
from tidings.stores.eventstoredb.appends import Appends, Write
from tidings.stores.eventstoredb.grpc import Connection
from tidings.stores.eventstoredb.grpc_call import Call
from tidings.stores.eventstoredb.leader import Leader
from tidings.testing.store_conformance import event, events, numbers, read, take


async def test_an_answer_that_breaks_the_adapter_fails_who_waits_and_no_later_append(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decide = wire.outcome_of

    def broken(*_: Any) -> Any:
        monkeypatch.setattr("tidings.stores.eventstoredb.appends.outcome_of", decide)
        raise KeyError("a bug")

    async with EventStoreServer() as server, opened(server.port) as store:
        await store.append("s", events(0))
        monkeypatch.setattr("tidings.stores.eventstoredb.appends.outcome_of", broken)
        with capture_logs() as logs:
            waiting = await asyncio.gather(
                *(store.append(f"t-{n}", events(n)) for n in range(5)), return_exceptions=True
            )
        assert [type(outcome) for outcome in waiting] == [StoreUnavailable] * 5
        assert [(line["event"], repr(line["exc_info"].exceptions[0])) for line in logs if "exc_info" in line] == [
            ("store.appends_failed", "KeyError('a bug')")
        ]
        assert (await store.append("s", events(1))).version == 1


async def test_when_the_task_of_the_appends_dies_everybody_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("a bug")

    async with EventStoreServer() as server, opened(server.port) as store:
        await store.append("s", events(0))
        monkeypatch.setattr(Leader, "judge", broken)
        waiting = [asyncio.ensure_future(store.append("s", events(n))) for n in range(1, 4)]
        await asyncio.sleep(0)
        with capture_logs() as logs:
            for connection in store.connections:
                connection.cut()
            for append in waiting:
                with pytest.raises(StoreUnavailable, match=r"a bug.*may or may not"):
                    await append
        assert "store.appends_ended" in [line["event"] for line in logs]
        with pytest.raises(StoreUnavailable, match="open the store again") as refused:
            await store.append("s", events(9))
        assert not refused.value.waiting_helps


async def test_a_bug_in_finding_out_what_became_of_appends_fails_who_waits_and_no_later_append(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    again = Appends._again

    async def breaks(self: Appends, call: Call, write: Write) -> Any:
        monkeypatch.setattr(Appends, "_again", again)
        raise KeyError("a bug")

    monkeypatch.setattr(Appends, "_again", breaks)
    async with EventStoreServer() as server, opened(server.port) as store, asyncio.timeout(20):
        await store.append("s", events(0))
        waiting = [asyncio.ensure_future(store.append("s", events(n))) for n in range(1, 4)]
        await asyncio.sleep(0)
        with capture_logs() as logs:
            for connection in store.connections:
                connection.cut()
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 3
        assert "store.appends_failed" in [line["event"] for line in logs]
        await store.append("t", events(9))


async def test_closing_ends_at_whatever_moment_the_connection_is_lost() -> None:
    """Python 3.11 forgets that a task was cancelled if a task of its group fails in the same turn of the loop."""
    for turns in range(8):
        async with EventStoreServer() as server, asyncio.timeout(10), opened(server.port) as store:
            await store.append("s", events(0))
            for connection in store.connections:
                connection.cut()
            for _ in range(turns):
                await asyncio.sleep(0)
            await store.close()


async def test_an_expected_version_that_is_none_is_refused_and_its_neighbours_are_not() -> None:
    async with EventStoreServer() as server, opened(server.port) as store:
        wrong: Any = "3"
        outcomes = await asyncio.gather(
            store.append("s", events(0)),
            store.append("s", events(1), expected=wrong),
            store.append("s", events(2)),
            return_exceptions=True,
        )
        assert [type(outcome).__name__ for outcome in outcomes] == ["Appended", "TypeError", "Appended"]


async def test_very_many_small_events_are_too_large_for_one_append_and_disturb_nobody() -> None:
    """Each event has an id and names besides its bytes. A request over the server's limit would end the call of all
    appends."""
    async with EventStoreServer() as server, opened(server.port) as store:
        outcomes = await asyncio.gather(
            store.append("s", events(0)),
            store.append("s", [EventData("T", b"x" * 8)] * 200_000),
            store.append("s", events(1)),
            return_exceptions=True,
        )
        assert [type(outcome).__name__ for outcome in outcomes] == ["Appended", EventTooLarge.__name__, "Appended"]


async def test_closing_that_was_cancelled_can_be_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Call, "_split", lambda call: [])  # no answer ever comes
    async with EventStoreServer() as server, opened(server.port) as store:
        appending = asyncio.ensure_future(store.append("s", events(0)))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(store.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        with pytest.raises(StoreUnavailable, match="may or may not"):
            await appending
        async with asyncio.timeout(5):
            await store.close()


async def test_appends_do_not_wait_for_a_call_that_the_server_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter has ended the call because the server is stopping. The server answers pings and nothing else."""
    async with EventStoreServer() as server, opened(server.port, DefaultDeadline=1) as store:
        await store.append("s", events(0))
        old = next(iter(store.connections))
        monkeypatch.setattr(old, "_end", lambda *_: None)
        old.leaving = True
        assert (await store.append("s", events(1))).version == 1
        assert await read(store, "s") == [(0, 0), (1, 1)]


async def test_a_server_that_allows_no_more_calls_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with EventStoreServer() as server, opened(server.port, DefaultDeadline=1) as store:
        await store.append("s", events(0))
        monkeypatch.setattr(Connection, "_full", lambda connection: True)
        with pytest.raises(StoreUnavailable, match="as many calls are open as the server allows"):
            await store.head()


async def test_a_stream_subscription_that_brings_nothing_while_there_is_something_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tidings.stores.eventstoredb.store.QUIET_SECONDS", 0.1)
    hanging: set[int] = set()
    split = Call._split
    monkeypatch.setattr(Call, "_split", lambda self: [] if self.number in hanging else split(self))
    async with EventStoreServer() as server, opened(server.port) as store:
        source = store.subscribe_stream("s")
        await take(source, lambda got: any(isinstance(item, CaughtUp) for item in got))
        for connection in store.connections:
            hanging |= set(connection._calls)
        assert hanging
        await store.append("s", [event(0)])
        assert numbers(await take(source, many(1))) == [0]


async def test_an_append_of_unknown_outcome_that_cannot_be_looked_for_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def denied(*_: Any) -> Any:
        raise StoreUnavailable("EventStoreDB denies user 'writer' what was asked for")

    monkeypatch.setattr("tidings.stores.eventstoredb.store.find", denied)
    async with EventStoreServer() as server, opened(server.port) as store:
        await store.append("s", events(0))
        appending = asyncio.ensure_future(store.append("s", events(1)))
        await asyncio.sleep(0)
        for connection in store.connections:
            connection.cut()
        with pytest.raises(StoreUnavailable, match=r"'s' may or may not have been appended.*denies user 'writer'"):
            await appending


async def test_a_log_whose_identity_was_tombstoned_says_so(tmp_path: Path) -> None:
    """Neither `tidings server` nor its users can do that any more; EventStoreDB's can."""
    async with open_store(f"sqlite:///{tmp_path}/log.db") as embedded:
        await embedded.log_id()
        await embedded.tombstone("tidings_log")
    async with EventStoreServer(str(tmp_path / "log.db")) as server, opened(server.port) as store:
        with pytest.raises(StoreUnavailable, match="'tidings_log', the log's identity, cannot be read"):
            await store.log_id()
